"""Parameters in slices: where a matrix does not fit into the budget, the model trains all the same, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairwise import each_value
from parity import adamw
from safetensors.torch import load_file
from small_runs import PAGE_BYTES, assert_closed, assert_equal, config
from torch import Tensor, nn
from wide_vocabulary import VOCABULARY, WIDTH, WideVocabulary, batches, built

import offload
from offload.config_loading import load_config
from offload.cutting.cut_parameter import CutParameter
from offload.forecast.kernels import CostMode, RatedKernels
from offload.forecast.rates import Rates
from offload.forecast.rehearsal import rehearsed

#: The output layer alone, with its gradient and states, takes more than three times as much.
RAM_BYTES = 6 * PAGE_BYTES


def train_plain(model: nn.Module, optimizer: torch.optim.Optimizer, steps: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Steps of plain PyTorch; returns the losses."""
    losses = []
    for x, y in steps:
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


@contextmanager
def engine_of(model: nn.Module, folder: Path, ram: int = RAM_BYTES, **update: Any) -> Iterator[offload.Engine]:
    """An engine whose budget cuts the vocabulary's matrices."""
    with offload.initialize(model, config(folder, ram=ram, **update), adamw) as engine:
        yield engine
    assert_closed(engine)


def train(engine: offload.Engine, steps: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Steps of the engine; returns the losses."""
    losses = []
    for x, y in steps:
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return losses


def assert_same_states(ours: torch.optim.Optimizer, plain: torch.optim.Optimizer) -> None:
    """One entry a parameter, with whole tensors."""
    mine, expected = ours.state_dict(), plain.state_dict()
    assert mine["state"].keys() == expected["state"].keys()
    assert [group["params"] for group in mine["param_groups"]] == [g["params"] for g in expected["param_groups"]]
    for number, state in expected["state"].items():
        for name, value in state.items():
            assert torch.equal(mine["state"][number][name], value), (number, name)


@each_value(tied=[False, True], bias=[False, True], deferred=[False, True], rows=[1, 3])
def test_five_steps_in_the_smallest_budget_have_the_bits_of_plain_pytorch(
    tied: bool, bias: bool, deferred: bool, rows: int, tmp_path: Path
) -> None:
    need = offload.smallest_budget(lambda: built(tied=tied, bias=bias), adamw, config(tmp_path))
    assert need.smallest_bytes <= RAM_BYTES
    plain = built(tied=tied, bias=bias)
    optimizer = adamw(plain.parameters())
    expected = train_plain(plain, optimizer, batches(5, rows))
    settings = config(tmp_path, ram=need.smallest_bytes)
    if deferred:
        with offload.deferred_init(settings):
            model = built(tied=tied, bias=bias)
    else:
        model = built(tied=tied, bias=bias)
    weight = model.head.weight
    with engine_of(model, tmp_path, need.smallest_bytes) as engine:
        assert isinstance(weight, CutParameter) and model.head.weight is weight and len(weight.slices) > 3
        assert [torch.equal(a, b) for a, b in zip(train(engine, batches(5, rows)), expected, strict=True)] == [True] * 5
        assert engine.stats().planned_steps == 3
        assert_equal(model, plain)
        assert_same_states(engine.optimizer, optimizer)
        assert engine.debug.updater.peak_direct_bytes <= PAGE_BYTES


def test_nothing_is_cut_where_it_fits(tmp_path: Path) -> None:
    model = built()
    with engine_of(model, tmp_path, 4 << 20):
        assert not any(isinstance(parameter, CutParameter) for parameter in model.parameters())
    need = offload.smallest_budget(built, adamw, config(tmp_path, ram=4 << 20, mode="lock-free"))
    assert need.unit == "tok.weight" and need.smallest_bytes > 2 * VOCABULARY * WIDTH * 4


@pytest.mark.parametrize("update", [{"clip_norm": 0.1}, {"accumulation": 2}, {"start": "step"}])
def test_what_else_a_step_is_made_of_keeps_the_bits(update: dict[str, Any], tmp_path: Path) -> None:
    plain, model = built(tied=True), built(tied=True)
    optimizer, passes = adamw(plain.parameters()), update.get("accumulation", 1)
    with engine_of(model, tmp_path, **update) as engine:
        for number, (x, y) in enumerate(batches(6)):
            (plain(x, y) / passes).backward()
            engine.backward(engine(x, y))
            if number % passes == passes - 1:
                if "clip_norm" in update:
                    total = torch.nn.utils.clip_grad_norm_(plain.parameters(), update["clip_norm"])
                    assert total > update["clip_norm"]
                optimizer.step()
                optimizer.zero_grad()
            engine.step()
        assert_equal(model, plain)
        assert_same_states(engine.optimizer, optimizer)


def test_a_run_goes_on_with_the_slices_it_was_begun_with(tmp_path: Path) -> None:
    plain = built(tied=True)
    optimizer = adamw(plain.parameters())
    train_plain(plain, optimizer, batches(6))
    with engine_of(built(tied=True), tmp_path) as engine:
        train(engine, batches(6)[:3])
        slices = len(engine.debug.units)
        engine.save()
    model = built(tied=True)
    with engine_of(model, tmp_path, 4 << 20) as engine:
        resumed = engine.resume()
        assert resumed is not None and resumed.step == 3 and len(engine.debug.units) == slices
        train(engine, batches(6)[3:])
        assert_equal(model, plain)
        assert_same_states(engine.optimizer, optimizer)


def test_lock_free_mode_and_devices_do_not_go_on_with_slices(tmp_path: Path) -> None:
    with engine_of(built(tied=True), tmp_path) as engine:
        train(engine, batches(2))
        engine.save()
    memory = {"memory": {"ram": 16 << 20, "page": PAGE_BYTES, "device": "8MiB"}}
    for more in ({"update": {"mode": "lock-free"}}, {"device": "cpu-emulated", **memory}):
        with pytest.raises(
            offload.ConfigError, match=r"have tok.weight in slices, .* which only exact mode on the CPU"
        ):
            offload.initialize(built(tied=True), config(tmp_path, ram=16 << 20) | more, adamw)


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_exports_have_one_tensor(dtype: str, tmp_path: Path) -> None:
    model = built(tied=True, bias=True)
    with engine_of(model, tmp_path) as engine:
        train(engine, batches(3))
        engine.save()
        engine.export(tmp_path / "weights", dtype=dtype)
        expected = model.state_dict()
    found = load_file(tmp_path / "weights" / "model.safetensors")
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    for name, value in expected.items():
        if name != "head.weight":
            assert torch.equal(found[name], value.to(kind)), name


def test_states_and_values_can_be_loaded(tmp_path: Path) -> None:
    plain = built(tied=True)
    optimizer = adamw(plain.parameters())
    train_plain(plain, optimizer, batches(5)[:3])
    model = WideVocabulary(tied=True)
    with engine_of(model, tmp_path) as engine:
        train(engine, batches(1))
        model.load_state_dict(plain.state_dict())
        engine.optimizer.load_state_dict(optimizer.state_dict())
        assert_same_states(engine.optimizer, optimizer)
        expected = train_plain(plain, optimizer, batches(5)[3:])
        assert all(torch.equal(a, b) for a, b in zip(train(engine, batches(5)[3:]), expected, strict=True))
        assert_equal(model, plain)


def test_gradients_can_be_looked_at_clipped_and_assigned(tmp_path: Path) -> None:
    plain, model = built(tied=True), built(tied=True)
    theirs = adamw(plain.parameters())
    with engine_of(model, tmp_path, start="step") as engine:
        ours = engine.optimizer
        for number, (x, y) in enumerate(batches(5)):
            plain(x, y).backward()
            engine.backward(engine(x, y))
            mine, expected = model.tok.weight.grad, plain.tok.weight.grad
            assert mine is not None and expected is not None and mine.shape == expected.shape
            assert torch.equal(mine, expected) and torch.equal(mine * 2, expected * 2)
            if number == 1:
                norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1) for m in (model, plain)]
                assert torch.equal(*norms)
            elif number == 2:
                mine.data.mul_(0.5).clamp_(-1e-3, 1e-3)
                expected.mul_(0.5).clamp_(-1e-3, 1e-3)
            elif number == 3:
                model.tok.weight.grad = plain.tok.weight.grad = torch.ones_like(expected)
                assert model.tok.weight.grad is plain.tok.weight.grad
            ours.step()
            theirs.step()
            ours.zero_grad()
            theirs.zero_grad()
            assert model.tok.weight.grad is None
        assert_equal(model, plain)


def test_writes_to_copies_are_noticed(tmp_path: Path) -> None:
    model, (x, y) = built(tied=True), batches(1)[0]
    with engine_of(model, tmp_path, start="step") as engine:
        engine.backward(engine(x, y))
        gradient = model.tok.weight.grad
        assert gradient is not None
        with pytest.raises(RuntimeError, match="data_ptr of the gradient of a parameter in slices"):
            gradient.data_ptr()
        with pytest.raises(RuntimeError, match="cumsum_ of the gradient of a parameter in slices"):
            gradient.cumsum_(0)
        gradient.view(-1)[3] = 1.0
        with pytest.raises(RuntimeError, match="tok.weight: a view of its gradient was written to"):
            engine(x, y)
        engine.abandon_step()
        model.tok.weight.detach()[3] = 1.0
        with pytest.raises(RuntimeError, match="tok.weight: a view of it was written to"):
            engine(x, y)


def test_frozen_slices_are_read_alone(tmp_path: Path) -> None:
    plain, model = built(), built()
    for one in (plain, model):
        one.tok.weight.requires_grad_(False)
        one.head.weight.requires_grad_(False)
    optimizer = adamw(plain.parameters())
    expected = train_plain(plain, optimizer, batches(4))
    with engine_of(model, tmp_path) as engine:
        assert isinstance(model.tok.weight, CutParameter)
        assert all(torch.equal(a, b) for a, b in zip(train(engine, batches(4)), expected, strict=True))
        assert_equal(model, plain)
        model.tok.weight.requires_grad_(True)
        assert all(part.requires_grad for part in model.tok.weight.slices)


def test_16_bit_slices_have_fp32_masters(tmp_path: Path) -> None:
    values: list[dict[str, Tensor]] = []
    for ram in (RAM_BYTES, 8 << 20):
        torch.manual_seed(7)
        model = WideVocabulary(tied=True)
        settings = config(tmp_path / str(ram), ram=ram) | {"model": {"factory": "unused:unused", "dtype": "bf16"}}
        with offload.initialize(model, settings, adamw) as engine:
            assert isinstance(model.tok.weight, CutParameter) is (ram == RAM_BYTES)
            train(engine, batches(4))
            values.append({name: value.float() for name, value in model.state_dict().items()})
    for name, value in values[1].items():
        torch.testing.assert_close(values[0][name], value, rtol=2e-2, atol=2e-3, msg=name)


# ---- other uses ------------------------------------------------------------------------------------------------------


def test_what_reads_all_of_it_gets_a_copy_and_writes_go_back(tmp_path: Path) -> None:
    plain, model = built(), built()
    with engine_of(model, tmp_path):
        weight, expected = model.head.weight, plain.head.weight
        assert isinstance(weight, CutParameter)
        with torch.no_grad():
            assert torch.equal(weight, expected) and torch.equal(weight.norm(), expected.norm())
            assert torch.equal(weight[5], expected[5]) and "0.0" in repr(weight)
            for one in (weight, expected):
                torch.manual_seed(1)
                nn.init.kaiming_uniform_(one, a=2, mode="fan_out")
                one[7].zero_()
                one.mul_(3).add_(1)
        assert_equal(model, plain)
        torch.manual_seed(2)
        nn.init.normal_(weight)
        torch.manual_seed(2)
        nn.init.normal_(expected)
        weight.data = weight.data * 2
        expected.data = expected.data * 2
        assert_equal(model, plain)
        with offload.gathered(model.head):
            weight.detach()[:, 3] += 1
            expected.detach()[:, 3] += 1
        assert_equal(model, plain)


def test_a_function_that_needs_all_of_it_in_a_graph_is_refused(tmp_path: Path) -> None:
    model = built()
    with engine_of(model, tmp_path):
        with pytest.raises(offload.BudgetError, match=r"head.weight \(\d+ bytes\) .* slices, and \w+ in a graph"):
            model.head.weight.pow(2).sum()
        for hook in (model.head.weight.register_hook, model.head.weight.register_post_accumulate_grad_hook):
            with pytest.raises(RuntimeError, match="it takes no hooks of its gradient"):
                hook(lambda _: None)
        with pytest.raises(RuntimeError, match="it has no one address"):
            model.head.weight.data_ptr()
        with pytest.raises(ValueError, match="an embedding in slices takes no max_norm"):
            F.embedding(torch.tensor([1]), model.tok.weight, max_norm=1.0)


def test_autograd_grad_gives_whole_gradients(tmp_path: Path) -> None:
    plain, model = built(tied=True), built(tied=True)
    x, y = batches(1)[0]
    with engine_of(model, tmp_path):
        found = torch.autograd.grad(model(x, y), list(model.parameters()))
        expected = torch.autograd.grad(plain(x, y), list(plain.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert model.tok.weight.grad is None


def test_closing_makes_no_difference_to_a_model_that_could_not_be_prepared(tmp_path: Path) -> None:
    model = built()
    with pytest.raises(ValueError, match="commit"):
        offload.prepare(model, adamw, config(tmp_path, ram=RAM_BYTES) | {"commit": {"nothing": 1}})
    assert not any(isinstance(parameter, CutParameter) for parameter in model.parameters())


def test_the_forecast_rehearses_slices(tmp_path: Path) -> None:
    settings = load_config(
        config(tmp_path, ram=RAM_BYTES)
        | {"model": {"factory": "unused:unused"}, "train": {"steps": 1, "batch": 2, "seq": 12}}
    )
    cost, rates = CostMode(RatedKernels(1.0, 1.0)), Rates(1e9, 1e9, 1e9, 1e9, 1e9)
    with rehearsed(lambda: WideVocabulary(tied=True, bias=True), settings, cost, rates) as rehearsal:
        assert isinstance(rehearsal.model.head.weight, CutParameter)
        rehearsal.rehearse(2, 12)
        plan = rehearsal.driver.follower.plan
    assert plan is not None
