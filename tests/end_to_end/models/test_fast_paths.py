"""Torch's attention layers give the bits of plain PyTorch, in training and in evaluation, where they take a kernel of
their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attention_models import ROWS, TOKENS, WIDTH, Attending, Encoding
from pairwise import full_product
from parity import adamw
from small_runs import assert_closed, assert_equal, config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import offload

MODELS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "attention": (Attending, {"aten::_native_multi_head_attention"}),
    "attention with padding": (lambda: Attending(padded=True), {"aten::_native_multi_head_attention"}),
    "encoder": (Encoding, {"aten::_transformer_encoder_layer_fwd"}),
    "encoder with padding": (
        lambda: Encoding(padded=True),
        {"aten::_transformer_encoder_layer_fwd", "aten::_nested_tensor_from_mask"},
    ),
    "encoder, norm first": (lambda: Encoding(norm_first=True), {"aten::_transformer_encoder_layer_fwd"}),
}


class Names(TorchDispatchMode):
    """The kernels that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        self.seen.append(str(getattr(func, "_schema", func)).partition("(")[0].partition(".")[0])
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def kernels(model: nn.Module, x: Tensor) -> tuple[Tensor, list[str]]:
    """The result, and which kernels made it."""
    with Names() as names:
        result = torch.as_tensor(model(x))
    return result, [
        name for name in names.seen if "native_multi" in name or "encoder_layer" in name or "from_mask" in name
    ]


@full_product(mode=["no_grad", "frozen", "with gradients"], ram=["512KiB", "4MiB"], name=tuple(MODELS))
def test_evaluation_takes_the_path_that_plain_torch_takes(mode: str, ram: str, name: str, tmp_path: Path) -> None:
    build, fast = MODELS[name]
    torch.manual_seed(3)
    plain = build()
    torch.manual_seed(3)
    model = build()
    if mode == "frozen":
        for one in (plain, model):
            one.get_submodule("encoder" if isinstance(one, Encoding) else "first").requires_grad_(False)
    optimizer = adamw(plain.parameters())
    generator = torch.Generator().manual_seed(5)
    raw = config(tmp_path, start="auto" if mode == "no_grad" else "step")
    raw["memory"]["ram"] = ram
    with offload.initialize(model, raw, adamw) as engine:
        for step in range(4):
            x = torch.randn(ROWS, TOKENS, WIDTH, generator=generator)
            for one in (plain, model):
                loss = one.train()(x).square().mean()
                (engine.backward(loss) if one is model else loss.backward())
            engine.step()
            optimizer.step()
            optimizer.zero_grad()
            with torch.set_grad_enabled(mode != "no_grad"):
                expected, path = kernels(plain.eval(), x)
                found, taken = kernels(model.eval(), x)
            assert torch.equal(found, expected) and taken == path, step
            assert (mode == "with gradients") or fast <= set(path)
            assert all(isinstance(parameter, offload.PagedParameter) for parameter in model.parameters())
            if mode != "no_grad":
                found.sum().backward()
                expected.sum().backward()
                engine.optimizer.zero_grad()
                optimizer.zero_grad()
        assert_equal(model, plain)
    assert_closed(engine)


def test_an_error_inside_such_a_layer_leaves_its_parameters_paged(tmp_path: Path) -> None:
    with offload.initialize(Encoding(), config(tmp_path), adamw) as engine, torch.no_grad():
        engine.model.eval()
        with pytest.raises(RuntimeError, match="embed_dim 64"):
            engine(torch.zeros(ROWS, TOKENS, WIDTH + 1))
        for parameter in engine.model.parameters():
            assert isinstance(parameter, offload.PagedParameter) and not parameter._place.bound
    assert_closed(engine)
