"""A model built out of pages is the one built plainly, bit for bit, and never whole in memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cross_references import check_mover
from parity import Parity, adamw, compare
from small_runs import PAGE_BYTES, assert_closed, assert_equal, built, config, train
from tiny_models import CASES, GPT, ConvNet
from torch import Tensor, nn

import offload
from offload.store.page_store import PageStore

RAM_BYTES = 1 << 20


def start_over(module: nn.Module) -> None:
    """What many models give to ``apply``."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        module.weight.data.normal_(mean=0.0, std=0.02)


class Applied(GPT):
    """Initialises itself anew once all its parts are there."""

    def __init__(self) -> None:
        super().__init__()
        self.apply(start_over)
        self.get_parameter("blocks.1.proj.weight").data.mul_(0.5)
        self.norm.weight.data = torch.randn(128)


class Tied(GPT):
    """Ties the output's weight, which was drawn and is then not needed, to the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        assert self.head is not None
        self.head.weight = self.tok.weight


class ByHand(nn.Module):
    """Parameters and buffers of its own, of all kinds, beside a child with parameters of its own."""

    shift: Tensor

    class Part(nn.Module):
        """Parameters made by torch.empty and filled afterwards."""

        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(256, 64))
            self.bias = nn.Parameter(torch.empty(256))
            self.register_buffer("scale", torch.rand(256))
            nn.init.kaiming_uniform_(self.weight, a=5**0.5)
            nn.init.uniform_(self.bias, -0.1, 0.1)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(64, 64))
        self.part = self.Part()
        self.last = nn.Parameter(torch.empty(10, 256))
        nn.init.orthogonal_(self.last)
        self.register_buffer("shift", torch.rand(64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.first + self.shift)
        hidden = F.linear(hidden, self.part.weight, self.part.bias) * self.part.scale
        return F.cross_entropy(F.linear(hidden, self.last), y)


BUILT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gpt": (GPT, "gpt"),
    "applied": (Applied, "gpt"),
    "tied": (Tied, "gpt"),
    "conv": (ConvNet, "conv"),
    "by_hand": (ByHand, "borrower"),
}


@pytest.mark.parametrize("name", BUILT)
def test_values_buffers_random_numbers_and_training_are_those_of_plain_construction(name: str, tmp_path: Path) -> None:
    build, case = BUILT[name]
    torch.manual_seed(7)
    plain = build()
    expected = torch.get_rng_state()
    torch.manual_seed(7)
    with offload.deferred_init(config(tmp_path)):
        model = build()
    assert torch.equal(torch.get_rng_state(), expected)
    with offload.initialize(model, config(tmp_path), adamw) as engine:
        assert all(isinstance(parameter, offload.PagedParameter) for parameter in model.parameters())
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
        assert_equal(model, plain)
        optimizers = adamw(plain.parameters()), engine.optimizer
        generator = torch.Generator().manual_seed(11)
        for _ in range(4):
            batch = CASES[case].batch(generator)
            for its_model, its in zip((plain, model), optimizers, strict=True):
                torch.autograd.backward([its_model(*batch)])
                its.step()
                its.zero_grad()
        compare(plain, optimizers[0], model, optimizers[1], "in the end")
    assert_closed(engine)


def test_a_model_may_be_initialised_anew_after_the_block(tmp_path: Path) -> None:
    plain = built().apply(start_over)
    expected = torch.get_rng_state()
    with offload.deferred_init(config(tmp_path)):
        model = built()
    model.apply(start_over)
    assert torch.equal(torch.get_rng_state(), expected)
    with offload.initialize(model, config(tmp_path), adamw) as engine:
        assert_equal(model, plain)
    assert_closed(engine)


def test_a_state_dict_before_there_is_an_engine_is_copied_and_holds_no_pages(tmp_path: Path) -> None:
    plain = built(tied=True)
    with offload.deferred_init(config(tmp_path)) as store:
        model = built(tied=True)
        values = model.state_dict()
    values |= model.state_dict()
    arena = store.mover.arena
    assert all(arena.locate(value) is None for value in values.values())
    store.mover.collect_leases()
    assert not any(tensor.held for tensor in store.mover.tensors.values())
    with offload.initialize(model, config(tmp_path), adamw) as engine:
        train(engine, 3)
        for name, value in plain.state_dict().items():
            assert torch.equal(values[name], value), name
        after = model.state_dict()
        assert all(arena.locate(value) is None for value in after.values())
    assert_closed(engine)
    assert not any(module._state_dict_pre_hooks or module._state_dict_hooks for module in model.modules())


def test_a_module_still_without_pages_may_be_cloned_inside_the_block(tmp_path: Path) -> None:
    class Cloning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
            self.other = copy.deepcopy(self.one)

    torch.manual_seed(7)
    plain = Cloning()
    torch.manual_seed(7)
    with offload.deferred_init(config(tmp_path)):
        model = Cloning()
    with offload.initialize(model, config(tmp_path), adamw) as engine:
        assert_equal(model, plain)
    assert_closed(engine)


@pytest.mark.parametrize(
    "build",
    [GPT, Applied],
)
def test_16_bit_weights_and_their_masters_are_those_of_plain_construction(
    build: Callable[[], GPT], tmp_path: Path
) -> None:
    torch.manual_seed(7)
    plain = build()
    half = config(tmp_path) | {"model": {"factory": "unused:unused", "dtype": "bf16"}}
    torch.manual_seed(7)
    with offload.deferred_init(half):
        model = build()
    masters = [nn.Parameter(parameter.detach().clone()) for parameter in plain.parameters()]
    plain, optimizer = plain.bfloat16(), torch.optim.AdamW(masters, lr=1e-2, fused=True)
    batch = CASES["gpt"].batch(torch.Generator().manual_seed(11))
    with offload.initialize(model, half, lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True)) as engine:
        assert_equal(model, plain)
        for each in (plain, model):
            torch.autograd.backward([each(*batch)])
        for master, parameter in zip(masters, plain.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        optimizer.step()
        engine.optimizer.step()
        ours = model.state_dict()
        for (name, _), master in zip(plain.named_parameters(), masters, strict=True):
            assert torch.equal(ours[name], master.bfloat16()), name
    assert_closed(engine)


# ---- memory --------------------------------------------------------------------------------------------------------


def ordinary_bytes() -> int:
    """Bytes of all parameters alive that are not paged."""
    return sum(tensor.nbytes for tensor in gc.get_objects() if type(tensor) is nn.Parameter)


def test_of_a_model_larger_than_the_budget_only_the_module_being_built_is_whole(tmp_path: Path) -> None:
    before, peaks = ordinary_bytes(), []

    class Looking(nn.Linear):
        def __init__(self) -> None:
            super().__init__(128, 256)
            peaks.append(ordinary_bytes() - before)

    one_bytes, count = (128 * 256 + 256) * 4, 30
    with offload.deferred_init(config(tmp_path, ram=RAM_BYTES)) as store:
        model = nn.ModuleList(nn.ModuleList([Looking(), Looking()]) for _ in range(count))
        assert store.budget.peak_bytes <= RAM_BYTES
        assert store.mover.host.peak_frames * PAGE_BYTES <= RAM_BYTES < 2 * count * one_bytes / 4
    assert max(peaks) <= 3 * one_bytes, "the module, its sibling, and small ones that wait for a neighbour"
    assert ordinary_bytes() == before
    with offload.initialize(model, config(tmp_path, ram=RAM_BYTES)) as engine:
        assert engine.memory_report().tiers["host"].peak_bytes <= RAM_BYTES
    assert_closed(engine)


def test_modules_that_the_model_does_not_use_give_their_pages_back(tmp_path: Path) -> None:
    with offload.deferred_init(config(tmp_path)):
        spare = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
        model = built()
    with offload.initialize(model, config(tmp_path), adamw) as engine:
        mover = engine.debug.mover
        placed = [mover.ssd.placements.get(tensor) for tensor in mover.ssd.placements]
        assert (
            sum(place.n_bytes for place in placed if place is not None)
            < sum(p.nbytes for p in model.parameters()) + 8 * 4096
        )
        train(engine, 3)
        check_mover(mover)
        del spare
    assert_closed(engine)


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def assert_given_back(store: PageStore, folder: Path) -> None:
    """No byte and no lock is held; threads and descriptors are looked at after each test."""
    store.budget.close()
    assert store.budget.used_bytes == 0
    assert not (folder / "pages" / "pagemem.lock").exists()
    assert all(type(parameter) is nn.Parameter for parameter in built().parameters()), "the block is over"


@pytest.mark.parametrize("error", [ValueError("a constructor's own"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_error_inside_the_block_passes_through_and_leaves_nothing_open(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, offload.deferred_init(config(tmp_path)) as store:
        built()
        raise error
    assert caught.value is error
    assert_given_back(store, tmp_path)
    Parity(CASES["gpt"], tmp_path, RAM_BYTES, steps=1).run()


def test_another_configuration_for_the_engine_is_refused(tmp_path: Path) -> None:
    with offload.deferred_init(config(tmp_path)) as store:
        model = built()
    with pytest.raises(ValueError, match="built under deferred_init with other memory or ssd settings"):
        offload.initialize(model, config(tmp_path, ram=2 * RAM_BYTES))
    store.close()
    assert_given_back(store, tmp_path)


def test_a_block_inside_a_block_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="deferred_init inside deferred_init"),
        offload.deferred_init(config(tmp_path)) as store,
        offload.deferred_init(config(tmp_path)),
    ):
        built()
    assert_given_back(store, tmp_path)


def test_a_block_inside_a_block_on_another_folder_is_refused(tmp_path: Path) -> None:
    stores: list[Any] = []
    try:
        with (
            pytest.raises((RuntimeError, ValueError), match="deferred_init"),
            offload.deferred_init(config(tmp_path)) as outer,
        ):
            stores.append(outer)
            with offload.deferred_init(config(tmp_path / "other")) as inner:
                stores.append(inner)
                built()
    finally:
        for store in stores:
            store.close()
