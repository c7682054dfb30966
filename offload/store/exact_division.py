"""How exact mode divides ``memory.ram``: gradients in use | gradients on their way from a device | arena."""

from __future__ import annotations

from offload.store.page_store import PageStore
from optim.unit import Unit
from pagemem.errors import BudgetError
from pagemem.units import format_bytes


def settle_sizes(store: PageStore, *, direct: bool, on_their_way: bool = False) -> tuple[int, int]:
    """Once all units are known: cut the gradients outside the arena out of its share of the budget.

    Args:
        direct: whether gradients are ever used as autograd made them.
        on_their_way: whether some are on their way down from a device.

    Returns:
        Bytes for gradients in use, and for gradients on their way: as many as the largest unit has, or 0 where
        there is no room for that.

    Raises:
        BudgetError: the run's commits were made with a larger budget, and this one cannot go on from them.
    """
    need_frames, ram_bytes = max(map(_update_frames, store.index.units)), store.config.memory.ram
    if need_frames > ram_bytes // store.page_bytes:
        if not store.earlier.whole:
            raise AssertionError(f"an update needs {need_frames} pages, which the check of the budget has not seen")
        smallest_bytes = need_frames * store.page_bytes
        raise BudgetError(
            f"memory.ram is {ram_bytes} bytes ({format_bytes(ram_bytes)}), but the commits in "
            f"{store.earlier.folder.path} were made with more, and their optimizer states are cut accordingly: "
            f"going on from them needs at least {smallest_bytes} bytes ({format_bytes(smallest_bytes)})",
            smallest_bytes,
        )
    largest_bytes, left_bytes = max(unit.gradient_bytes for unit in store.index.units), ram_bytes
    given_bytes: list[int] = []
    for wanted in (direct, on_their_way):
        fits = wanted and (left_bytes - largest_bytes) // store.page_bytes >= need_frames
        given_bytes.append(largest_bytes if fits else 0)
        left_bytes -= given_bytes[-1]
    store.resize_arena(left_bytes // store.page_bytes)
    return given_bytes[0], given_bytes[1]


def _update_frames(unit: Unit) -> int:
    """Pages that a unit's update needs at once."""
    parts = [sum(t.n_frames for t in (part.states, part.master) if t is not None) for part in unit.slices]
    gradients = unit.parameters.n_frames if unit.trained else 0
    return unit.parameters.n_frames + gradients + max(parts)
