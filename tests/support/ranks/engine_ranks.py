"""Engines of several ranks in one process: a thread each, whose collectives meet in memory.

Models are built before the threads begin, since torch's generator is the process's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from fake_ranks import Meeting, MemoryCollectives, on_all_ranks
from torch import Tensor, nn

import offload
from offload.parallel.shareable import check_shareable
from offload.store.store_parts import StoreParts
from pagemem.ranks.collectives import Collectives

T = TypeVar("T")


def config_of(folder: Path, ram: str, *, checksums: bool = False, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration; all ranks have the same folder, in which each makes its own."""
    return {
        "memory": {"ram": ram},
        "ssd": {"paths": [str(folder)], "checksums": checksums},
        **sections,
    }


def on_engines(n_ranks: int, monkeypatch: pytest.MonkeyPatch, body: Callable[[int], T]) -> list[T]:
    """What a body, which makes engines, returns on each rank.

    Raises:
        BaseException: what the first rank raised that did; the others are stopped.
    """
    met, own = Meeting(n_ranks), threading.local()

    def collectives(parts: StoreParts) -> Collectives | None:
        check_shareable(parts.config)
        return getattr(own, "collectives", None)

    def run(rank: int) -> T:
        own.collectives = MemoryCollectives(met, rank)
        return body(rank)

    monkeypatch.setattr(StoreParts, "collectives", collectives)
    found = on_all_ranks(met, run)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found  # type: ignore[return-value]


def gather_values(model: nn.Module) -> list[Tensor]:
    """Copies of all parameters; on all ranks."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def trained_plainly(
    model: nn.Module,
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    batches: Sequence[Sequence[Tensor]],
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    clip_norm: float | None = None,
) -> list[Tensor]:
    """The parameters of plain PyTorch that accumulates the micro-batches of each step, whose losses are divided by
    their number."""
    optimizer = make_optimizer(model.parameters())
    for step in batches:
        for batch in step:
            (loss_of(model, batch) / len(step)).backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return gather_values(model)


def trained_on_ranks(
    models: Sequence[nn.Module],
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    batches: Sequence[Sequence[Tensor]],
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    configs: Sequence[dict[str, Any]],
) -> list[list[Tensor]]:
    """The parameters of each rank's model after the same steps, of which rank r takes as many adjacent micro-batches as
    the others, from the r-th such number on."""
    n_ranks = len(models)

    def body(rank: int) -> list[Tensor]:
        with offload.Engine(models[rank], configs[rank], make_optimizer) as engine:
            for step in batches:
                own = len(step) // n_ranks
                for batch in step[rank * own : (rank + 1) * own]:
                    engine.backward(loss_of(engine.model, batch))
                assert engine.step()
            return gather_values(engine.model)

    return on_engines(n_ranks, monkeypatch, body)
