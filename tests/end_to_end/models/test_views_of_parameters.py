"""Views of parameters that outlive a step or an assignment, and tensors of the user's own in ``.grad``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload


def _sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0, fused=True)


def _linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 8, bias=bias)


def _prepare(
    model: nn.Module, folder: Path, memory: dict[str, Any] | None = None, **update: Any
) -> tuple[nn.Module, Any]:
    sections: dict[str, Any] = {
        "memory": {"ram": "2MiB", **(memory or {})},
        "ssd": {"paths": [str(folder)]},
        "update": update,
    }
    if memory:
        sections["device"] = "cpu-emulated"
    return offload.prepare(model, _sgd, sections)


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> list[float]:
    view, seen = model.weight.data, []  # type: ignore[union-attr]
    for step in range(3):
        model(torch.ones(4, 64) * (step + 1) / 9).square().mean().backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(view.sum()))
        view.mul_(0.5)
    return [*seen, float(model.weight.detach().sum())]  # type: ignore[operator]


@pytest.mark.parametrize("start", ["auto", "step"])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_view_shows_each_step_and_what_is_written_to_it_counts(
    start: str, clip_norm: float | None, tmp_path: Path
) -> None:
    plain = _linear()
    expected = _steps(plain, _sgd(plain.parameters()), clip_norm)
    model, optimizer = _prepare(_linear(), tmp_path / "pages", start=start, clip_norm=clip_norm)
    with optimizer.engine:
        assert _steps(model, optimizer, None) == expected


def test_assigning_data_while_a_view_is_kept_is_refused_and_works_with_a_copy(tmp_path: Path) -> None:
    model, optimizer = _prepare(_linear(), tmp_path / "pages")
    weight: Any = model.weight
    with optimizer.engine:
        before = weight.detach().clone()
        kept = weight.data
        with pytest.raises(RuntimeError, match=r"weight: \.data is assigned while a view.*detach\(\)\.clone\(\)"):
            weight.data = torch.zeros(8, 64)
        assert torch.equal(weight, before)
        weight.data = kept  # is what it is
        del kept
        weight.data = torch.zeros(8, 64)
        assert not weight.any()
        weight.data = before
        weight.data = weight.data * 2
        assert torch.equal(weight, before * 2)


@pytest.mark.parametrize("memory", [None, {"device": "2MiB"}], ids=["cpu", "device"])
def test_a_tensor_of_ones_own_in_grad_has_the_gradient_when_backward_returns(
    memory: dict[str, Any] | None, tmp_path: Path
) -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        for _ in range(2):
            bucket = torch.zeros(8, 64)
            model.weight.grad = bucket  # type: ignore[assignment]
            model(torch.ones(4, 64)).square().mean().backward()
            bucket.mul_(0.5)
            optimizer.step()
        return model.weight.detach().clone()  # type: ignore[operator]

    plain = _linear(bias=False)
    expected = train(plain, _sgd(plain.parameters()))
    model, optimizer = _prepare(_linear(bias=False), tmp_path / "pages", memory, start="step")
    with optimizer.engine:
        assert torch.equal(train(model, optimizer), expected)


def test_a_view_that_a_module_keeps_from_before_is_refused(tmp_path: Path) -> None:
    model = _linear()
    model.first_row = model.weight.detach()[0]
    with pytest.raises(ValueError, match="first_row.*same memory"):
        _prepare(model, tmp_path / "pages")


def test_no_commit_is_made_between_micro_batches(tmp_path: Path) -> None:
    sections = {
        "memory": {"ram": "2MiB"},
        "ssd": {"paths": [str(tmp_path / "pages")]},
        "update": {"accumulation": 2},
        "commit": {"every_s": 1e-6},
    }
    with offload.initialize(_linear(), sections, _sgd) as engine:
        committed = []
        for _ in range(6):
            engine.backward(engine(torch.ones(4, 64)).square().mean())
            stepped = engine.step()
            if not stepped:
                with pytest.raises(RuntimeError, match=r"between backward and step would miss.*abandon_step"):
                    engine.save()
            committed.append((stepped, engine.save_if_due() is not None))
            engine.debug.committer.wait()
        assert committed == [(False, False), (True, True)] * 3
        engine.backward(engine(torch.ones(4, 64)).square().mean())
        resumed = engine.resume()  # gives the step under way up
        assert resumed is not None and resumed.step == 3
        assert engine.save() > resumed.number
