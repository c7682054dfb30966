"""Any ops over tensors of which some come from a file of others, with little memory, snapshots and discards between
them: each read sees what was written last, and what was never written is never stored."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from cross_references import check_mover
from hypothesis import given, settings
from hypothesis import strategies as st
from training_rig import Rig, pattern

from pagemem.files.stats import IoMeter
from pagemem.sources.source_files import Origin, SourceFile, SourcePiece
from pagemem.sources.source_transfers import SourceFiles
from scheduler import knobs

PAGES = {"A": 1, "B": 2, "C": 1, "D": 3, "E": 1}
FROM_FILE = "ABCD"


def originate(rig: Rig, path: Path) -> None:
    """Have tensors come from a file, each in two pieces that lie apart there, the second one first."""
    content, places = b"odd", {}
    for number, letter in enumerate(FROM_FILE, start=101):
        values = pattern(rig.tensors[letter].n_bytes, number).numpy().tobytes()
        half = len(values) // 8 * 4
        places[letter] = len(content), half
        content += values[half:] + values[:half]
        rig.salts[rig.tensors[letter].id] = number
    path.write_bytes(content)
    file = SourceFile.of(path)
    for letter, (at, half) in places.items():
        tensor = rig.tensors[letter]
        rest = tensor.n_bytes - half
        int32 = torch.int32
        pieces = [SourcePiece(file, at, rest, half, int32, int32), SourcePiece(file, at + rest, half, 0, int32, int32)]
        rig.mover.originate(tensor, Origin.of(pieces, tensor.n_bytes))


OPS = st.lists(
    st.lists(
        st.tuples(st.sampled_from(sorted(PAGES)), st.sampled_from("rrrrw")),
        min_size=1,
        max_size=2,
        unique_by=lambda x: x[0],
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40)
@given(
    steps=st.lists(st.tuples(OPS, st.sampled_from(["", "", "snapshot", "evict"])), min_size=1, max_size=6),
    order=st.permutations(sorted(PAGES)),
    ahead=st.sampled_from([1, 2, 6]),
)
def test_each_read_sees_what_was_written_last(
    steps: list[tuple[list[list[tuple[str, str]]], str]], order: list[str], ahead: int
) -> None:
    with (
        TemporaryDirectory() as folder,
        closing(SourceFiles(IoMeter(), n_threads=2, chunk_bytes=16384)) as sources,
        patch.object(knobs, "READ_AHEAD_PART", ahead),
    ):
        rig = Rig(6, "".join(PAGES), PAGES)
        rig.mover.sources = sources
        rig.driver.memories.set_order(rig.tensors[letter] for letter in order)
        try:
            originate(rig, Path(folder) / "file")
            written: set[str] = set()
            snapshots = []
            for number, (ops, then) in enumerate(steps):
                rig.step(*(" ".join(letter + mode for letter, mode in op) for op in ops), repeatable=number > 0)
                written |= {letter for op in ops for letter, mode in op if mode == "w"}
                if then == "evict":
                    rig.driver.evict_all()
                elif then == "snapshot":
                    with rig.mover.changed:
                        snapshots.append(rig.mover.snapshots.begin(rig.tensors.values()))
                    rig.mover.monitor.wait_until(lambda: not snapshots[-1].pending, "snapshot")
                    named = {*snapshots[-1].copies, *snapshots[-1].origins}
                    assert {rig.tensors[letter].id for letter in FROM_FILE} <= named
                check_mover(rig.mover)
                for letter in FROM_FILE:
                    tensor = rig.tensors[letter]
                    assert (tensor.origin is None) is (letter in written)
                    assert letter in written or tensor.copy is None
            rig.read_all()
        finally:
            rig.close()
