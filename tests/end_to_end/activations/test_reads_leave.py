"""What an op only reads it leaves as it was: its pages may be on their way to the page files meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from pairwise import full_product
from parity import Parity, state_bytes
from tiny_models import CASES

from pagemem.frames.page import TensorId
from pagemem.residency.paged_tensor import PagedTensor
from scheduler.execution.driver import Driver
from scheduler.planning.trace import Access, AccessMode, OpKey


def watch(driver: type[Driver], patch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Compare what ops of host memory read, before and after each; returns how many tensors were compared."""
    begin, end = driver.begin, driver.end
    seen: dict[int, list[tuple[PagedTensor, torch.Tensor]]] = {}
    compared = 0

    def watched_begin(self: Driver, key: OpKey, name: str, accesses: Sequence[Access]) -> list[PagedTensor]:
        held = begin(self, key, name, accesses)
        if type(self) is Driver:
            reads: set[TensorId] = {access.tensor for access in accesses if access.mode is AccessMode.READ}
            seen[id(held)] = [
                (t, self.mover_of(t).tenants.bytes_of(t).clone())
                for t in held
                if t.id in reads and not t.may_be_aliased
            ]
        return held

    def watched_end(self: Driver, held: list[PagedTensor]) -> None:
        nonlocal compared
        for tensor, before in seen.pop(id(held), []):
            assert torch.equal(self.mover_of(tensor).tenants.bytes_of(tensor), before), (
                f"{tensor.name} was only to be read and has changed"
            )
            compared += 1
        end(self, held)

    patch.setattr(driver, "begin", watched_begin)
    patch.setattr(driver, "end", watched_end)
    return lambda: compared


@full_product(
    name=["gpt", "conv", "tied"],
    clip_norm=[None, 0.5],
    accumulation=[1, 3],
    device={"two tiers": None, "three tiers": "1MiB"},
)
def test_what_an_op_reads_it_leaves_as_it_was(
    name: str,
    clip_norm: float | None,
    accumulation: int,
    device: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parity = Parity(CASES[name], tmp_path, state_bytes(CASES[name]) // 2 + (1 << 20), clip_norm, accumulation, steps=4)
    parity.memory = {} if device is None else {"device": device, "device_states": "never"}
    n_compared = watch(Driver, monkeypatch)
    parity.run()
    assert n_compared() > 0
