"""The file of compressed pictures: what is not whole is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lvd_lightning.coding.archive import Archive, Entry, pack, unpack
from lvd_lightning.coding.ranges import RangeReader, RangeWriter

PATH = Path("a.lvd")
WORDS = [np.array([1, 2**32 - 1], dtype=np.uint32), np.array([], dtype=np.uint32)]


def archive(name: str = "more/ä.png") -> Archive:
    return Archive("c", "t", 7, False, [Entry("a.png", 8, 8), Entry(name, 8, 9, True)], WORDS)


def test_what_is_packed_is_unpacked() -> None:
    contents, num_words = pack(archive())
    assert num_words == 8
    found = unpack(contents, PATH)
    assert (found.circuit, found.tables, found.group, found.is_tiled) == ("c", "t", 7, False)
    assert list(found.entries) == archive().entries
    assert [words.tolist() for words in found.groups] == [words.tolist() for words in WORDS]


def test_every_cut_and_every_change_is_noticed() -> None:
    contents, _ = pack(archive())
    for length in range(len(contents)):
        with pytest.raises(ValueError, match="a.lvd: "):
            unpack(contents[:length], PATH)
    for place in range(len(contents)):
        changed = bytearray(contents)
        changed[place] ^= 0x10
        with pytest.raises(ValueError, match="is no file|is of version|cut short or changed"):
            unpack(bytes(changed), PATH)


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "b/../../a.png", "c:/a.png", "..\\a.png", ""])
def test_names_that_lead_out_of_the_folder_are_refused(name: str) -> None:
    contents, _ = pack(archive(name))
    with pytest.raises(ValueError, match="leads out of a folder"):
        unpack(contents, PATH)


def test_values_cost_what_their_frequencies_say() -> None:
    generator = torch.Generator().manual_seed(0)
    frequencies = torch.randint(1 << 20, (4000, 11), generator=generator).double()
    frequencies[:, 3] = 0
    values = torch.multinomial(frequencies, 1, generator=generator)[:, 0]
    values[0] = 3  # what has no frequency can be coded
    writer = RangeWriter()
    for start in range(0, 4000, 100):
        writer.add(values[start : start + 100], frequencies[start : start + 100])
    words = writer.words()
    share = frequencies / frequencies.sum(1, keepdim=True)
    bits = -share.gather(1, values[:, None])[1:].log2().sum() + 24
    assert float(bits) - 32 <= 32 * len(words) <= float(bits) + 64
    reader = RangeReader(words)
    found = [reader.take(frequencies[start : start + 50]) for start in range(0, 4000, 50)]
    assert torch.equal(torch.cat(found), values)
    assert reader.is_at_end
