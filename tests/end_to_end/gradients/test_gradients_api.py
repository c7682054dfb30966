"""Gradients belong to the engine: more or fewer than foretold, thrown away, clipped by hand, used with another learning
rate."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from parity import adamw, compare
from small_runs import assert_closed, batches, built, config, engine_of, train, train_plain
from torch import Tensor, nn

import offload


def test_a_second_pass_that_was_not_foretold_is_an_error_and_not_a_wrong_update(tmp_path: Path) -> None:
    with engine_of(built(), tmp_path) as engine:
        train(engine, 2)
        loss = engine(*batches(1)[0])
        loss.backward(retain_graph=True)
        with pytest.raises(
            offload.StaleGradientError, match=r'after the update of this step.*varying number.*update.start = "step"'
        ):
            loss.backward()
    assert_closed(engine)


@pytest.mark.parametrize(
    ("ram", "clip_norm"),
    [(1 << 20, None), (1 << 20, 0.5), (16 << 20, None), (16 << 20, 0.5)],
)
def test_the_number_of_passes_may_vary_where_updates_wait_for_the_step(
    ram: int, clip_norm: float | None, tmp_path: Path
) -> None:
    plain = built()
    optimizer = adamw(plain.parameters())
    with offload.initialize(built(), config(tmp_path, ram=ram, start="step", clip_norm=clip_norm), adamw) as engine:
        for number, batch in enumerate(batches(6)):
            for model, its in ((plain, optimizer), (engine.model, engine.optimizer)):
                for _ in range(1 + number % 3):
                    torch.autograd.backward([model(*batch)])
                if clip_norm is not None and model is plain:
                    nn.utils.clip_grad_norm_(plain.parameters(), clip_norm)
                its.step()
                its.zero_grad()
        compare(plain, optimizer, engine.model, engine.optimizer, "in the end")
    assert_closed(engine)


def test_more_gradients_than_foretold_in_a_unit_that_waits_for_a_frozen_one_are_all_used(tmp_path: Path) -> None:
    torch.manual_seed(7)
    plain = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
    model, optimizer = copy.deepcopy(plain), adamw(plain.parameters())
    with offload.initialize(model, config(tmp_path), adamw) as engine:
        for step in range(4):
            inputs = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(step))
            for each, its in ((plain, optimizer), (model, engine.optimizer)):
                for name, parameter in each.named_parameters():
                    parameter.requires_grad_(step < 3 or not name.endswith("bias"))
                for x in inputs[: 2 if step == 3 else 1]:
                    loss: Tensor = each(x).pow(2).mean()
                    torch.autograd.backward([loss])
                its.step()
                its.zero_grad()
        compare(plain, optimizer, model, engine.optimizer, "in the end")
    assert_closed(engine)


def test_clipping_by_hand_that_begins_late_is_refused_with_the_keys_to_use_and_works_in_the_next_step(
    tmp_path: Path,
) -> None:
    plain = built()
    optimizer = adamw(plain.parameters())
    with engine_of(built(), tmp_path) as engine:
        for step, batch in enumerate(batches(5)):
            for model, its in ((plain, optimizer), (engine.model, engine.optimizer)):
                torch.autograd.backward([model(*batch)])
                if step == 2 and model is not plain:
                    with pytest.raises(
                        RuntimeError,
                        match=r'used up by its update.*set update\.start = "step".*or clip by update\.clip_norm alone',
                    ):
                        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                elif step > 2:
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                its.step()
                its.zero_grad()
        compare(plain, optimizer, engine.model, engine.optimizer, "in the end")
    assert_closed(engine)


def test_a_learning_rate_changed_after_updates_have_used_it_is_an_error(tmp_path: Path) -> None:
    with engine_of(built(), tmp_path) as engine:
        train(engine, 2)
        engine.backward(engine(*batches(1)[0]))
        before = [group["lr"] for group in engine.optimizer.param_groups]
        for group in engine.optimizer.param_groups:
            group["lr"] = 1.0
        with pytest.raises(
            RuntimeError, match='learning rate .* changed between backward and step.*update.start = "step"'
        ):
            engine.optimizer.step()
        for group, lr in zip(engine.optimizer.param_groups, before, strict=True):
            group["lr"] = lr
        engine.optimizer.step()
        plain = built()
        optimizer = adamw(plain.parameters())
        train_plain(plain, optimizer, 2)
        train_plain(plain, optimizer, 1)
        compare(plain, optimizer, engine.model, engine.optimizer, "once it was put back")
    assert_closed(engine)


def test_gradients_thrown_away_leave_no_trace_where_updates_wait_for_the_step(tmp_path: Path) -> None:
    plain, engine = built(), engine_of(built(), tmp_path, start="step")
    optimizer = adamw(plain.parameters())
    for batch in batches(5):
        for model, its in ((plain, optimizer), (engine.model, engine.optimizer)):
            torch.autograd.backward([model(*batch) * 3])
            its.zero_grad()
            torch.autograd.backward([model(*batch)])
            its.step()
            its.zero_grad()
    compare(plain, optimizer, engine.model, engine.optimizer, "in the end")
    assert_closed(engine)


def test_gradients_that_updates_have_used_cannot_be_thrown_away(tmp_path: Path) -> None:
    with engine_of(built(), tmp_path) as engine:
        train(engine, 2)
        engine.backward(engine(*batches(1)[0]))
        with pytest.raises(RuntimeError, match=r'zero_grad\(\) without step\(\).*set update.start = "step"'):
            engine.optimizer.zero_grad()
        engine.step()
        plain = built()
        optimizer = adamw(plain.parameters())
        train_plain(plain, optimizer, 2)
        train_plain(plain, optimizer, 1)
        compare(plain, optimizer, engine.model, engine.optimizer, "after the step was made all the same")
    assert_closed(engine)


@pytest.mark.parametrize("mode", ["exact", "lock-free"])
@pytest.mark.parametrize(
    "update", [{"clip_norm": 0.5}, {"clip_norm": 0.5, "loss_scale": 1024.0}, {"loss_scale": 1024.0}, {}], ids=str
)
def test_the_norm_of_the_last_step_is_known(update: dict[str, float], mode: str, tmp_path: Path) -> None:
    """Of all parameters that require gradients, in the optimizer or not, before clipping and without the loss scale."""

    def most(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(list(parameters)[2:], lr=1e-3, fused=True)

    plain = built()
    optimizer = most(plain.parameters())
    extra = {"mode": mode, "max_staleness": 0} if mode == "lock-free" else {}
    with offload.initialize(built(), config(tmp_path, ram=16 << 20, **update, **extra), most) as engine:
        assert engine.grad_norm is None
        for batch in batches(4):
            engine.backward(engine(*batch))
            assert engine.step()
            plain(*batch).backward()
            norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5 if "clip_norm" in update else 1e9)
            optimizer.step()
            optimizer.zero_grad()
            assert engine.grad_norm == (float(norm) if update else None)
            for parameter in (*list(plain.parameters())[:2], *list(engine.model.parameters())[:2]):
                assert parameter.grad is not None, "these are nobody's, and add up until somebody clears them"
                parameter.grad = None
        compare(plain, optimizer, engine.model, engine.optimizer, "in the end")
    assert_closed(engine)


def test_backward_takes_an_output_with_a_loss_and_says_what_else_is_wrong(tmp_path: Path) -> None:
    with engine_of(built(), tmp_path) as engine:
        loss = engine(*batches(1)[0])
        engine.backward({"loss": loss, "logits": torch.ones(2)})
        assert engine.step()
        loss = engine(*batches(1)[0])
        for wrong, said in (
            ({"logits": loss}, "backward is given a dict without a loss; give the loss, or call the model with labels"),
            (None, "backward is given a NoneType without a loss; give the loss, or call the model with labels"),
            (loss.expand(2, 3), "the loss has shape (2, 3), and backward takes one number: its mean() or sum()"),
        ):
            with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
                engine.backward(wrong)
        engine.backward(loss)
        assert engine.step()
    assert_closed(engine)
