"""Torch's compilers and transforms around a model in pages: refused in one line, or as in plain PyTorch; training goes
on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bound_runs import AT, Run, assert_alike, bound_early
from parity import adamw
from small_runs import assert_closed, assert_equal, config
from torch import Tensor, nn

import offload

COMPILED = "cannot be compiled, traced or exported by torch .*; call it as it is, or compile copy.deepcopy"


class Part(nn.Module):
    """A block that is a frame of its own for the compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)) + x


def built() -> nn.Sequential:
    """Always the same."""
    torch.manual_seed(7)
    return nn.Sequential(Part(), nn.Linear(64, 64), Part())


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[nn.Sequential, nn.Sequential]]:
    """A model in pages and a plain one, which train alike afterwards."""
    model, plain = built(), built()
    optimizer = adamw(plain.parameters())
    with offload.initialize(model, config(tmp_path), adamw) as engine:
        yield model, plain
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            x = torch.randn(4, 64, generator=generator)
            engine.backward(model(x).square().mean())
            engine.step()
            plain(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_equal(model, plain)
    assert_closed(engine)
    torch.compiler.reset()


def by_compile(model: nn.Module, x: Tensor) -> Any:
    return torch.compile(model, backend="eager")(x)


def in_one_graph(model: nn.Module, x: Tensor) -> Any:
    return torch.compile(model, backend="eager", fullgraph=True)(x)


def without_gradients(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return torch.compile(model, backend="eager")(x)


def a_function(model: nn.Module, x: Tensor) -> Any:
    @torch.compile(backend="eager")  # type: ignore[untyped-decorator]
    def step(x: Tensor) -> Tensor:
        return torch.as_tensor(model(x).square().mean())

    return step(x)


def a_part(model: nn.Module, x: Tensor) -> Any:
    model.get_submodule("0").compile(backend="eager")
    try:
        return model(x)
    finally:
        model.get_submodule("0")._compiled_call_impl = None


def a_part_in_place(model: nn.Module, x: Tensor) -> Any:
    whole = model.get_submodule("2")
    model._modules["2"] = torch.compile(whole, backend="eager")
    try:
        return model(x)
    finally:
        model._modules["2"] = whole


@pytest.mark.parametrize("compile_", [by_compile, in_one_graph, without_gradients, a_function, a_part, a_part_in_place])
def test_torch_compile_is_refused_in_one_line(
    compile_: Callable[..., Any], pair: tuple[nn.Sequential, nn.Sequential]
) -> None:
    model, _ = pair
    for _ in range(2):  # It does not forget.
        with pytest.raises(RuntimeError, match=COMPILED) as caught:
            compile_(model, torch.randn(4, 64))
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures(bound_early.__name__)
@pytest.mark.parametrize("in_place", [True, False])
def test_a_part_whose_parameters_are_bound_between_uses_is_refused_too(tmp_path: Path, in_place: bool) -> None:
    """They look ordinary to the compiler."""
    ours, plain = Run(tmp_path), Run(None)
    assert ours.train(0, AT) == plain.train(0, AT)
    part = ours.model.up
    if in_place:
        part.compile(backend="eager")
    else:
        ours.model._modules["up"] = torch.compile(part, backend="eager")
    for _ in range(2):
        assert ours.is_bound
        with pytest.raises(RuntimeError, match=f"^up: .*{COMPILED}") as caught:
            ours.loss(AT)
        assert "\n" not in str(caught.value)
    part._compiled_call_impl = None
    ours.model._modules["up"] = part
    assert ours.train(AT) == plain.train(AT)
    assert_alike(ours, plain)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "compile_",
    [
        lambda model, x: torch.jit.script(model),
        lambda model, x: torch.jit.script(model[1]),
        lambda model, x: torch.jit.trace(model, (x,)),
        lambda model, x: torch.jit.trace(model[1], (x,)),
        lambda model, x: torch.export.export(model, (x,)),
    ],
)
def test_torch_jit_and_torch_export_are_refused_in_one_line(
    compile_: Callable[..., Any], pair: tuple[nn.Sequential, nn.Sequential]
) -> None:
    with pytest.raises(RuntimeError, match=COMPILED) as caught:
        compile_(pair[0], torch.randn(4, 64))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "transform",
    [
        lambda model, x: torch.func.grad(lambda x: model(x).sum())(x),
        lambda model, x: torch.func.jvp(model, (x,), (x,)),
        lambda model, x: torch.func.jacrev(model)(x[0]),
        lambda model, x: torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))(x),
        lambda model, x: torch.func.grad(lambda w: torch.func.functional_call(model, w, (x,)).sum())(
            dict(model.named_parameters())
        ),
    ],
)
def test_derivatives_by_torch_func_are_refused_in_one_line(
    transform: Callable[..., Any], pair: tuple[nn.Sequential, nn.Sequential]
) -> None:
    with pytest.raises(
        RuntimeError, match=r"torch.func.grad, vjp, jvp .* use torch.autograd, or give them copy.deepcopy\(model\)"
    ) as caught:
        transform(pair[0], torch.randn(4, 64))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "use",
    [
        lambda model, x: torch.func.vmap(model)(x),
        lambda model, x: torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x),
        lambda model, x: torch.func.functional_call(model, dict(model.named_parameters()), (x,)),
        lambda model, x: torch.func.functional_call(
            model, {name: parameter * 2 for name, parameter in model.named_parameters()}, (x,)
        ),
        lambda model, x: torch.func.functional_call(model, {"1.weight": nn.Parameter(torch.ones(64, 64))}, (x,)),
        lambda model, x: torch.func.stack_module_state([model, model])[0]["1.weight"],
        lambda model, x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False),
        lambda model, x: torch.fx.symbolic_trace(model)(x),
        lambda model, x: torch.export.export(model[1], (x,)).module()(x),  # It keeps the parameters themselves.
    ],
)
def test_other_ways_to_call_a_model_are_those_of_plain_torch(
    use: Callable[..., Any], pair: tuple[nn.Sequential, nn.Sequential]
) -> None:
    x = torch.randn(4, 64)
    found, expected = (use(model, x) for model in pair)
    assert torch.equal(found, expected)


def test_gradients_of_a_functional_call_are_those_of_plain_torch(pair: tuple[nn.Sequential, nn.Sequential]) -> None:
    x, gradients = torch.randn(4, 64), []
    for model in pair:
        scale = torch.tensor(2.0, requires_grad=True)
        with_weights = {name: parameter.detach() * scale for name, parameter in model.named_parameters()}
        gradients.append(
            torch.autograd.grad(torch.func.functional_call(model, with_weights, (x,)).square().mean(), scale)[0]
        )
    assert torch.equal(*gradients)


def compiled_part() -> nn.Module:
    """A model with one block compiled."""
    return nn.Sequential(Part(), torch.compile(Part(), backend="eager"))


def compiled_in_place() -> nn.Module:
    """A model whose block compiles itself when it is called."""
    model = built()
    model[2].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.compile(built(), backend="eager"), "the model is compiled by torch.compile"),
        (compiled_part, "1 is compiled by torch.compile"),
        (compiled_in_place, "2 is compiled by torch.compile"),
        (lambda: torch.jit.trace(built(), (torch.randn(4, 64),)), "the model is made by torch.jit"),
    ],
)
def test_a_model_that_is_compiled_already_is_refused_before_it_is_paged(
    make: Callable[[], nn.Module], said: str, tmp_path: Path
) -> None:
    model = make()
    with pytest.raises(ValueError, match=f"^{said}") as caught:
        offload.prepare(model, adamw, config(tmp_path))
    assert "\n" not in str(caught.value) and "give the" in str(caught.value) and not list(tmp_path.glob("**/pages.bin"))
    torch.compiler.reset()


def test_a_compiled_part_without_parameters_trains_as_in_plain_pytorch(tmp_path: Path) -> None:
    def with_gelu() -> nn.Module:
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(64, 64), torch.compile(nn.GELU(), backend="eager"), nn.Linear(64, 64))

    model, plain, x = with_gelu(), with_gelu(), torch.randn(4, 64)
    ours = adamw(plain.parameters())
    with offload.initialize(model, config(tmp_path), adamw) as engine:
        engine.backward(model(x).square().mean())
        engine.step()
        plain(x).square().mean().backward()
        ours.step()
        assert_equal(model, plain)
    torch.compiler.reset()
