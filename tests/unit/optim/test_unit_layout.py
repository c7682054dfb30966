"""How parameters lie in a unit, and how its states are cut into slices: examples, and what holds for any sizes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim.layout import SLICE_ALIGN_NUMEL, SLOT_ALIGN_NUMEL, cut, lay_out
from optim.unit import Slice, Slot, Unit, UnitIndex, pieces_of
from pagemem.frames.page import TensorId
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.tier import Tag
from pagemem.units import KiB

SHAPES = st.lists(st.lists(st.integers(1, 90), max_size=3).map(torch.Size), min_size=1, max_size=6)


def unit_of(shapes: list[torch.Size], slice_numel: int, **slot_fields: Any) -> tuple[Unit, int]:
    """A unit with one slot a shape, and the elements of its layout."""
    layout = lay_out([(f"p{i}", shape) for i, shape in enumerate(shapes)])
    slots = [
        Slot(name, shape, torch.float32, offset, **{"paged": True, "group": 0, **slot_fields})
        for name, shape, offset in layout.slots
    ]
    parameters = PagedTensor.sized(TensorId(0), "u", Tag.PARAM, layout.numel * 4, 64 * KiB)
    return Unit(0, "u", torch.float32, parameters, slots, cut(layout.numel, slice_numel)), layout.numel


def test_parameters_begin_at_multiples_of_the_slot_alignment() -> None:
    layout = lay_out(
        [("a", torch.Size((3, 5))), ("b", torch.Size(())), ("c", torch.Size((64,))), ("d", torch.Size((65,)))]
    )
    assert [offset for _, _, offset in layout.slots] == [0, 64, 128, 192]
    assert layout.numel == 320


@pytest.mark.parametrize(
    ("numel", "slice_numel", "bounds"),
    [
        (1, 1024, [(0, 1)]),
        (1024, 1024, [(0, 1024)]),
        (2048, 1024, [(0, 1024), (1024, 2048)]),
        (1500, 1024, [(0, 1500)]),
        (4097, 2048, [(0, 3072), (3072, 4097)]),
        (100, 1 << 30, [(0, 100)]),
    ],
)
def test_slices_are_cut_at_multiples_of_the_slice_alignment(
    numel: int, slice_numel: int, bounds: list[tuple[int, int]]
) -> None:
    assert [(part.begin, part.end) for part in cut(numel, slice_numel)] == bounds


@given(SHAPES)
def test_slots_lie_in_order_aligned_and_apart(shapes: list[torch.Size]) -> None:
    layout = lay_out([(f"p{i}", shape) for i, shape in enumerate(shapes)])
    assert [(name, shape) for name, shape, _ in layout.slots] == [(f"p{i}", shape) for i, shape in enumerate(shapes)]
    end = 0
    for _, shape, offset in layout.slots:
        assert offset % SLOT_ALIGN_NUMEL == 0
        assert 0 <= offset - end < SLOT_ALIGN_NUMEL
        end = offset + shape.numel()
    assert 0 <= layout.numel - end < SLOT_ALIGN_NUMEL and layout.numel % SLOT_ALIGN_NUMEL == 0


@given(st.integers(1, 300_000), st.integers(1024, 100_000))
def test_slices_cover_everything_once_in_aligned_parts_of_about_the_size_asked_for(
    numel: int, slice_numel: int
) -> None:
    parts = cut(numel, slice_numel)
    assert parts[0].begin == 0 and parts[-1].end == numel
    for one, two in itertools.pairwise(parts):
        assert one.end == two.begin
    assert all(part.begin % SLICE_ALIGN_NUMEL == 0 and part.numel > 0 for part in parts)
    assert all(part.numel <= 1.5 * slice_numel + SLICE_ALIGN_NUMEL for part in parts)


@given(SHAPES, st.integers(1024, 100_000))
def test_pieces_cover_every_parameter_once(shapes: list[torch.Size], slice_numel: int) -> None:
    unit, numel = unit_of(shapes, slice_numel)
    covered = [0] * numel
    for part in unit.slices:
        for piece in pieces_of(unit, part):
            assert part.begin <= piece.begin < piece.end <= part.end
            assert piece.slot.offset <= piece.begin and piece.end <= piece.slot.end
            for element in range(piece.begin, piece.end):
                covered[element] += 1
    expected = [0] * numel
    for slot in unit.slots:
        expected[slot.offset : slot.end] = [1] * slot.numel
    assert covered == expected


def test_parameters_without_a_gradient_have_no_pieces() -> None:
    unit, _ = unit_of([torch.Size((10,)), torch.Size((20,)), torch.Size((30,))], 1024)
    unit.slots[1].paged = False
    assert [piece.slot.name for piece in pieces_of(unit, unit.slices[0])] == ["p0", "p2"]
    assert [piece.numel for piece in pieces_of(unit, unit.slices[0])] == [10, 30]
    assert pieces_of(unit, Slice(64, 128)) == []


def test_the_index_lists_optimized_slots_in_the_models_order() -> None:
    first, _ = unit_of([torch.Size((1,)), torch.Size((2,))], 1024, group=0)
    second, _ = unit_of([torch.Size((3,)), torch.Size((4,))], 1024, group=1)
    for slot, order in zip([*first.slots, *second.slots], (3, 0, 1, 2), strict=True):
        slot.order = order
    second.slots[1].group = -1
    assert [slot.order for _, slot in UnitIndex([first, second]).slots()] == [0, 1, 3]
    assert second.gradient_bytes == 12
