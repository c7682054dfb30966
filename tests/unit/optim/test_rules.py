"""Update rules on slices of a parameter give, bit for bit, what the torch optimizer gives on the whole one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from optim.layout import SLICE_ALIGN_NUMEL, cut
from optim.rules import AdamRule, Batch, SGDRule, UpdateRule, rule_for

Parameters = list[torch.nn.Parameter]
STEPS = 5

OPTIMIZERS: dict[str, Callable[[Parameters], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw maximize": lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.8, 0.95), eps=1e-6, maximize=True, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.3, weight_decay=0.1, fused=True),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, maximize=True, fused=True),
}


def update(
    rule: UpdateRule,
    group: dict[str, Any],
    flat: torch.Tensor,
    grad: torch.Tensor,
    states: list[torch.Tensor],
    slice_numel: int,
    step: int,
) -> None:
    """One update, slice by slice, each a batch of its own."""
    hyper = {name: group[name] for name in type(rule).hyper_names}
    for part in cut(flat.numel(), slice_numel):
        own = slice(part.begin, part.end)
        rule.apply(hyper, Batch([flat[own]], [grad[own].clone()], [[state[own]] for state in states], [step]))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("numel", [1, 1023, 5001, 7 * SLICE_ALIGN_NUMEL, 20 * SLICE_ALIGN_NUMEL + 13])
@pytest.mark.parametrize("slice_numel", [SLICE_ALIGN_NUMEL, 3 * SLICE_ALIGN_NUMEL, 1 << 30])
def test_slices_equal_the_whole(name: str, numel: int, slice_numel: int) -> None:
    generator = torch.Generator().manual_seed(numel)
    parameter = torch.nn.Parameter(torch.randn(numel, generator=generator))
    flat = parameter.detach().clone()
    optimizer = OPTIMIZERS[name]([parameter])
    rule = rule_for(optimizer)
    states = [torch.zeros(numel) for _ in rule.state_names]
    for step in range(STEPS):
        grad = torch.randn(numel, generator=generator) * 10.0 ** (step - 2)
        parameter.grad = grad.clone()
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.step()
        update(rule, optimizer.param_groups[0], flat, grad, states, slice_numel, step)
        assert torch.equal(flat, parameter.detach()), f"step {step}"
        for state_name, state in zip(rule.state_names, states, strict=True):
            assert torch.equal(state, optimizer.state[parameter][state_name]), f"step {step}: {state_name}"


@pytest.mark.parametrize("name", ["adamw", "sgd momentum"])
def test_pieces_with_different_numbers_of_updates_share_a_batch(name: str) -> None:
    parameters = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (1024, 500, 77)]
    flats = [parameter.detach().clone() for parameter in parameters]
    optimizers = [OPTIMIZERS[name]([parameter]) for parameter in parameters]
    rule, group = rule_for(optimizers[0]), optimizers[0].param_groups[0]
    states = [[torch.zeros(flat.numel()) for flat in flats] for _ in rule.state_names]
    counts = [0, 0, 0]
    for present in ([0], [0, 1, 2], [1], [0, 1, 2]):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.cos(parameter.detach() * 9) if number in present else None
        grads = [parameters[number].grad for number in present]
        batch = Batch(
            [flats[i] for i in present], [grad.clone() for grad in grads if grad is not None],
            [[kind[i] for i in present] for kind in states], [counts[i] for i in present],
        )  # fmt: skip
        for optimizer in optimizers:
            optimizer.step()
        rule.apply({key: group[key] for key in type(rule).hyper_names}, batch)
        for number in present:
            counts[number] += 1
        for flat, parameter in zip(flats, parameters, strict=True):
            assert torch.equal(flat, parameter.detach())


def test_each_optimizer_has_its_rule() -> None:
    weights = [torch.nn.Parameter(torch.zeros(3))]
    for torch_class in (torch.optim.AdamW, torch.optim.Adam):
        rule = rule_for(torch_class(weights, fused=True))
        assert type(rule) is AdamRule and rule.torch_class is torch_class
    without, having = (rule_for(torch.optim.SGD(weights, momentum=momentum, fused=True)) for momentum in (0.0, 0.5))
    assert isinstance(without, SGDRule) and without.state_names == ()
    assert isinstance(having, SGDRule) and having.state_names == ("momentum_buffer",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.RMSprop(p), "RMSprop does not run on pages; use one of torch.optim's AdamW, Adam, SGD"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "AdamW: amsgrad=True is not supported"),
        (lambda p: torch.optim.Adam(p, differentiable=True), "Adam: differentiable=True"),
        (lambda p: torch.optim.Adam(p, decoupled_weight_decay=True, fused=True), "Adam: decoupled_weight_decay=True"),
        (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)), "AdamW: a tensor lr is not supported"),
        (
            lambda p: torch.optim.AdamW(p, betas=(torch.tensor(0.9), torch.tensor(0.99))),
            "AdamW: a tensor betas is not supported",
        ),
        (lambda p: torch.optim.AdamW(p, capturable=True), "AdamW: capturable=True"),
        (lambda p: torch.optim.AdamW(p), "AdamW: fused=None rounds otherwise .* make it with fused=True"),
        (lambda p: torch.optim.Adam(p, foreach=True), "Adam: fused=None rounds otherwise"),
        (lambda p: torch.optim.SGD(p, fused=False), "SGD: fused=False rounds otherwise"),
        (lambda p: type("Mine", (torch.optim.AdamW,), {})(p, fused=True), "Mine does not run on pages"),
        (
            lambda p: torch.optim.SGD([{"params": p}, {"params": [], "momentum": 0.9}], fused=True),
            "either all parameter groups have",
        ),
    ],
)
def test_what_cannot_run_on_pages_is_refused(make: Callable[[Parameters], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule_for(make([torch.nn.Parameter(torch.zeros(3))]))
