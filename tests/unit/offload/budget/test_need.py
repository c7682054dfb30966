"""What units need of the budget, worked by hand, and the smallest budget found by trying all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairwise import full_product
from torch import nn

from offload.budget.need import BudgetNeed, Sizes, UnitShape, budget_need
from offload.config import Config
from offload.config_loading import load_config
from offload.parameters.grouping import Neighbours, groups_of, units_of
from pagemem.errors import BudgetError

KiB, MiB = 1 << 10, 1 << 20
PAGE_BYTES = 64 * KiB


def config(page: int | str = PAGE_BYTES, dtype: str = "fp32", **more: Any) -> Config:
    """A configuration with a page size and a dtype to compute in."""
    model = {"factory": "unused:unused", "dtype": dtype}
    return load_config({"memory": {"ram": "1GiB", "page": page}, "ssd": {"paths": ["pages"]}, "model": model, **more})


def sizes(dtype: str = "fp32") -> Sizes:
    """Sizes of a budget so small that slices have 16,384 elements, which is a page."""
    return Sizes.of(config(dtype=dtype), 256 * KiB)


@pytest.mark.parametrize(
    ("dtype", "compute", "trained", "kept", "n_states", "frames"),
    [
        # Three slices of at most 17,408 elements: 68KiB, two pages for each state.
        (torch.float32, "fp32", True, True, 2, 4 + 4 + 3),
        (torch.float32, "fp32", True, True, 1, 4 + 4 + 2),
        (torch.float32, "fp32", True, True, 0, 4 + 4),
        (torch.float32, "fp32", False, True, 2, 4),
        (torch.float32, "fp32", True, False, 2, 4),
        # Two pages each for 16-bit parameters and gradients, and masters beside the states; built in 32 bits.
        (torch.float32, "bf16", True, True, 2, 2 + 2 + 2 + 3),
        (torch.float32, "bf16", True, True, 0, 4 + 2),
        (torch.float32, "bf16", False, True, 2, 4 + 2),
        (torch.float32, "bf16", False, False, 2, 4),
        (torch.bfloat16, "fp32", True, True, 2, 2 + 2 + 2 + 3),
        (torch.bfloat16, "bf16", False, True, 2, 2),
    ],
)
def test_pages_of_a_unit_worked_by_hand(
    dtype: torch.dtype, compute: str, trained: bool, kept: bool, n_states: int, frames: int
) -> None:
    unit = UnitShape("unit", 3 * 17408, dtype, trained, kept)
    assert unit.frames(sizes(compute), n_states) == frames


def test_slices_grow_with_budgets_that_hold_thousands_of_them() -> None:
    in_exact_mode = {gib: Sizes.of(config("auto"), gib << 30).slice_numel for gib in (1, 7, 8, 100, 256, 2000)}
    assert in_exact_mode == {1: 1 << 20, 7: 1 << 20, 8: 1 << 21, 100: 1 << 24, 256: 1 << 25, 2000: 1 << 25}


@full_product(
    numel=[64, 16_384, 70_016, 1_100_032, 2_015_000, 1_340_032, 1_600_000, 2_700_032],
    dtype=["fp32", "bf16"],
    page=[PAGE_BYTES, "auto"],
)
def test_the_smallest_budget_is_the_first_of_all_that_holds_what_it_needs_itself(
    numel: int, dtype: str, page: int | str
) -> None:
    units = [UnitShape("small", 4096, torch.float32, True), UnitShape("large", numel, torch.float32, True)]
    need = budget_need(lambda _: units, 2, config(page, dtype))

    def fits(ram_bytes: int) -> bool:
        these = Sizes.of(config(page, dtype), ram_bytes)
        return max(unit.frames(these, 2) for unit in units) * these.page_bytes <= ram_bytes

    first = next(n_pages for n_pages in range(1, 1000) if fits(n_pages * PAGE_BYTES))
    assert need.smallest_bytes == first * PAGE_BYTES
    assert need.unit == ("large" if numel > 4096 else "small") and need.unit_bytes == 4 * max(numel, 4096)


def test_larger_pages_of_larger_budgets_are_seen() -> None:
    unit = UnitShape("unit", 2_015_000, torch.float32, True)
    need = budget_need(lambda _: [unit], 2, config("auto"))
    at_64_KiB = unit.frames(Sizes.of(config("auto"), 8 * MiB), 2) * PAGE_BYTES
    assert at_64_KiB > 16 * MiB and Sizes.of(config("auto"), need.smallest_bytes).page_bytes == 2 * PAGE_BYTES
    assert need.smallest_bytes > at_64_KiB


def test_a_budget_that_is_too_small_is_refused_with_unit_and_numbers() -> None:
    need = BudgetNeed("blocks.3.up", 264_192, 851_968)
    need.check(851_968)
    with pytest.raises(BudgetError) as caught:
        need.check(851_967)
    assert caught.value.smallest_bytes == 851_968
    for part in ("memory.ram is 851967 bytes", "blocks.3.up (264192 bytes", "needs 851968 bytes", "at least 851968"):
        assert part in str(caught.value)


# ---- neighbours ----------------------------------------------------------------------------------------------------


def test_small_neighbours_of_one_dtype_share_units_up_to_a_page() -> None:
    model = nn.ModuleDict(
        {
            "a": nn.Linear(64, 100),
            "b": nn.Linear(64, 100),
            "c": nn.Linear(64, 100),
            "big": nn.Linear(128, 128),
            "d": nn.Linear(8, 8),
            "narrow": nn.Linear(8, 8).bfloat16(),
            "e": nn.Linear(8, 8),
            "f": nn.LayerNorm(8),
        }
    )
    units = units_of(groups_of(model.named_modules(), set()), PAGE_BYTES)
    assert [list(dict.fromkeys(name.partition(".")[0] for name, _ in unit)) for unit in units] == [
        ["a", "b"], ["c"], ["big"], ["d", "e", "f"], ["narrow"],
    ]  # fmt: skip


def test_a_parameter_enters_once() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    groups = groups_of([("first", first), ("second", second), ("again", first)], set())
    assert [[name for name, _ in group] for group in groups] == [["first.weight", "first.bias"], ["second.bias"]]
    assert [len(unit) for unit in units_of(groups, PAGE_BYTES)] == [3]


def test_what_waits_is_known() -> None:
    neighbours, layer = Neighbours(PAGE_BYTES), nn.Linear(8, 8)
    (group,) = groups_of([("", layer)], set())
    assert neighbours.take(group) == [] and layer.weight in neighbours and nn.Parameter(layer.weight) not in neighbours
    assert neighbours.flush() == [group] and layer.weight not in neighbours and neighbours.flush() == []
