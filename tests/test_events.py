"""events.jsonl: whole lines, whatever ends the process, and a run that does not depend on it."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvd_lightning.events import events_path, read_events, record, recording


def test_each_rank_appends_to_a_file_of_its_own(tmp_path: Path) -> None:
    record("nowhere")
    for rank in (0, 0, 1):
        with recording(tmp_path, rank):
            record("edit", stage="conditional", edit="Prune", heads=math.nan, figures={"edges": (3, 4)}, file=tmp_path)
    record("nowhere")
    assert {path.name for path in tmp_path.iterdir()} == {"events.jsonl", "events_rank1.jsonl"}
    first, second = read_events(events_path(tmp_path))
    assert first["time"] <= second["time"]
    assert first["uptime"] <= second["uptime"]
    assert second["event"] == "edit"
    assert second["figures"] == {"edges": [3, 4]}
    assert second["heads"] is None  # JSON has no NaN
    assert second["file"] == str(tmp_path)
    assert [line["rank"] for line in read_events(events_path(tmp_path, 1))] == [1]


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=40), st.text(max_size=20))
def test_a_line_that_a_dying_process_left_costs_no_other(
    tmp_path_factory: pytest.TempPathFactory, torn: bytes, message: str
) -> None:
    folder = tmp_path_factory.mktemp("events")
    path = events_path(folder)
    with recording(folder):
        record("start")
        with path.open("ab") as file:
            file.write(b'{"torn": "' + torn)
        record("error", message=message)
    found = read_events(path)
    assert [line["event"] for line in found if "event" in line] == ["start", "error"]
    assert found[-1]["message"] == message
    assert path.read_bytes().endswith(b"\n")
    json.loads(path.read_bytes().splitlines()[-1])


def test_what_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    with recording(tmp_path / "gone"):
        with pytest.warns(UserWarning, match=r"events\.jsonl: events are not written \(No such file"):
            record("epoch")
        record("epoch")  # said once
    assert not (tmp_path / "gone").exists()
