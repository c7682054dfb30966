"""Autograd functions of one's own that keep weights for their backward, in every way torch has for it: plain's bits,
and no page held after."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import full_product
from parity import adamw, compare
from small_runs import assert_closed, config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import offload

Product = Callable[[Tensor, Tensor], Tensor]


class Saving(torch.autograd.Function):
    """Saves the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        return grads[0] @ w, grads[0].t() @ x


class SavingAView(Saving):
    """Saves a view of the weight, made under no_grad."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        view = w.t()
        ctx.save_for_backward(x, view)
        return x @ view

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, view = ctx.saved_tensors
        return grads[0] @ view.t(), grads[0].t() @ x


class Keeping(Saving):
    """Keeps the weight as an attribute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.x, ctx.w = x, w
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] @ ctx.w, grads[0].t() @ ctx.x


class KeepingAView(Keeping):
    """Keeps a view of the weight as an attribute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.x, ctx.w = x, w.detach()[:]
        return x @ w.t()


class SetUp(torch.autograd.Function):
    """The style with a separate setup_context."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.t()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    backward = staticmethod(Saving.backward)


class Constant(torch.autograd.Function):
    """Uses the weight as a constant: its gradient comes from elsewhere, and may be complete before this one's
    backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] @ ctx.saved_tensors[0], None


class Addressing(Saving):
    """A kernel that is given addresses, one weight's after another's, and looks at what they show then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        address, other = w.data_ptr(), OTHERS[-1].data_ptr()
        there = [from_address(a, like) for a, like in ((address, w), (other, OTHERS[-1]))]
        ctx.save_for_backward(x, w)
        return x @ there[0].t() + 0.0 * there[1].sum()


OTHERS: list[Tensor] = []


def from_address(address: int, like: Tensor) -> Tensor:
    import ctypes

    return (
        torch.frombuffer((ctypes.c_float * like.numel()).from_address(address), dtype=torch.float32)
        .view(like.shape)
        .clone()
    )


FUNCTIONS: dict[str, Any] = {
    "saved": Saving,
    "view saved": SavingAView,
    "kept": Keeping,
    "view kept": KeepingAView,
    "set up": SetUp,
    "constant": Constant,
    "address": Addressing,
}


class Net(nn.Module):
    """Layers that share units and a large one; ``twice`` uses the first weight at both ends."""

    def __init__(self, function: Any, *, twice: bool = False, recompute: str | None = None) -> None:
        super().__init__()
        self.function, self.twice, self.recompute = function, twice, recompute
        self.small = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))
        self.up, self.down = nn.Linear(64, 512, bias=False), nn.Linear(512, 64, bias=False)
        self.norm, self.last = nn.LayerNorm(64), nn.Linear(64, 64)

    def part(self, x: Tensor, layers: list[nn.Linear]) -> Tensor:
        for layer in layers:
            x = torch.tanh(self.function.apply(x, layer.weight)) + (layer(x) if self.function is Constant else 0.0)
        return x

    def forward(self, x: Tensor) -> Tensor:
        OTHERS[:] = [self.last.weight]
        parts = [[*self.small], [self.up, self.down]] + ([[self.small[0]]] if self.twice else [])
        for layers in parts:
            if self.recompute is None:
                x = self.part(x, layers)
            else:
                x = checkpoint(self.part, x, layers, use_reentrant=self.recompute == "reentrant")
        return self.last(self.norm(x)).square().mean()


SETTINGS: dict[str, dict[str, Any]] = {
    "auto": {},
    "step": {"start": "step"},
    "clipped": {"clip_norm": 0.01},
    "lock-free": {"mode": "lock-free", "max_staleness": 0},
    "lock-free, clipped": {"mode": "lock-free", "max_staleness": 0, "clip_norm": 0.01},
}


def settings_of(update: str, device: str, folder: Path) -> dict[str, Any]:
    made = config(folder, ram=(3 << 20) if "lock-free" in update else (1 << 20), **SETTINGS[update])
    if device != "cpu":
        made["device"] = "cpu-emulated"
        made["memory"] |= {"device": (512 << 10) if device == "come and go" else (4 << 20)}
    return made


def trained_side_by_side(build: Callable[[], Net], settings: dict[str, Any], steps: int = 5) -> None:
    torch.manual_seed(7)
    plain = build()
    model, optimizer = offload.prepare(copy.deepcopy(plain), adamw, settings)
    plain_optimizer = adamw(plain.parameters())
    clip_norm = settings["update"].get("clip_norm")
    store = optimizer.engine.debug.store
    try:
        for step in range(steps):
            x = torch.randn(8, 64)
            for each, its in ((plain, plain_optimizer), (model, optimizer)):
                loss = each(x.clone().requires_grad_())
                loss.backward()
                if each is plain and clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(plain.parameters(), clip_norm)
                its.step()
                its.zero_grad()
            del loss
            OTHERS.clear()
            compare(plain, plain_optimizer, model, optimizer, f"step {step}")
            for tier in (store, store.device_tier):
                if tier is not None:
                    tier.mover.collect_leases()
                    held = [tensor.name for tensor in tier.mover.tensors.values() if tensor.pins or tensor.leases]
                    assert not held, f"step {step}: {held} are still held"
            assert not any(unit.live_views for unit in store.index.units), f"step {step}"
    finally:
        OTHERS.clear()
        optimizer.engine.close()
    assert_closed(optimizer.engine)


@pytest.mark.parametrize("update", SETTINGS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_training_has_plain_bits_and_leaves_no_page_held(name: str, update: str, tmp_path: Path) -> None:
    trained_side_by_side(lambda: Net(FUNCTIONS[name]), settings_of(update, "cpu", tmp_path))


@pytest.mark.parametrize("device", ["come and go", "at home"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_on_a_device(name: str, device: str, tmp_path: Path) -> None:
    trained_side_by_side(lambda: Net(FUNCTIONS[name]), settings_of("auto", device, tmp_path))


@full_product(name=tuple(FUNCTIONS), recompute=["reentrant", "non-reentrant"], update=["auto", "step", "lock-free"])
def test_in_a_checkpointed_region(name: str, recompute: str, update: str, tmp_path: Path) -> None:
    def run() -> None:
        trained_side_by_side(lambda: Net(FUNCTIONS[name], recompute=recompute), settings_of(update, "cpu", tmp_path))

    if (name, update) != ("address", "auto"):
        run()
        return
    # The recomputation looks at a weight of a layer whose backward is over: plain PyTorch has the old values then.
    with pytest.raises(
        RuntimeError,
        match=r"last\.weight is used in the backward pass after its gradient was complete.*update\.start = \"step\"",
    ):
        run()


@pytest.mark.parametrize("update", ["auto", "step", "lock-free"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_for_a_weight_that_is_used_twice(name: str, update: str, tmp_path: Path) -> None:
    trained_side_by_side(lambda: Net(FUNCTIONS[name], twice=True), settings_of(update, "cpu", tmp_path))


def test_a_view_that_is_only_read_between_forward_and_backward_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(7)
    plain = Net(Saving)
    model, optimizer = offload.prepare(copy.deepcopy(plain), adamw, settings_of("auto", "cpu", tmp_path))
    plain_optimizer = adamw(plain.parameters())
    for _ in range(3):
        x = torch.randn(8, 64)
        for each, its in ((plain, plain_optimizer), (model, optimizer)):
            loss = each(x)
            assert all(bool(parameter.detach().norm() >= 0) for parameter in each.parameters())
            loss.backward()
            its.step()
            its.zero_grad()
    compare(plain, plain_optimizer, model, optimizer, "in the end")
    optimizer.engine.close()


@pytest.mark.parametrize("written", [False, True])
def test_writing_through_a_view_between_forward_and_backward_is_an_error_as_in_plain_pytorch(
    written: bool, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    plain = Net(Saving)
    model, optimizer = offload.prepare(copy.deepcopy(plain), adamw, settings_of("auto", "cpu", tmp_path))
    x = torch.randn(8, 64)
    for each in (plain, model):
        loss = each(x)
        view = each.up.weight.detach()
        if written:
            view.mul_(2)
            with pytest.raises(
                RuntimeError, match="modified by an inplace operation|updated or edited since it was saved"
            ):
                loss.backward()
        else:
            loss.backward()
        del loss, view
    optimizer.engine.close()


def test_a_commit_in_the_background_has_the_values_of_its_moment(tmp_path: Path) -> None:
    """Views that kernels read while a page waits to be stored do not get in its way."""
    torch.manual_seed(7)
    plain = Net(SavingAView)
    settings = settings_of("auto", "cpu", tmp_path)
    with offload.initialize(copy.deepcopy(plain), settings, adamw) as engine:
        plain_optimizer = adamw(plain.parameters())
        for step in range(8):
            x = torch.randn(8, 64)
            for each, its in ((plain, plain_optimizer), (engine.model, engine.optimizer)):
                each(x).backward()
                its.step()
                its.zero_grad()
            if step == 4:
                engine.save("fourth", wait=False)
                expected = {key: value.clone() for key, value in plain.state_dict().items()}
        compare(plain, plain_optimizer, engine.model, engine.optimizer, "in the end")
    with offload.initialize(copy.deepcopy(plain), settings, adamw) as engine:
        assert engine.resume("fourth") is not None
        assert all(torch.equal(value, expected[key]) for key, value in engine.model.state_dict().items())
