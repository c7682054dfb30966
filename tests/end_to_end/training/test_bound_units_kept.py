"""What holds the update of a unit back that is bound between uses, what is refused of it, and when it is let go of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from bound_runs import AT, STEPS, Model, Run, adamw, assert_alike, bound_early
from torch import Tensor, nn

import offload
from optim import knobs
from optim.rules import AdamRule
from pagemem.errors import StaleGradientError

pytestmark = pytest.mark.usefixtures(bound_early.__name__)


def test_a_graph_that_is_kept_holds_updates_back(tmp_path: Path) -> None:
    ours, plain = Run(tmp_path), Run(None)
    assert ours.train(0, AT) == plain.train(0, AT)
    for run in (ours, plain):
        loss = run.loss(AT)
        loss.backward(retain_graph=True)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert ours.train(AT + 1) == plain.train(AT + 1)
    assert_alike(ours, plain)


def test_a_second_use_of_a_weight_in_the_backward_pass_sees_the_old_values(tmp_path: Path) -> None:
    class Later(torch.autograd.Function):
        """Its backward, which comes last, reads a weight that it has saved."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(weight)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            (weight,) = ctx.saved_tensors
            return gradient * weight.detach().sum(), None

    ours, plain = Run(tmp_path), Run(None)
    assert ours.train(0, AT) == plain.train(0, AT)
    for run in (ours, plain):
        model = run.model
        inner = type(model).inner
        model.inner = lambda x, model=model, inner=inner: inner(model, Later.apply(x, model.down.weight))
    assert ours.train(AT) == plain.train(AT)
    assert_alike(ours, plain)


class Wide(nn.Module):
    """Layers that are units of their own; ``late`` uses the last one's weight where the backward pass ends."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.up, self.down = nn.Embedding(16, 160), nn.Linear(160, 160), nn.Linear(160, 160)
        self.late: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(torch.tanh(self.up(self.late(self.table(x)))))
        return made


def test_an_unforeseen_use_after_the_update_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsaved(torch.autograd.Function):
        """Its backward reads a weight that nobody knows of."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, model: Wide) -> Tensor:
            ctx.model = model
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            return gradient * ctx.model.down.weight.detach().sum(), None

    monkeypatch.setattr(knobs, "BATCH_BYTES", 1)
    ours, plain = Run(tmp_path, model=Wide(), memory={"ram": "4MiB", "page": "64KiB"}), Run(None, model=Wide())
    assert ours.train(0, AT) == plain.train(0, AT)
    assert ours.is_bound and len(ours.engine.debug.units) > 2
    ours.model.late = lambda x: Unsaved.apply(x, ours.model)
    with pytest.raises(RuntimeError, match="used in the backward pass after its gradient was complete"):
        ours.step(AT)


def test_a_graph_older_than_an_update_is_refused(tmp_path: Path) -> None:
    ours = Run(tmp_path)
    ours.train(0, AT)
    old = ours.loss(3)
    ours.train(AT)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|updated or edited"):
        old.backward()
    ours.close()


@pytest.mark.parametrize("use", [lambda m: m.up.weight.sum(), lambda m: m(torch.ones(2, dtype=torch.long))])
def test_use_between_backward_and_step_is_refused(use: Callable[[Any], Any], tmp_path: Path) -> None:
    ours = Run(tmp_path)
    ours.train(0, AT)
    ours.loss(AT).backward()
    with pytest.raises((RuntimeError, StaleGradientError), match="its update of this step"):
        use(ours.model)
    with pytest.raises(RuntimeError, match="used up"):
        ours.model.up.weight.grad.sum()
    with pytest.raises(RuntimeError, match="zero_grad\\(\\) without step"):
        ours.optimizer.zero_grad()
    ours.engine.abandon_step()
    ours.train(AT + 1)
    assert ours.is_bound
    ours.close()


def test_a_second_graph_holds_updates_back(tmp_path: Path) -> None:
    ours, plain = Run(tmp_path), Run(None)
    assert ours.train(0, AT) == plain.train(0, AT)
    for run in (ours, plain):
        for loss in [run.loss(1), run.loss(2)]:
            loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert ours.train(AT + 1) == plain.train(AT + 1)
    assert_alike(ours, plain)


def test_one_backward_pass_too_many_is_refused(tmp_path: Path) -> None:
    ours = Run(tmp_path)
    ours.train(0, AT)
    ours.loss(1).backward()
    with pytest.raises(StaleGradientError, match="in a forward pass after its update"):
        ours.loss(2)
    ours.engine.abandon_step()
    ours.train(AT + 1)
    ours.close()


def test_an_update_that_was_cut_off_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Run(tmp_path)
    ours.train(0, AT)

    def cut_off(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(AdamRule, "apply", cut_off)
        with pytest.raises(KeyboardInterrupt):
            ours.step(AT)
    with pytest.raises(RuntimeError, match="cut off half-way"):
        ours.engine.abandon_step()
    ours.close()


def test_gradients_that_were_not_cleared_are_refused(tmp_path: Path) -> None:
    ours = Run(tmp_path)
    ours.train(0, AT)
    ours.loss(1).backward()
    ours.optimizer.step()
    with pytest.raises(StaleGradientError, match="not cleared"):
        ours.loss(2).backward()
    ours.close()


def test_a_graph_of_gradients_is_refused(tmp_path: Path) -> None:
    ours = Run(tmp_path)
    ours.train(0, AT)
    with pytest.raises(ValueError, match="create_graph"):
        ours.loss(1).backward(create_graph=True)
    ours.close()


def test_commits_and_resumed_runs_have_the_bits(tmp_path: Path) -> None:
    ours, plain = Run(tmp_path), Run(None)
    assert ours.train(0, AT) == plain.train(0, AT)
    with torch.no_grad():
        ours.model.norm.weight.mul_(0.5)
        plain.model.norm.weight.mul_(0.5)
    for number in range(AT, STEPS):
        ours.engine.save(wait=False)
        assert ours.step(number) == plain.step(number)
    ours.engine.save()
    ours.train(40, 43)
    ours.engine.resume()
    assert ours.train(STEPS, STEPS + 3) == plain.train(STEPS, STEPS + 3)
    assert_alike(ours, plain)


def test_an_edit_of_frozen_parameters_is_committed(tmp_path: Path) -> None:
    model = Model()
    model.table.requires_grad_(False)
    ours = Run(tmp_path, lambda p: adamw(q for q in p if q.requires_grad), model)
    ours.train(0, AT)
    ours.engine.save()
    ours.train(AT)
    with torch.no_grad():
        ours.model.table.weight.mul_(0.5)
    expected = ours.values()
    ours.engine.save()
    ours.close()
    other = Model()
    other.table.requires_grad_(False)
    again = Run(tmp_path, lambda p: adamw(q for q in p if q.requires_grad), other)
    again.engine.resume()
    found = again.values()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again.close()


def test_copies_and_refusals_are_those_of_paged_parameters(tmp_path: Path) -> None:
    ours = Run(tmp_path)
    ours.train(0, AT)
    weight = ours.model.up.weight
    copied = copy.deepcopy(weight)
    assert type(copied) is nn.Parameter and torch.equal(copied, weight)
    for refused in (weight.share_memory_, weight.t_, lambda: weight.set_(1), lambda: copy.copy(weight)):
        with pytest.raises(RuntimeError):
            refused()
    assert isinstance(weight, offload.PagedParameter)
    ours.train(AT)
    assert ours.is_bound
    kept = weight.detach()
    ours.close()
    with pytest.raises(RuntimeError, match="closed"):
        weight.sum()
    with suppress(RuntimeError):
        kept.sum()


def test_units_are_given_up_where_memory_gets_short(tmp_path: Path) -> None:
    class Rare(Model):
        """One with a large layer that is used in one step."""

        def __init__(self) -> None:
            super().__init__()
            self.rare = nn.Linear(300, 300)
            self.uses = False

        def forward(self, x: Tensor) -> Tensor:
            made = super().forward(x)
            return made + self.rare.weight.sum() if self.uses else made

    ours, plain = Run(tmp_path, model=Rare(), memory={"ram": "1280KiB", "page": "64KiB"}), Run(None, model=Rare())
    for number in range(2 * STEPS):
        for run in (ours, plain):
            run.model.uses = number in (AT, AT + 1)
        assert ours.step(number) == plain.step(number)
    assert_alike(ours, plain)
