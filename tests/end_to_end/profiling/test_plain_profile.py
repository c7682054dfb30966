"""`offload profile --plain`: bytes of a model that does not use the engine are those one can count, and its training is
the same."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import adamw
from rich.console import Console
from small_runs import batches, built, train_plain
from tiny_models import GPT
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import offload
from offload.cli import main
from offload.config import ConfigError
from offload.profiling.plain import Training, plain_rows, profile_plain
from offload.profiling.plain_savings import savings
from offload.profiling.plain_watch import OPTIMIZER, PlainWatch
from pagemem.errors import BudgetError, RunDirectoryError
from pagemem.tier import Tag, Tier

WIDTH, ROWS = 64, 32
SQUARE = 4 * WIDTH * WIDTH
RESULT = 4 * ROWS * WIDTH


def stack() -> nn.Sequential:
    """Three layers whose bytes can be counted by hand: each saves its input, and each ReLU its result, which is the
    next one's input."""
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH, bias=False),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH, bias=False),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH, bias=False),
    )


def training(
    model: nn.Module | None = None, make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
) -> Training:
    """A whole training, as a user's callable returns it."""
    torch.manual_seed(3)
    model = stack() if model is None else model
    optimizer = make(model.parameters())
    x = torch.randn(ROWS, WIDTH)

    def step() -> Tensor:
        loss: Tensor = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return model, optimizer, step


def gpt() -> Training:
    """The tests' GPT."""
    model = built()
    optimizer = adamw(model.parameters())
    return model, optimizer, lambda: train_plain(model, optimizer, 1)


def watched(made: Training, steps: int = 2) -> PlainWatch:
    """What was seen of some steps, after one unwatched."""
    model, optimizer, step = made
    step()
    with PlainWatch(model, optimizer) as watch:
        for _ in range(steps):
            step()
    return watch


def test_bytes_are_those_one_can_count() -> None:
    watch = watched(training())
    by_module = watch.bytes_by_module()
    assert list(by_module) == ["Sequential", "0", "1", "2", "3", "4"]
    for name in "024":
        kept = by_module[name]
        assert (kept[Tag.PARAM], kept[Tag.GRAD]) == (SQUARE, SQUARE)
        assert kept[Tag.MOMENT] == 2 * SQUARE + 4  # and the step's number
    # The first layer's input was there before; it is held, since somebody saves it. The loss, outside of all modules,
    # saves its own.
    assert {name: kept[Tag.ACTIVATION] for name, kept in by_module.items() if Tag.ACTIVATION in kept} == {
        "0": RESULT, "1": RESULT, "3": RESULT, "Sequential": RESULT,
    }  # fmt: skip
    timeline = watch.recording().timeline
    peaks = timeline.tag_peaks(Tier.HOST)
    assert (peaks[Tag.PARAM], peaks[Tag.GRAD], peaks[Tag.ACTIVATION]) == (3 * SQUARE, 3 * SQUARE, 4 * RESULT)
    assert timeline.peak(Tier.HOST).total_bytes == watch.at_peak.total()
    assert timeline.tiers == [Tier.HOST]


def test_after_the_last_step_only_weights_and_states_are_held() -> None:
    made = training()
    last = watched(made).recording().timeline.samples(Tier.HOST)[-1]
    # The first layer's input lives on, and is nobody's any more than it was.
    assert dict(last.by_tag) == {Tag.PARAM: 3 * SQUARE, Tag.MOMENT: 3 * (2 * SQUARE + 4), Tag.ACTIVATION: RESULT}


def test_spans_tell_which_module_computed() -> None:
    recording = watched(training(), steps=2).recording()
    assert len(recording.step_ends_s) == 2
    spans = [(op.phase, op.name) for op in recording.ops if op.name != "Sequential"]
    # A ReLU's gradient comes from its result; a layer's from its input and its weight.
    one_step = (
        [("forward", str(i)) for i in range(5)]
        + [("backward", str(i)) for i in range(4, -1, -1)]
        + [("update", OPTIMIZER)]
    )
    assert spans == one_step * 2
    assert all(op.end_s >= op.start_s for op in recording.ops)


@pytest.mark.parametrize("recomputed", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_watched_training_has_the_bits_of_unwatched(recomputed: bool | None) -> None:
    weights = []
    for watch in (False, True):
        model = Recomputed(recomputed) if recomputed is not None else built()
        optimizer = adamw(model.parameters())
        train_plain(model, optimizer, 2)
        if watch:
            with PlainWatch(model, optimizer):
                train_plain(model, optimizer, 2)
        else:
            train_plain(model, optimizer, 2)
        train_plain(model, optimizer, 1)
        weights.append(model.state_dict())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()), "hooks stayed"
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


class Recomputed(nn.Module):
    """The tests' GPT inside of activation checkpointing."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.inner: GPT = built()
        self.gate = nn.Parameter(torch.ones(()))
        self._use_reentrant = use_reentrant

    def forward(self, *batch: Tensor) -> Tensor:
        """The loss."""
        x, y = batch
        gate: Tensor = self.gate
        out: Tensor = checkpoint(lambda g: self.inner(x, y) * g, gate, use_reentrant=self._use_reentrant)
        return out


def test_a_saved_tensor_changed_in_place_is_still_an_error() -> None:
    model, optimizer, _ = training()
    with PlainWatch(model, optimizer), pytest.raises(RuntimeError, match="inplace"):
        x = model[0](torch.ones(ROWS, WIDTH))
        y = x.sigmoid()
        y.mul_(2)
        y.sum().backward()


def test_second_derivatives_can_still_be_taken() -> None:
    model, optimizer, _ = training(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))
    x = torch.randn(ROWS, WIDTH, requires_grad=True)

    def curvature() -> Tensor:
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), x)
        return second

    plain = curvature()
    with PlainWatch(model, optimizer):
        assert torch.equal(curvature(), plain)


# ---- what the engine would save -------------------------------------------------------------------------------------


def test_the_smallest_budget_is_one_that_works(tmp_path: Path) -> None:
    model, optimizer, step = gpt()
    found = savings(model, optimizer, watched((model, optimizer, step)).at_peak)
    least = found[0].ram_bytes
    settings: dict[str, Any] = {"ssd": {"paths": [str(tmp_path / "pages")]}, "memory": {"ram": least}}
    with offload.initialize(built(), settings, adamw) as engine:
        for batch in batches(3):
            engine.backward(engine(*batch))
            engine.step()
    with pytest.raises(BudgetError, match="set memory.ram to at least"):
        offload.initialize(
            built(), {**settings, "memory": {"ram": least - 1}, "ssd": {"paths": [str(tmp_path / "less")]}}, adamw
        )


def test_more_memory_moves_less_and_all_of_it_nothing() -> None:
    model, optimizer, step = gpt()
    watch = watched((model, optimizer, step))
    found = savings(model, optimizer, watch.at_peak)
    budgets = [saving for saving in found if saving.activations_bytes is None]
    assert [c.ram_bytes for c in budgets] == sorted({c.ram_bytes for c in budgets})
    assert all(a.peak_bytes < b.peak_bytes and a.read_bytes > b.read_bytes for a, b in itertools.pairwise(budgets))
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert budgets[-1].ram_bytes == 12 * n_parameters and (
        budgets[-1].read_bytes,
        budgets[-1].written_bytes,
        budgets[-1].ssd_bytes,
    ) == (0, 0, 0)
    share = 1 - budgets[0].ram_bytes / (12 * n_parameters)
    assert budgets[0].read_bytes == pytest.approx(16 * n_parameters * share) and budgets[
        0
    ].written_bytes == pytest.approx(12 * n_parameters * share)
    (with_activations,) = [saving for saving in found if saving.activations_bytes is not None]
    same = next(saving for saving in budgets if saving.ram_bytes == with_activations.ram_bytes)
    assert same.peak_bytes - with_activations.peak_bytes == pytest.approx(2 / 3 * watch.at_peak[Tag.ACTIVATION], abs=1)


# ---- the command ----------------------------------------------------------------------------------------------------


def run(to: Path, reference: str = f"{__name__}:training", steps: int = 2) -> tuple[dict[str, Any], str]:
    """Profile; returns the summary and what was printed."""
    out = io.StringIO()
    return profile_plain(reference, steps, to, Console(file=out, width=200)), out.getvalue()


def test_the_command_writes_a_profile_and_says_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "profile"
    assert main(["profile", "--plain", f"{__name__}:training", "--steps", "2", "--to", str(to)]) == 0
    assert {path.name for path in to.iterdir()} == {"trace.json", "report.html", "summary.json"}
    summary = json.loads((to / "summary.json").read_text())
    assert (summary["mode"], summary["steps"]) == ("plain", 2)
    assert summary["plain"]["peak_bytes"] == summary["tiers"]["host"]["peak_bytes"]
    text = capsys.readouterr().out
    for what, value in plain_rows(summary):
        assert re.search(rf"{re.escape(what)} +{re.escape(value)}$", text, re.MULTILINE), what
    trace = json.loads((to / "trace.json").read_text())["traceEvents"]
    assert {event["name"] for event in trace if event.get("cat") == "backward"} == {"Sequential", *"01234"}
    run(to)  # A second profile takes the first one's place.


def adagrad() -> Training:
    """An optimizer that the engine does not have."""
    return training(make=torch.optim.Adagrad)


def test_an_optimizer_that_the_engine_does_not_have_is_profiled_all_the_same(tmp_path: Path) -> None:
    summary, text = run(tmp_path / "profile", f"{__name__}:adagrad")
    assert summary["plain"]["engine"] == [] and summary["plain"]["at_peak"]["moment"] == 3 * (SQUARE + 4)
    assert "cannot train this as it is: Adagrad does not run on pages; use one of torch.optim's" in text


def pair() -> tuple[int, int]:
    """Not a training."""
    return 1, 2


def idle() -> Training:
    """A step that makes no update."""
    model, optimizer, _ = training()
    return model, optimizer, lambda: None


@pytest.mark.parametrize(
    ("reference", "steps", "said"),
    [
        (f"{__name__}:training", 0, "--steps is 0; it must be at least 1"),
        ("no_such_module:make", 1, "no_such_module"),
        (f"{__name__}:pair", 1, "returns (int, int); it must return (model, optimizer, step)"),
        (f"{__name__}:run", 1, "--plain.arguments"),
        (f"{__name__}:idle", 2, "2 steps made 0 updates of the optimizer returned; a step makes one"),
    ],
)
def test_what_cannot_be_profiled_is_one_error(reference: str, steps: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        run(tmp_path / "profile", reference, steps)
    assert not list(tmp_path.glob("profile/*"))


def test_a_folder_of_something_else_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="holds files that are not of a profile"):
        run(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_there_is_no_configuration_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--plain", "a:b", "--set", "seed=1"]) == 1
    assert capsys.readouterr().err == "offload: error: --set changes a FILE; --plain has none\n"
