"""The tree of heads: what grew from what, on disk and in checkpoints."""

from pathlib import Path

import pytest

from lvd_lightning.growing import HEADS_FILE, Ancestry

GROWN = Ancestry.first([2, 1]).grown([[1], [0]], 2).grown([[2, 0], []], 4)


def test_copies_follow_the_heads_that_were_there() -> None:
    assert [(head.parent, head.epoch) for head in GROWN.heads[0]] == [(None, 0), (None, 0), (1, 2), (2, 4), (0, 4)]
    assert GROWN.num_heads == [5, 2]
    assert GROWN.depths(0) == [0, 0, 1, 2, 1]


def test_lines_do_not_cross() -> None:
    """In the order of the picture all that grew from a head stands right behind it."""
    order = GROWN.ordered(0)
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert order == [0, 4, 1, 2, 3]
    many = Ancestry.first([1]).grown([[0]], 1).grown([[1, 0]], 2).grown([[2, 3, 0]], 3)
    order = many.ordered(0)
    assert sorted(order) == list(range(7))
    for head in range(7):
        place = order.index(head)
        below = {head}
        below |= {h for h in range(7) if many.heads[0][h].parent in below}
        below |= {h for h in range(7) if many.heads[0][h].parent in below}
        assert set(order[place : place + len(below)]) == below


def test_on_disk_and_as_plain_values(tmp_path: Path) -> None:
    patches = [[5, 4, 3, 2, 1], [7, 0]]
    GROWN.write(tmp_path, patches)
    assert Ancestry.read(tmp_path) == (GROWN, patches)
    assert Ancestry.of_plain(GROWN.plain()) == GROWN
    assert Ancestry.read(tmp_path / "elsewhere") is None


HEADER = "circuit,head,grew_from,epoch,patches\n"


@pytest.mark.parametrize(
    "content", ["", "a,b\n", *(HEADER + row for row in ("0,0,1,0,4\n", "0,1,,0,4\n", "0,0,,x,4\n", "1,0,,0,4\n"))]
)
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / HEADS_FILE).write_text(content)
    with pytest.raises(ValueError, match=f"{HEADS_FILE}: cannot be read"):
        Ancestry.read(tmp_path)
