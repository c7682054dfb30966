"""Loops as people write them that look at gradients or change them. Each runs as it is on a plain model and on a paged
one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 4
WIDTH = 128

#: Trains for some steps, and returns what the loop has seen of gradients.
Loop = Callable[[nn.Module, torch.optim.Optimizer], list[Tensor]]


def mlp() -> nn.Sequential:
    """Four layers, always with the same weights."""
    torch.manual_seed(5)
    return nn.Sequential(*itertools.chain(*((nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))))


def fused(parameters: Any) -> torch.optim.Optimizer:
    """AdamW, so that wrong gradients show: with a large eps their size matters, too."""
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-2, weight_decay=0.1, fused=True)


def losses(model: nn.Module, count: int = STEPS) -> Iterator[Tensor]:
    """A loss for each step."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        yield model(torch.randn(8, WIDTH, generator=generator)).square().mean() * 10


def gradients(model: nn.Module) -> list[Tensor]:
    """Copies of all gradients."""
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def _each(change: Callable[[nn.Module, torch.optim.Optimizer], object]) -> Loop:
    """A loop that does something between backward and step."""

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        seen: list[Tensor] = []
        for loss in losses(model):
            loss.backward()
            found = change(model, optimizer)
            if isinstance(found, Tensor):
                seen.append(found.detach().clone())
            seen += gradients(model)
            optimizer.step()
            optimizer.zero_grad()
        return seen

    return loop


def _edit(model: nn.Module, _: torch.optim.Optimizer) -> None:
    for number, parameter in enumerate(model.parameters()):
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)
        parameter.grad *= 3
        parameter.grad.data.clamp_(-0.1, 0.1)
        parameter.grad[0] += number
        parameter.grad.view(-1)[1:3].add_(parameter.detach().view(-1)[1:3], alpha=0.1)
        if number % 2:
            parameter.grad = parameter.grad * 0.25


def _drop_some(model: nn.Module, _: torch.optim.Optimizer) -> None:
    for parameter in list(model.parameters())[::3]:
        parameter.grad = None


def _autograd_grad(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters, seen = list(model.parameters()), []
    for loss in losses(model):
        found = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        found[0].mul_(0.5)  # It is the parameter's gradient, not a copy of it.
        seen += gradients(model)
        optimizer.step()
        seen += gradients(model)
        optimizer.zero_grad()
    return seen


def _logging(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    seen: list[Tensor] = []
    for loss in losses(model):
        loss.backward()
        seen += [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
        optimizer.step()
        seen += gradients(model)
        seen += [
            torch.from_numpy(parameter.grad.detach().cpu().numpy().copy())
            for parameter in model.parameters()
            if parameter.grad is not None
        ]
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())
    return seen


def _never_cleared(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    for loss in losses(model):
        loss.backward()
        optimizer.step()
    return gradients(model)


def _cleared(clear: Callable[[nn.Module, torch.optim.Optimizer], None], *, when: str) -> Loop:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        for loss in losses(model):
            if when == "before backward":
                clear(model, optimizer)
            loss.backward()
            optimizer.step()
            if when == "after step":
                clear(model, optimizer)
        return []

    return loop


def _cleared_first(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    batches = losses(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        next(batches).backward()
        optimizer.step()
    return []


def _model_zero_grad(model: nn.Module, _: torch.optim.Optimizer) -> None:
    model.zero_grad()


def _submodules_zero_grad(model: nn.Module, _: torch.optim.Optimizer) -> None:
    for child in model.children():
        child.zero_grad(set_to_none=False)


def _by_hand(model: nn.Module, _: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()


def _zeros_then_unused(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Zeros are gradients: a layer that gets none decays, and its momentum goes on."""
    assert isinstance(model, nn.Sequential)
    for number, (loss, part) in enumerate(zip(losses(model), losses(model[2:]), strict=True)):
        (part if number % 2 else loss).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return gradients(model)


def _scaler(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)
    seen: list[Tensor] = []
    for number, loss in enumerate(losses(model, 5)):
        scaler.scale(loss if number != 2 else loss * 1e38).backward()
        scaler.unscale_(optimizer)
        seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5) if number != 2 else torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.append(torch.tensor(scaler.get_scale()))
    return seen


def _skipping(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    for number, loss in enumerate(losses(model, 5)):
        loss.backward()
        if number % 2:
            model.zero_grad()
        else:
            optimizer.step()
            optimizer.zero_grad()
    return []


def _clip(**arguments: Any) -> Loop:
    return _each(lambda model, _: nn.utils.clip_grad_norm_(model.parameters(), 0.5, **arguments))


def _clip_value(**arguments: Any) -> Loop:
    return _each(lambda model, _: nn.utils.clip_grad_value_(model.parameters(), 0.05, **arguments))


LOOPS: dict[str, Loop] = {
    "torch.autograd.grad": _autograd_grad,
    "edits": _each(_edit),
    "grad = None": _each(_drop_some),
    "clip_grad_norm_": _clip(),
    "clip_grad_norm_, foreach": _clip(foreach=True),
    "clip_grad_norm_, one by one": _clip(foreach=False),
    "clip_grad_norm_, inf": _clip(norm_type=float("inf")),
    "clip_grad_value_": _clip_value(),
    "clip_grad_value_, foreach": _clip_value(foreach=True),
    "GradScaler": _scaler,
    "logging": _logging,
    "never cleared": _never_cleared,
    "cleared first": _cleared_first,
    "cleared before backward": _cleared(lambda _, optimizer: optimizer.zero_grad(), when="before backward"),
    "zeros": _cleared(lambda _, optimizer: optimizer.zero_grad(set_to_none=False), when="after step"),
    "model.zero_grad": _cleared(_model_zero_grad, when="after step"),
    "submodules' zero_grad": _cleared(_submodules_zero_grad, when="after step"),
    "zero_ by hand": _cleared(_by_hand, when="before backward"),
    "zeros, then unused": _zeros_then_unused,
    "skipping": _skipping,
}
