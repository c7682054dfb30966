"""A commit of another model, optimizer, precision or tracked state is refused, and everything stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from committed_runs import MIB, RANDOM, SMALL, Random, Run, Setup, assert_same, committed, momentum, without_draws
from tiny_models import Case
from torch import nn

import offload
from pagemem.durable.commit_folder import CommitFolder


class Wider(Random):
    """Larger layers."""

    def __init__(self) -> None:
        super().__init__(256)


class Longer(Random):
    """One layer more."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(10, 10)


class Turned(Random):
    """As many elements everywhere, in another shape."""

    def __init__(self) -> None:
        super().__init__()
        weight = self.first.weight
        self.first.weight = nn.Parameter(weight.detach().reshape(64, 192).t().contiguous().reshape(96, 128))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Never called."""
        raise AssertionError


class Counting(Random):
    """One buffer more."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))


class CountingWider(Random):
    """The same buffers, one of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(5, dtype=torch.int64))


class Fewer(Random):
    """One buffer less."""

    def __init__(self) -> None:
        super().__init__()
        del self._buffers["seen"]


def one_group(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(parameters), lr=1e-2, fused=True)


def other_groups(parameters: Any) -> torch.optim.Optimizer:
    every = list(parameters)
    return torch.optim.AdamW([{"params": every[:2]}, {"params": every[2:], "weight_decay": 0.0}], lr=1e-2, fused=True)


def adam(parameters: Any) -> torch.optim.Optimizer:
    every = list(parameters)
    groups = [
        {"params": [p for p in every if p.ndim > 1]},
        {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.Adam(groups, lr=1e-2, fused=True)


def model(build: Callable[[], nn.Module]) -> Setup:
    return replace(SMALL, case=Case(build, "vectors"), ram=2 * MIB)


def precision(dtype: str) -> Setup:
    return Setup(RANDOM, 2 * MIB, more={"model": {"factory": "none:none", "dtype": dtype}})


OTHERS: dict[str, tuple[Setup, str]] = {
    "wider": (model(Wider), r"parameter first\.bias: .*192.*256"),
    "longer": (model(Longer), r"parameter more\.bias: none and .*10"),
    "turned": (model(Turned), r"parameter first\.weight: .*192, 64.*96, 128"),
    "buffer more": (model(Counting), r"buffer or unpaged parameter count: none and"),
    "buffer less": (model(Fewer), r"buffer or unpaged parameter seen: .* and none"),
    "buffer wider": (model(CountingWider), r"buffer or unpaged parameter seen: .*\[\].*\[5\]"),
    "momentum": (replace(SMALL, factory=momentum), "made with AdamW, this run has SGD"),
    "adam": (replace(SMALL, factory=adam), "made with AdamW, this run has Adam"),
    "one group": (replace(SMALL, factory=one_group), r"parameter first.bias: .* 1\] and .* 0\].*parameter group"),
    "other groups": (replace(SMALL, factory=other_groups), r"parameter first.bias: .* 1\] and .* 0\].*parameter group"),
    "bf16": (precision("bf16"), r"parameter .*float32.*bfloat16"),
    "fp16": (precision("fp16"), r"parameter .*float32.*float16"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_commit_of_another_model_optimizer_or_precision_is_refused(other: str, tmp_path: Path) -> None:
    expected = committed(tmp_path)[2]
    setup, message = OTHERS[other]
    with Run(setup, tmp_path, seed=8) as run:
        before = without_draws(run)
        with pytest.raises(offload.CommitError, match=message) as raised:
            run.engine.resume()
        assert "commit 2" in str(raised.value) and "; name other ssd.paths, or build the model" in str(raised.value)
        assert_same(without_draws(run), before)
        if other not in ("turned", "buffer less"):
            run.train(2)
    with Run(SMALL, tmp_path, seed=9) as run:
        assert run.engine.resume() is not None
        assert_same(without_draws(run), expected)


def test_16_bit_formats_of_one_size_are_told_apart(tmp_path: Path) -> None:
    committed(tmp_path, precision("bf16"))
    with (
        Run(replace(precision("fp16"), update={"loss_scale": 1.0}), tmp_path) as run,
        pytest.raises(offload.CommitError, match=r"float16"),
    ):
        run.engine.resume()


def test_what_the_run_tracks_must_be_in_the_commit(tmp_path: Path) -> None:
    committed(tmp_path)
    with Run(SMALL, tmp_path) as run:
        run.engine.track("more", run.schedule)
        with pytest.raises(ValueError, match="tracked as 'more' already"):
            run.engine.track("more", run.schedule)
        with pytest.raises(offload.CommitError, match="no state of more, which this run tracks; name other ssd.paths"):
            run.engine.resume()
        run.train(1)


class Odd:
    """Its state is what it is given."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise KeyError("before")


def test_a_state_that_cannot_be_committed_is_refused_when_it_is_tracked_and_at_the_latest_when_it_is_saved(
    tmp_path: Path,
) -> None:
    with Run(SMALL, tmp_path) as run:
        run.train(1)
        with pytest.raises(
            ValueError, match=r"the state of 'odd'\['at'\] is a builtins.object, which is not committed"
        ):
            run.engine.track("odd", Odd(object()))
        odd = Odd([1])
        run.engine.track("odd", odd)
        odd.state = [1, {"x": object()}]
        with pytest.raises(offload.CommitError, match=r"the state of 'odd'\['at'\]\[1\]\['x'\] is a builtins.object"):
            run.engine.save()
        run.train(2)
    assert CommitFolder(tmp_path / "pages").numbers() == []


def test_a_thing_that_does_not_take_its_state_leaves_everything_as_it_was(tmp_path: Path) -> None:
    with Run(SMALL, tmp_path) as run:
        run.engine.track("odd", Odd(1))
        run.train(2)
        run.engine.save()
    with Run(SMALL, tmp_path, seed=8) as run:
        run.engine.track("odd", Odd(1))
        before = without_draws(run)
        with pytest.raises(KeyError):  # its own error, as it does not take its own state either
            run.engine.resume()
        run.engine.debug.checkpoints._own.tracked.pop("odd")

        class Once(Odd):
            def load_state_dict(self, state_dict: dict[str, Any]) -> None:
                if state_dict == {"at": 1}:
                    raise KeyError("before")

        run.engine.track("odd", Once(2))
        with pytest.raises(offload.CommitError, match="commit 1: 'odd' does not take its state: KeyError: 'before'"):
            run.engine.resume()
        assert_same(without_draws(run), before)


@pytest.mark.parametrize("name", ["", "two\nlines", "x" * 201, "bell\a"])
def test_a_name_that_is_not_one_line_is_refused(name: str, tmp_path: Path) -> None:
    with Run(SMALL, tmp_path) as run:
        run.train(1)
        with pytest.raises(ValueError, match="a commit's name is one line of 1 to 200 characters"):
            run.engine.save(name)
        assert run.engine.save("one line") == 1


def test_weights_are_not_taken_over_under_a_view_that_is_in_use(tmp_path: Path) -> None:
    expected = committed(tmp_path)[2]
    with Run(SMALL, tmp_path, seed=8) as run:
        before = without_draws(run)
        view = run.model.last.weight.data
        kept = view.clone()
        with pytest.raises(offload.CommitError, match="while a view of it is in use"):
            run.engine.resume()
        assert torch.equal(view, kept)
        assert_same(without_draws(run), before)
        del view
        assert run.engine.resume() is not None
        assert_same(without_draws(run), expected)
