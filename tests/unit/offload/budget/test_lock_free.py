"""How lock-free mode divides a budget, for units of any size, what it says when a budget is too small, and the smallest
budget found by trying all."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from offload.budget.lock_free import Division, LockFreeBudget, UnitSize
from offload.budget.need import Sizes, UnitShape, budget_need
from offload.config import Config
from offload.config_loading import load_config
from optim.layout import cut, lay_out
from optim.lockfree.batch_update import scratch_bytes
from pagemem.errors import BudgetError
from pagemem.units import KiB, MiB, ceil_div
from scheduler.planning.update_round import least_frames

PAGE_BYTES = 64 * KiB
SLICE_NUMEL = 1 << 14


def made(numels: list[int], *, trained: int, dtype: torch.dtype = torch.float32) -> list[UnitSize]:
    """Units of one parameter each, of which the first ``trained`` are optimized."""
    units = []
    for number, numel in enumerate(numels):
        laid_out = lay_out([(f"u{number}", torch.Size([numel]))]).numel
        slices = [part.numel for part in cut(laid_out, SLICE_NUMEL)] if number < trained else []
        units.append(UnitSize(dtype, laid_out, numel * dtype.itemsize * (number < trained), slices))
    return units


Model = tuple[list[UnitSize], int]


def budget(model: Model) -> LockFreeBudget:
    """Of units and a number of states."""
    return LockFreeBudget(*model, PAGE_BYTES, n_threads=1, may_be_on_time=False)


def divided(model: Model, ram_bytes: int, *, eager: bool) -> Division:
    """The division of a budget."""
    return budget(model).divide(ram_bytes, eager=eager)


def frames_of(unit: UnitSize) -> int:
    """Frames of the parameters."""
    return ceil_div(unit.numel * unit.dtype.itemsize, PAGE_BYTES)


def slice_frames(model: Model, *, masters: bool) -> list[int]:
    """Frames of each slice's states, with or without an fp32 master."""
    units, n_states = model
    numels = [numel for unit in units for numel in unit.slice_numels]
    return [ceil_div(4 * n_states * n, PAGE_BYTES) + masters * ceil_div(4 * n, PAGE_BYTES) for n in numels]


@st.composite
def models(draw: st.DrawFn) -> Model:
    numels = draw(st.lists(st.integers(1, 200_000), min_size=1, max_size=8))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return made(numels, trained=draw(st.integers(1, len(numels))), dtype=dtype), draw(st.integers(0, 2))


@given(model=models(), ram_bytes=st.integers(0, 64 << 20), eager=st.booleans())
def test_what_is_divided_suffices_and_fits(model: Model, ram_bytes: int, eager: bool) -> None:
    units = model[0]
    try:
        found = divided(model, ram_bytes, eager=eager)
    except BudgetError as error:
        assert error.smallest_bytes > ram_bytes
        return
    scratch = scratch_bytes((numel for unit in units for numel in unit.slice_numels), 1)
    frames = found.parameter_frames + found.state_frames
    assert found.gradient_bytes + scratch + frames * PAGE_BYTES <= ram_bytes
    sizes = slice_frames(model, masters=not found.resident)
    assert least_frames(sizes) <= found.state_frames <= sum(sizes)
    every = [frames_of(unit) for unit in units]
    # One slice of states can always be looked at beside what the schedule holds.
    if found.resident:
        assert units[0].dtype is torch.float32
        assert found.parameter_frames >= sum(every) + max(sizes)
    else:
        assert found.parameter_frames >= max(2 * max(every), max(every) + max(sizes))
    assert found.gradient_bytes >= sum(unit.gradient_bytes for unit in units)


@given(model=models(), eager=st.booleans())
def test_the_smallest_budget_works_and_one_byte_less_does_not(model: Model, eager: bool) -> None:
    smallest_bytes = budget(model).smallest_bytes
    divided(model, smallest_bytes, eager=eager)
    for too_small in (0, smallest_bytes - 1):
        with pytest.raises(BudgetError) as caught:
            divided(model, too_small, eager=eager)
        assert caught.value.smallest_bytes == smallest_bytes
        said = str(caught.value)
        assert f"need {smallest_bytes} bytes" in said
        assert said.endswith(f'set memory.ram to at least {smallest_bytes}, or update.mode to "exact"')


@given(model=models(), eager=st.booleans())
def test_more_memory_never_makes_less_room_for_gradients(model: Model, eager: bool) -> None:
    units = model[0]
    total = sum(unit.gradient_bytes for unit in units)
    rich = divided(model, 1 << 30, eager=eager)
    largest = max(unit.gradient_bytes for unit in units)
    assert rich.gradient_bytes == (1 if eager else 2) * total + 2 * largest
    assert rich.resident is (units[0].dtype is torch.float32)
    assert rich.state_frames == sum(slice_frames(model, masters=not rich.resident)), "everything fits"


@given(model=models(), ram_bytes=st.integers(0, 64 << 20), eager=st.booleans())
def test_units_are_on_time_where_their_states_fit_beside_the_rest(model: Model, ram_bytes: int, eager: bool) -> None:
    units, n_states = model
    both = LockFreeBudget(units, n_states, PAGE_BYTES, n_threads=1)
    assert both.smallest_bytes == budget(model).smallest_bytes
    try:
        without = divided(model, ram_bytes, eager=eager)
    except BudgetError:
        with pytest.raises(BudgetError):
            both.divide(ram_bytes, eager=eager)
        return
    found = both.divide(ram_bytes, eager=eager)
    if not found.on_time:
        assert found == without
        return
    assert found.resident
    late = [unit for place, unit in enumerate(units) if unit.slice_numels and place not in found.on_time]
    now = [units[place] for place in found.on_time]
    states = [sum(ceil_div(4 * n_states * n, PAGE_BYTES) for n in unit.slice_numels) for unit in now]
    gradients = [0 if eager else ceil_div(unit.gradient_bytes, PAGE_BYTES) + 1 for unit in now]
    slices = slice_frames((late, n_states), masters=False)
    largest = max(slice_frames(model, masters=False))
    assert found.parameter_frames >= sum(map(frames_of, units)) + largest + sum(states) + sum(gradients)
    assert least_frames(slices) <= found.state_frames <= sum(slices)
    on_their_way = [unit.gradient_bytes for unit in late]
    assert found.gradient_bytes == (1 if eager else 2) * sum(on_their_way) + 2 * max(on_their_way, default=0)
    assert found.direct_bytes == (max(unit.gradient_bytes for unit in now) if eager else 0)
    frames = found.parameter_frames + found.state_frames
    assert found.gradient_bytes + found.direct_bytes + both.scratch_bytes + frames * PAGE_BYTES <= ram_bytes


@given(model=models(), eager=st.booleans())
def test_in_a_large_budget_every_unit_is_on_time(model: Model, eager: bool) -> None:
    units = model[0]
    found = LockFreeBudget(*model, PAGE_BYTES, n_threads=1).divide(1 << 30, eager=eager)
    trained = {place for place, unit in enumerate(units) if unit.slice_numels}
    assert found.on_time == (trained if units[0].dtype is torch.float32 else frozenset())


def test_parameters_that_do_not_fit_stream_with_masters() -> None:
    model = made([16_384] * 40, trained=40), 2
    smallest_bytes = budget(model).smallest_bytes
    smallest = divided(model, smallest_bytes, eager=True)
    assert not smallest.resident
    assert smallest.parameter_frames < 40 and smallest.state_frames == 3 * 3
    assert divided(model, smallest_bytes + 40 * PAGE_BYTES, eager=True).resident


# ---- where pages and slices grow with the budget -------------------------------------------------------------------


def config(page: int | str, dtype: str) -> Config:
    """A lock-free configuration."""
    return load_config(
        {
            "memory": {"ram": "1GiB", "page": page},
            "ssd": {"paths": ["pages"]},
            "model": {"factory": "unused:unused", "dtype": dtype},
            "update": {"mode": "lock-free"},
        }
    )


def shapes(numels: list[int], **more: Any) -> list[UnitShape]:
    """Trained units."""
    return [UnitShape(f"u{n}", n, torch.float32, True, optimized_numel=n, **more) for n in numels]


def need_at(units: list[UnitShape], these: Config, ram_bytes: int) -> int:
    """What a budget needs at its own sizes of pages and slices."""
    sizes = Sizes.of(these, ram_bytes)
    largest = max(unit.frames(sizes, 2) for unit in units) * sizes.page_bytes
    divisible = LockFreeBudget([unit.size(sizes) for unit in units], 2, sizes.page_bytes, 1).smallest_bytes
    return max(largest, divisible)


@pytest.mark.parametrize("page", [PAGE_BYTES, "auto"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "numels", [[64], [66_048] * 8, [70_016] * 3, [262_144, 4096], [1_340_032] * 4, [16_384] * 50, [43_008] * 80]
)
def test_the_smallest_budget_is_the_first_that_holds_what_it_needs_itself(
    numels: list[int], dtype: str, page: int | str
) -> None:
    units, these = shapes(numels), config(page, dtype)
    need = budget_need(lambda _: units, 2, these)
    smallest_bytes = need.smallest_bytes
    assert need_at(units, these, smallest_bytes) <= smallest_bytes <= need_at(units, these, smallest_bytes - 1)
    for ram_bytes in range(PAGE_BYTES, smallest_bytes, PAGE_BYTES):
        assert need_at(units, these, ram_bytes) > ram_bytes
    assert need.lock_free_bytes == sum(numels) * (4 if dtype == "fp32" else 2)


def test_a_larger_budget_whose_larger_slices_need_more_is_refused_with_the_next_that_works() -> None:
    units, these = shapes([262_144]), config("auto", "fp32")
    assert budget_need(lambda _: units, 2, these).smallest_bytes == 3_407_872
    budget_need(lambda _: units, 2, these, 4 * MiB - 1).check(4 * MiB - 1)
    with pytest.raises(BudgetError, match=r"need 4718592 bytes .* set memory\.ram to at least 4718592, or") as caught:
        budget_need(lambda _: units, 2, these, 4 * MiB).check(4 * MiB)
    assert need_at(units, these, caught.value.smallest_bytes) == caught.value.smallest_bytes == 4_718_592
    assert need_at(units, these, 4_718_591) > 4_718_591


def test_units_that_are_not_kept_or_not_trained_have_no_gradients() -> None:
    these = config(PAGE_BYTES, "fp32")
    trained, dropped = shapes([66_048] * 3), shapes([66_048], kept=False)
    frozen = [UnitShape("frozen", 66_048, torch.float32, False)]
    alone = budget_need(lambda _: trained, 2, these)
    assert budget_need(lambda _: trained + dropped, 2, these) == alone
    assert budget_need(lambda _: trained + frozen, 2, these).lock_free_bytes == alone.lock_free_bytes
    assert budget_need(lambda _: frozen, 2, these).lock_free_bytes == 0


def test_a_model_of_which_nothing_is_trained_needs_room_for_its_parameters() -> None:
    frozen = [UnitShape(name, 66_048, torch.float32, False) for name in "abc"]
    smallest_bytes = budget_need(lambda _: frozen, 2, config(PAGE_BYTES, "fp32")).smallest_bytes
    sizes = Sizes.of(config(PAGE_BYTES, "fp32"), smallest_bytes)
    lock_free = LockFreeBudget([unit.size(sizes) for unit in frozen], 2, PAGE_BYTES, 1)
    assert smallest_bytes == lock_free.smallest_bytes == 2 * 5 * PAGE_BYTES
    assert not lock_free.divide(smallest_bytes, eager=True).resident
