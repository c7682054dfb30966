"""Parameters and states between backward and step, where plain PyTorch has the old ones, and `optimizer.state`, which
is in pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pairwise import full_product
from torch import Tensor, nn

import offload

Use = Callable[[nn.Module, list[float]], None]


def _edit(model: nn.Module, seen: list[float]) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)


def _edit_one(model: nn.Module, seen: list[float]) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(model[1].parameters()), 0.5)  # type: ignore[index]


def _read(model: nn.Module, seen: list[float]) -> None:
    with torch.no_grad():
        seen.extend(float(parameter.sum()) for parameter in model.parameters())


def _evaluate(model: nn.Module, seen: list[float]) -> None:
    with torch.no_grad():
        seen.append(float(model(torch.ones(2, 64)).sum()))


def _state_dict(model: nn.Module, seen: list[float]) -> None:
    with torch.no_grad():
        seen.extend(float(value.sum()) for value in model.state_dict().values())


USES: dict[str, Use] = {
    "edit": _edit,
    "edit one": _edit_one,
    "read": _read,
    "evaluate": _evaluate,
    "state_dict": _state_dict,
}


def _make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


def _config(folder: Path, **update: object) -> dict[str, object]:
    return {"memory": {"ram": "2MiB"}, "ssd": {"paths": [str(folder)]}, "update": update}


def _factory(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)  # type: ignore[arg-type]


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, use: Use, first: int, accumulation: int = 1
) -> tuple[dict[str, Tensor], list[float]]:
    seen: list[float] = []
    for step in range(4):
        for micro in range(accumulation):
            model(torch.full((2, 64), 1.0 + step + micro)).square().mean().backward()
            if step >= first:
                use(model, seen)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}, seen


def _make_uses(kind: str) -> Use:
    # A Sequential's second entry here is a Tanh: the layer to edit is the third.
    return (lambda model, seen: _edit_one(model[1:], seen)) if kind == "edit one" else USES[kind]  # type: ignore[index]


@full_product(
    accumulation=[1, 2],
    update={"auto": {"start": "auto"}, "step": {"start": "step"}, "clipped": {"start": "auto", "clip_norm": 1e9}},
    kind=tuple(USES),
)
def test_a_loop_that_uses_parameters_before_each_step_has_plain_bits(
    kind: str, update: dict[str, object], accumulation: int, tmp_path: Path
) -> None:
    use = _make_uses(kind)
    plain = _make()
    expected = _train(plain, _factory(plain.parameters()), use, 0, accumulation)
    model, optimizer = offload.prepare(_make(), _factory, _config(tmp_path / "pages", **update))
    with optimizer.engine:  # type: ignore[attr-defined]
        weights, seen = _train(model, optimizer, use, 0, accumulation)
    assert seen == expected[1]
    assert all(torch.equal(weights[name], value) for name, value in expected[0].items())


@pytest.mark.parametrize("kind", USES)
def test_a_first_use_in_a_later_step_is_refused_once_its_update_was_made(kind: str, tmp_path: Path) -> None:
    model, optimizer = offload.prepare(_make(), _factory, _config(tmp_path / "pages"))
    with optimizer.engine:  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match=r'between backward and step.*update\.start = "step".*abandon_step'):
            _train(model, optimizer, _make_uses(kind), 2)
        optimizer.step()
        optimizer.zero_grad()
        _train(model, optimizer, lambda model, seen: None, 0)


def test_a_commit_or_the_states_between_backward_and_step_are_refused(tmp_path: Path) -> None:
    model, optimizer = offload.prepare(_make(), _factory, _config(tmp_path / "pages"))
    with optimizer.engine as engine:  # type: ignore[attr-defined]
        _train(model, optimizer, lambda model, seen: None, 0)
        model(torch.ones(2, 64)).square().mean().backward()
        for call in (
            engine.save,
            optimizer.state_dict,
            lambda: optimizer.load_state_dict({"state": {}, "param_groups": []}),
        ):
            with pytest.raises(RuntimeError, match=r"step under way.*optimizer\.step\(\)"):
                call()
        optimizer.step()
        assert engine.save() == 1


def test_the_mapping_of_states_is_refused_and_a_reset_by_state_dict_has_plain_bits(tmp_path: Path) -> None:
    def reset(optimizer: torch.optim.Optimizer) -> None:
        state = optimizer.state_dict()
        state["state"] = {}
        optimizer.load_state_dict(state)

    plain = _make()
    plain_optimizer = _factory(plain.parameters())
    _train(plain, plain_optimizer, lambda model, seen: None, 0)
    reset(plain_optimizer)
    expected, _ = _train(plain, plain_optimizer, lambda model, seen: None, 0)
    model, optimizer = offload.prepare(_make(), _factory, _config(tmp_path / "pages"))
    with optimizer.engine:  # type: ignore[attr-defined]
        _train(model, optimizer, lambda model, seen: None, 0)
        for touch in (
            lambda: optimizer.state.clear(),
            lambda: optimizer.state[model[0].weight],
            lambda: setattr(optimizer, "state", {}),
        ):
            with pytest.raises(RuntimeError, match=r"states are in pages.*load_state_dict\(\)"):
                touch()
        reset(optimizer)
        weights, _ = _train(model, optimizer, lambda model, seen: None, 0)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
