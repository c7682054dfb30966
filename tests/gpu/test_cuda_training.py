"""Training on a CUDA device: forward and backward there, updates on the CPU, bit for bit as plain PyTorch does both."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import adamw
from small_runs import assert_closed, batches, built, config
from torch import Tensor, nn

import offload
from offload import knobs

STEPS = 8


@pytest.fixture(autouse=True)
def same_sums_every_time() -> Iterator[None]:
    """Fused attention sums its gradients in any order."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


class Plain:
    """A copy of the model on the device, and one on the CPU for its updates."""

    def __init__(self, model: nn.Module, clip_norm: float | None) -> None:
        self.model, self.clip_norm = model, clip_norm
        self.below = [nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()]
        self.optimizer = adamw(self.below)
        model.cuda()

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step; returns the loss."""
        loss: Tensor = self.model(x.cuda(), y.cuda())
        loss.backward()
        for above, below in zip(self.model.parameters(), self.below, strict=True):
            below.grad, above.grad = None if above.grad is None else above.grad.cpu(), None
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.below, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for above, below in zip(self.model.parameters(), self.below, strict=True):
                above.copy_(below)
        return loss.detach()


def on_cuda(folder: Path, device: str = "1MiB", **update: Any) -> dict[str, Any]:
    """The small run on the device."""
    made = config(folder, **update)
    return made | {"device": "cuda", "memory": made["memory"] | {"device": device, "device_states": "never"}}


def assert_same(model: nn.Module, plain: nn.Module) -> None:
    """All values equal, bit for bit, wherever they are."""
    expected = plain.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value.cpu(), expected[name].cpu()), name


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("device", ["1MiB", "64MiB"])
def test_every_step_equals_plain_torch(device: str, clip_norm: float | None, tmp_path: Path) -> None:
    plain = Plain(built(), clip_norm)
    with offload.initialize(built(), on_cuda(tmp_path, device, clip_norm=clip_norm), adamw) as engine:
        assert engine.torch_device.type == "cuda"
        for number, (x, y) in enumerate(batches(STEPS)):
            loss = engine(x.cuda(), y.cuda())
            engine.backward(loss)
            engine.step()
            assert torch.equal(loss.detach(), plain.step(x, y)), f"step {number}"
            assert_same(engine.model, plain.model)
        use = engine.memory_report().tiers["device"]
        assert use.peak_pages == use.planned_peak_pages and engine.stats().deviations == 0
    assert_closed(engine)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("device", ["3MiB", "64MiB"])
def test_units_at_home_on_the_device_are_updated_as_plain_torch_does_there(
    device: str, clip_norm: float | None, tmp_path: Path
) -> None:
    plain, made = built().cuda(), on_cuda(tmp_path, device, clip_norm=clip_norm)
    optimizer = adamw(plain.parameters())
    made["memory"]["device_states"] = "auto"
    with offload.initialize(built(), made, adamw) as engine:
        assert (engine.stats().device_units == len(engine.debug.units)) is (device == "64MiB")
        assert engine.stats().device_units > 0
        for number, (x, y) in enumerate(batches(STEPS)):
            loss = engine(x.cuda(), y.cuda())
            engine.backward(loss)
            engine.step()
            expected = plain(x.cuda(), y.cuda())
            expected.backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(plain.parameters(), clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            # Norms are added up in another order, and updates of the other units are made by the CPU's kernel.
            if clip_norm is None and device == "64MiB":
                assert torch.equal(loss.detach(), expected.detach()), f"step {number}"
                assert_same(engine.model, plain)
            else:
                assert torch.allclose(loss.detach(), expected.detach(), rtol=1e-4), f"step {number}"
        engine.save()
        kept = {name: value.clone() for name, value in engine.model.state_dict().items()}
        engine.backward(engine(x.cuda(), y.cuda()))
        engine.step()
        assert engine.resume() is not None
        assert all(torch.equal(value, kept[name]) for name, value in engine.model.state_dict().items())
    assert_closed(engine)


def test_values_are_the_same_built_under_deferred_init(tmp_path: Path) -> None:
    made = on_cuda(tmp_path)
    with offload.deferred_init(made):
        model = built()
    with offload.initialize(model, made, adamw) as engine:
        assert_same(engine.model, built())
        assert all(value.device.type == "cpu" for value in engine.model.state_dict().values()), (
            "the device need not hold all"
        )
    assert_closed(engine)


def test_a_run_goes_on_from_a_commit(tmp_path: Path) -> None:
    plain = Plain(built(), None)
    for x, y in batches(6):
        plain.step(x, y)
    made = on_cuda(tmp_path)
    for part in (slice(0, 3), slice(3, 6)):
        with offload.initialize(built(), made, adamw) as engine:
            engine.resume()
            for x, y in batches(6)[part]:
                engine.backward(engine(x.cuda(), y.cuda()))
                engine.step()
            engine.save()
            if part.stop == 6:
                assert_same(engine.model, plain.model)
        assert_closed(engine)


@pytest.mark.parametrize("limit", [0, "64KiB", "512KiB"])
def test_saved_tensors_go_to_host_pages_and_come_back(
    limit: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knobs, "LEAST_SAVED_BYTES", 1024)
    plain, made = Plain(built(), None), on_cuda(tmp_path)
    with offload.initialize(built(), made | {"memory": made["memory"] | {"activations": limit}}, adamw) as engine:
        saved = engine.debug.binder.activations
        assert saved is not None
        for number, (x, y) in enumerate(batches(STEPS + 6)):
            loss = engine(x.cuda(), y.cuda())
            assert limit or saved.bytes.now.paged
            engine.backward(loss)
            engine.step()
            assert torch.equal(loss.detach(), plain.step(x, y)), f"step {number}"
        assert_same(engine.model, plain.model)
        assert engine.stats().deviations == 0 and saved.bytes.now.saved == 0
    assert_closed(engine)


def test_saved_tensors_in_host_pages_leave_the_device_room(tmp_path: Path) -> None:
    """Without waiting for the device anywhere: memory on its way down is bounded, and used again once compute is behind
    the copy."""
    layers, width, rows = 16, 256, 4096
    tower = nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.Tanh())))
    storage_bytes = rows * width * 4
    made = on_cuda(tmp_path, device="64MiB")
    made["memory"] |= {"ram": "256MiB", "activations": 4 * storage_bytes, "recompute": "never"}
    with offload.initialize(tower, made, adamw) as engine:
        for _ in range(4):
            x = torch.randn(rows, width, device="cuda")
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            engine.backward(engine(x).square().sum())
            engine.step()
        assert torch.cuda.max_memory_allocated() - before < 10 * storage_bytes < layers * storage_bytes
    assert_closed(engine)


def test_a_layer_that_does_not_fit_leaves_the_model_on_the_cpu(tmp_path: Path) -> None:
    model = built()
    with pytest.raises(offload.BudgetError, match=r"memory\.device"):
        offload.initialize(model, on_cuda(tmp_path, device="64KiB"), adamw)
    assert all(type(p) is nn.Parameter and p.device.type == "cpu" for p in model.parameters())
    assert_same(model, built())


def test_random_numbers_of_the_device_go_on_from_a_commit(tmp_path: Path) -> None:
    with offload.initialize(built(), on_cuda(tmp_path), adamw) as engine:
        torch.cuda.manual_seed(3)
        torch.rand(5, device="cuda")
        engine.save()
        expected = torch.rand(4, device="cuda")
        torch.cuda.manual_seed(4)
        assert engine.resume() is not None
        assert torch.equal(torch.rand(4, device="cuda"), expected)
    assert_closed(engine)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_all_pinned_memory_is_in_the_budget(clip_norm: float | None, tmp_path: Path) -> None:
    """torch's own pool has nothing of ours."""
    before = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    with offload.initialize(built(), on_cuda(tmp_path, clip_norm=clip_norm), adamw) as engine:
        for x, y in batches(STEPS):
            engine.backward(engine(x.cuda(), y.cuda()))
            engine.step()
        assert torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) - before <= 64 << 10
        budget = engine.debug.store.budget
        assert budget.peak_bytes <= budget.limit_bytes
    assert_closed(engine)


def test_a_saved_tensor_that_is_changed_while_it_is_copied_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in plain PyTorch: the copy is not ordered with the change."""
    monkeypatch.setattr(knobs, "LEAST_SAVED_BYTES", 1024)

    class Edits(nn.Module):
        """Changes what its second layer has saved, long before the device comes to copying it."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 64)

        def forward(self, x: Tensor) -> Tensor:
            """(rows, 64) to a scalar."""
            hidden = torch.sigmoid(self.first(x))
            torch.cuda._sleep(50_000_000)
            y = self.second(hidden)
            with torch.no_grad():
                hidden.add_(1)
            return y.square().mean()

    made = on_cuda(tmp_path, device="4MiB")
    made["memory"] |= {"activations": "64MiB", "recompute": "never"}
    with offload.initialize(Edits(), made, adamw) as engine:
        loss = engine(torch.randn(256, 64, device="cuda"))
        saved = engine.debug.binder.activations
        assert saved is not None and saved._leaving, "it is still being copied"
        with pytest.raises(RuntimeError, match="changed by an inplace operation"):
            loss.backward()
        del loss
    assert_closed(engine)


def test_an_engine_on_another_stream_neither_commits_nor_trains(tmp_path: Path) -> None:
    made = on_cuda(tmp_path, device="64MiB")
    made["memory"]["device_states"] = "auto"
    with offload.initialize(built(), made, adamw) as engine:
        ((x, y),) = batches(1)
        engine.backward(engine(x.cuda(), y.cuda()))
        engine.step()
        with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(offload.DeviceError, match="on one stream"):
            engine.save()
        engine.save()
    assert_closed(engine)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("check", ["assert", "exit"])
def test_what_ends_a_process_is_checked_in_one_of_its_own(check: str) -> None:
    """An assertion in a kernel, then close; and a program that does not close its engine."""
    root = Path(__file__).resolve().parent.parent.parent
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--only", check],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
