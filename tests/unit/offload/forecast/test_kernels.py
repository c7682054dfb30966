"""What kernels take: by rates, by timing, and what is done about those that cannot be run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload.forecast import kernels, timed_runs
from offload.forecast.kernels import CostMode, RatedKernels, TimedKernels, flops_of
from offload.forecast.timed_runs import TimedRun

ATEN = torch.ops.aten


class Asked:
    """Answers that every kernel takes so long, and counts."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def seconds(self, func: Any, args: Any, kwargs: Any, result: Any) -> float:
        """A thousand seconds."""
        self.calls.append(str(func))
        return 1000.0


def run(timed: TimedKernels, work: Callable[[], object]) -> float:
    """Seconds of some work on meta tensors."""
    with torch.device("meta"), CostMode(timed) as cost:
        work()
    return cost.seconds


def test_each_kernel_of_each_shape_is_timed_once() -> None:
    timed = TimedKernels(Asked())
    once = run(timed, lambda: torch.empty(64, 64) @ torch.empty(64, 64))
    assert timed.n_timed == 1 and once > 0 and timed.spent_s > 0
    assert run(timed, lambda: [torch.empty(64, 64) @ torch.empty(64, 64) for _ in range(3)]) == pytest.approx(3 * once)
    assert timed.n_timed == 1
    run(timed, lambda: torch.empty(64, 64) @ torch.empty(64, 32))
    run(timed, lambda: torch.empty(64, 64) @ torch.empty(64, 64).t())  # Other strides; and the view is a kernel, too.
    assert timed.n_timed == 4


def of_runs(monkeypatch: pytest.MonkeyPatch, *made: TimedRun) -> None:
    """Have runs take what is said, one after the other."""
    left = iter(made)

    def timed_run(work: Callable[[], object]) -> TimedRun:
        work()
        return next(left)

    monkeypatch.setattr(timed_runs, "timed_run", timed_run)


def test_a_kernel_takes_the_median_of_some_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    of_runs(monkeypatch, *(TimedRun(took_s, took_s) for took_s in (0.001, 0.009, 0.002, 0.004, 0.005, 0.1)))
    assert run(TimedKernels(Asked()), lambda: torch.empty(8, 8) @ torch.empty(8, 8)) == 0.004  # Five runs make 0.02 s.


def test_another_programs_time_slices_are_no_time_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    waited, preempted = TimedRun(0.03, 0.01), TimedRun(0.02, 0.02, preempted=True)
    of_runs(monkeypatch, waited, preempted, TimedRun(0.012, 0.012), waited, TimedRun(0.014, 0.014))
    timed = TimedKernels(Asked())
    assert run(timed, lambda: torch.empty(8, 8) @ torch.empty(8, 8)) == pytest.approx(0.013)
    assert timed.undisturbed_share == 1.0


def test_where_every_run_is_disturbed_the_shortest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    of_runs(monkeypatch, *(TimedRun(took_s, 0.01) for took_s in (0.05, 0.02, 0.09)))
    timed = TimedKernels(Asked())
    assert run(timed, lambda: torch.empty(8, 8) @ torch.empty(8, 8)) == 0.02  # Three runs make 0.1 s.
    assert timed.undisturbed_share == 0.5


def test_one_generator_is_as_fast_as_another() -> None:
    timed = TimedKernels(Asked())
    for _ in range(2):
        run(timed, lambda: torch.empty(8).normal_(generator=torch.Generator()))
    assert timed.n_timed == 1


def test_a_whole_step_can_be_timed() -> None:
    otherwise = Asked()
    timed = TimedKernels(otherwise)

    def step() -> None:
        model = nn.Sequential(nn.Embedding(16, 32), nn.LayerNorm(32), nn.Linear(32, 16))
        x = torch.zeros(4, 8, dtype=torch.int64)
        loss: Tensor = nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = [parameter.detach() for parameter in model.parameters()]
        moments = [torch.empty_like(parameter) for parameter in parameters]
        ATEN._fused_adamw_(
            parameters, moments, moments, moments, [], [torch.tensor(1.0) for _ in parameters],
            lr=0.1, beta1=0.9, beta2=0.9, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    took_s = run(timed, step)
    assert otherwise.calls == [] and timed.n_others == 0 and timed.n_timed > 15 and took_s > 0


def test_a_kernel_that_does_not_fit_is_asked_elsewhere() -> None:
    otherwise = Asked()
    timed = TimedKernels(otherwise)
    assert run(timed, lambda: torch.empty(1 << 40).relu()) == 1000.0
    assert (otherwise.calls, timed.n_timed, timed.n_others) == (["aten.relu.default"], 0, 1)
    run(timed, lambda: torch.empty(1 << 40).relu())
    assert timed.n_others == 1, "it was asked twice"


def test_a_kernel_that_does_not_take_ones_is_asked_elsewhere() -> None:
    otherwise = Asked()
    timed = TimedKernels(otherwise)
    indices, source = torch.empty(3, dtype=torch.int64, device="meta"), torch.empty(1, 4, device="meta")
    assert (
        run(timed, lambda: ATEN.index_select.default(source, 0, indices)) == 1000.0
    )  # A table of one row has no row 1.
    assert timed.n_others == 1


def test_timing_changes_neither_random_numbers_nor_modes() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    run(TimedKernels(Asked()), lambda: torch.empty(64, 64) @ torch.empty(64, 64))
    assert torch.equal(torch.rand(2), expected)


def test_attention_has_the_flops_of_its_products() -> None:
    query = torch.empty(2, 4, 16, 8, device="meta")
    product = 2 * 2 * 4 * 16 * 16 * 8
    assert flops_of(kernels._ATTENTION, (query, query, query), {}, None) == 2 * product
    assert flops_of(kernels._ATTENTION_BACKWARD, (query, query, query, query), {}, None) == 5 * product
    assert flops_of(ATEN.relu, (query,), {}, None) is None


def test_rates_count_views_and_empty_tensors_as_nothing() -> None:
    rated = RatedKernels(1.0, 1.0)
    with torch.device("meta"), CostMode(rated) as cost:
        torch.empty(4, 4).t()
    assert cost.seconds == 0.0


def test_the_share_of_time_with_a_processor_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    timed = TimedKernels(Asked(), told.append)
    assert timed.undisturbed_share == 1.0
    monkeypatch.setattr(timed_runs, "timed_run", lambda work: TimedRun(4.0, 1.0))
    run(timed, lambda: torch.empty(8, 8) @ torch.empty(8, 8))
    assert timed.undisturbed_share == 0.25 and told == [1]
