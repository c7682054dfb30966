"""How lock-free mode divides a budget, for units of any size, and what it says when a budget is too small."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from offload.store.make_updater import Division, divide
from optim.lockfree.batch_update import scratch_bytes
from optim.lockfree.state_windows import least_frames
from optim.unit import Slot, Unit, cut, lay_out
from pagemem.errors import BudgetError
from pagemem.frames.page import TensorId
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.tier import Tag
from pagemem.units import KiB, ceil_div

PAGE_BYTES = 64 * KiB
SLICE_NUMEL = 1 << 14


def made(numels: list[int], *, trained: int, n_states: int, dtype: torch.dtype = torch.float32) -> list[Unit]:
    """Units of one parameter each, of which the first ``trained`` are optimized."""
    units = []
    for number, numel in enumerate(numels):
        layout = lay_out([(f"u{number}", torch.Size([numel]))])
        slots = [
            Slot(name, shape, dtype, offset, group=0 if number < trained else -1)
            for name, shape, offset in layout.slots
        ]
        tensor = PagedTensor.sized(TensorId(number), f"u{number}", Tag.PARAM, layout.numel * dtype.itemsize, PAGE_BYTES)
        unit = Unit(number, f"u{number}", dtype, tensor, slots, cut(layout.numel, SLICE_NUMEL))
        for part in unit.slices:
            if number < trained and n_states:
                part.states = PagedTensor.sized(TensorId(0), "", Tag.MOMENT, 4 * n_states * part.numel, PAGE_BYTES)
            if number < trained and dtype is not torch.float32:
                part.master = PagedTensor.sized(TensorId(0), "", Tag.MASTER, 4 * part.numel, PAGE_BYTES)
        units.append(unit)
    return units


def divided(units: list[Unit], ram_bytes: int, *, eager: bool) -> Division:
    """The division of a budget."""
    index = SimpleNamespace(units=units)
    memory = SimpleNamespace(ram=ram_bytes)
    store = SimpleNamespace(
        page_bytes=PAGE_BYTES, config=SimpleNamespace(memory=memory, update=SimpleNamespace(threads=1)), index=index
    )
    return divide(cast(Any, store), [unit for unit in units if unit.gradient_bytes], eager=eager)


def slice_frames(unit: Unit, *, masters: bool) -> list[int]:
    """Frames of each slice's states, with or without an fp32 master."""
    found = []
    for part in unit.slices:
        states = 0 if part.states is None else part.states.n_frames
        found.append(states + (ceil_div(4 * part.numel, PAGE_BYTES) if masters else 0))
    return found


@st.composite
def models(draw: st.DrawFn) -> list[Unit]:
    numels = draw(st.lists(st.integers(1, 200_000), min_size=1, max_size=8))
    return made(
        numels, trained=draw(st.integers(1, len(numels))), n_states=draw(st.integers(0, 2)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
    )  # fmt: skip


@given(units=models(), ram_bytes=st.integers(0, 64 << 20), eager=st.booleans())
def test_what_is_divided_suffices_and_fits(units: list[Unit], ram_bytes: int, eager: bool) -> None:
    trained = [unit for unit in units if unit.gradient_bytes]
    try:
        found = divided(units, ram_bytes, eager=eager)
    except BudgetError as error:
        assert error.smallest_bytes > ram_bytes
        return
    assert (
        found.gradient_bytes + scratch_bytes(trained, 1) + (found.parameter_frames + found.state_frames) * PAGE_BYTES
        <= ram_bytes
    )
    sizes = [size for unit in trained for size in slice_frames(unit, masters=not found.resident)]
    assert least_frames(sizes) <= found.state_frames <= sum(sizes)
    every = [unit.parameters.n_frames for unit in units]
    # One slice of states can always be looked at beside what the schedule holds.
    if found.resident:
        assert units[0].dtype is torch.float32
        assert found.parameter_frames >= sum(every) + max(sizes)
    else:
        assert found.parameter_frames >= max(2 * max(every), max(every) + max(sizes))
    assert found.gradient_bytes >= sum(unit.gradient_bytes for unit in trained)


@given(units=models(), eager=st.booleans())
def test_the_smallest_budget_works_and_one_byte_less_does_not(units: list[Unit], eager: bool) -> None:
    with pytest.raises(BudgetError, match=r"need \d+ bytes .* in all; set memory\.ram to at least that") as caught:
        divided(units, 0, eager=eager)
    smallest_bytes = caught.value.smallest_bytes
    assert str(smallest_bytes) in str(caught.value)
    divided(units, smallest_bytes, eager=eager)
    with pytest.raises(BudgetError) as again:
        divided(units, smallest_bytes - 1, eager=eager)
    assert again.value.smallest_bytes == smallest_bytes


@given(units=models(), eager=st.booleans())
def test_more_memory_never_makes_less_room_for_gradients(units: list[Unit], eager: bool) -> None:
    total = sum(unit.gradient_bytes for unit in units)
    rich = divided(units, 1 << 30, eager=eager)
    largest = max(unit.gradient_bytes for unit in units)
    assert rich.gradient_bytes == (1 if eager else 2) * total + 2 * largest
    assert rich.resident is (units[0].dtype is torch.float32)
    sizes = [size for unit in units if unit.gradient_bytes for size in slice_frames(unit, masters=not rich.resident)]
    assert rich.state_frames == sum(sizes), "everything fits"


def test_parameters_that_do_not_fit_stream_with_masters() -> None:
    units = made([16_384] * 40, trained=40, n_states=2)
    with pytest.raises(BudgetError) as caught:
        divided(units, 0, eager=True)
    smallest = divided(units, caught.value.smallest_bytes, eager=True)
    assert not smallest.resident
    assert smallest.parameter_frames < 40 and smallest.state_frames == 3 * 3
    assert divided(units, caught.value.smallest_bytes + 40 * PAGE_BYTES, eager=True).resident
