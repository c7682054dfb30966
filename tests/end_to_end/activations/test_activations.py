"""Saved tensors beyond `memory.activations` go to pages and come back: the results are plain PyTorch's, bit for bit."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import every_third
from parity import Parity, adamw, state_bytes
from tiny_models import CASES
from torch import Tensor, nn
from towers import paged, saved_by

import offload
from offload import knobs
from pagemem.tier import Tag

BATCH, WIDTH, DEPTH = 64, 64, 4
LAYER_BYTES = BATCH * WIDTH * 4


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs, "LEAST_SAVED_BYTES", 1024)


@every_third(1, name=tuple(CASES), limit=[0, "64KiB"], update={"whole": (None, 1), "clipped and accumulated": (0.5, 3)})
def test_steps_equal_plain_torch(name: str, limit: int | str, update: tuple[float | None, int], tmp_path: Path) -> None:
    clip_norm, accumulation = update
    parity = Parity(
        CASES[name],
        tmp_path,
        state_bytes(CASES[name]) // 2 + (1 << 20),
        clip_norm,
        accumulation,
        memory={"activations": limit},
    )
    parity.run()
    planned = Parity(
        CASES[name], tmp_path, parity.ram, clip_norm, each_step=False, steps=9, memory={"activations": limit}
    )
    stats = planned.run()
    assert stats.deviations == 0
    assert stats.planned_steps >= planned.steps - 3, (
        "the first pass that knows how much is saved, and the next, are traced anew"
    )


@pytest.mark.parametrize("ram", ["24MiB", "7MiB"], ids=["resident", "streaming"])
def test_lock_free_steps_equal_plain_torch(ram: str, tmp_path: Path) -> None:
    n_bytes = int(ram.removesuffix("MiB")) << 20
    extra = {"mode": "lock-free", "max_staleness": 0}
    Parity(CASES["gpt"], tmp_path, n_bytes, memory={"activations": 0}, extra=extra).run()


class Tower(nn.Module):
    """Linear layers, each followed by a tanh that saves its result."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        """(BATCH, WIDTH) to the same."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@contextmanager
def tower(folder: Path, limit: int | None) -> Iterator[tuple[offload.Engine, nn.Module, Tensor]]:
    """An engine, the same model without one, and a batch."""
    torch.manual_seed(7)
    plain = Tower()
    with paged(plain, folder, limit) as engine:
        yield engine, plain, torch.randn(BATCH, WIDTH)


def test_no_more_than_the_limit_stays(tmp_path: Path) -> None:
    limit = 2 * LAYER_BYTES
    with tower(tmp_path, limit) as (engine, _, x):
        saved = saved_by(engine)
        for step in range(5):
            result = engine(x)
            assert saved.bytes.now.saved == DEPTH * LAYER_BYTES + LAYER_BYTES, "the input and each layer's result, once"
            kept = saved.bytes.now.saved - saved.bytes.now.paged
            assert kept <= limit
            assert step == 0 or kept == limit, "more than the limit asks for went to pages"
            result.sum().backward()
            del result
            assert (saved.bytes.now.saved, saved.bytes.now.paged) == (0, 0)
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        assert engine.stats().deviations == 0
        engine.save()
        tagged = [t for t in engine.debug.mover.tensors.values() if t.tag is Tag.ACTIVATION]
        assert tagged and not any(t.ssd_valid and t.snapshot_pending for t in tagged)
        assert all("saved tensor" not in name for name in engine.debug.committer.commits[1].copies)


def test_a_graph_that_is_kept_can_be_used_twice(tmp_path: Path) -> None:
    with tower(tmp_path, 0) as (engine, plain, x):
        (loss, same) = engine(x).sum(), plain(x).sum()
        for _ in range(2):
            loss.backward(retain_graph=True)
            same.backward(retain_graph=True)
        del loss
        engine.optimizer.step()
        optimizer = adamw(plain.parameters())
        optimizer.step()
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in engine.model.state_dict().items())
        assert saved_by(engine).bytes.now.saved == 0


@pytest.mark.parametrize("kept", [False, True])
def test_a_backward_pass_that_fails_while_bytes_come_back_never_gives_wrong_gradients(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a storage is back and its pages are free: asking again is an error, unless the graph, and so the pages,
    were kept."""
    with tower(tmp_path, 0) as (engine, plain, _):
        x = torch.randn(32 * BATCH, WIDTH)
        loss, same = engine(x).sum(), plain(x).sum()
        driver = engine.debug.driver
        begin, seen = driver.begin, []

        def failing(key: Any, name: str, accesses: Any) -> Any:
            seen.append(key[1][0] == "saved")
            if sum(seen) == 3:
                raise MemoryError("not now")
            return begin(key, name, accesses)

        with monkeypatch.context() as patched:
            patched.setattr(driver, "begin", failing)
            with pytest.raises(MemoryError, match="not now"):
                loss.backward(retain_graph=kept)
        if kept:
            loss.backward()
            same.backward()
            adamw(plain.parameters()).step()
            engine.optimizer.step()
            engine.optimizer.zero_grad()
            assert all(
                torch.equal(value, plain.state_dict()[name]) for name, value in engine.model.state_dict().items()
            )
        else:
            with pytest.raises(RuntimeError, match="run the forward pass again"):
                loss.backward()
        del loss
        gc.collect()
        assert saved_by(engine).bytes.now.saved == 0


def test_a_graph_that_is_dropped_gives_its_pages_back(tmp_path: Path) -> None:
    with tower(tmp_path, 0) as (engine, _, x):
        saved = saved_by(engine)
        for _ in range(3):
            result = engine(x)
            assert saved.bytes.now.paged
            del result
            gc.collect()
            assert (saved.bytes.now.saved, saved.bytes.now.paged) == (0, 0)
        for _ in range(3):
            engine(x).sum().backward()
        assert sum(map(len, saved._pool.values())) == DEPTH + 1, "pages that were given back are not used again"


@pytest.mark.parametrize("limit", [None, 0, 1 << 30])
@pytest.mark.parametrize("layer", range(DEPTH))
def test_what_was_changed_in_place_is_an_error_as_in_plain_torch(limit: int | None, layer: int, tmp_path: Path) -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        for number, own in enumerate(model.layers):  # type: ignore[arg-type]
            x = torch.tanh(own(x))
            if number == layer:
                with torch.no_grad():
                    x.mul_(2)
        return x

    with tower(tmp_path, limit) as (engine, plain, x):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            forward(plain, x).sum().backward()
        engine(x).sum().backward()
        with engine.debug.binder.save_hooks(), pytest.raises(RuntimeError, match="changed by an inplace operation"):
            forward(engine.model, x).sum().backward()


def test_backward_after_close_says_so(tmp_path: Path) -> None:
    with tower(tmp_path, 0) as (engine, _, x):
        result = engine(x)
        engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            result.sum().backward()
