"""`offload plan FILE`: what a run will take, before it is begun. Nothing is trained and no weight is made.

The step is rehearsed without bytes (`offload.rehearsal`), which gives units, pages, ops and plan as the engine would make
them; the plan is then simulated (`scheduler.simulator`) with the bandwidths given. Pages are the engine's; times are as
good as the rates they are computed from.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from rich.console import Console

from offload.config import Config, ConfigError
from offload.launch import factory_of
from offload.memory import commit_frames
from offload.rehearsal import CostMode, Rehearsal, rehearsed
from offload.report import print_rows
from offload.smallest_budget import smallest_budget
from pagemem.mover import ASSUMED_BYTES_PER_S
from pagemem.units import MiB, format_bytes
from scheduler.simulator import Lane, Simulation, simulate

_MATRIX: Final = 768
_COPY_BYTES: Final = 64 * MiB
_REPEATS: Final = 5


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        flops: floating-point operations of matrix products.
        ram: bytes that other kernels read and write.
        ssd_read, ssd_write: bytes of the page files.
    """

    flops: float
    ram: float
    ssd_read: float
    ssd_write: float


@dataclass(frozen=True, slots=True)
class Phase:
    """Bytes of each tier at one point of a run: pages, and in RAM also gradients in flight."""

    host_pages: int
    host_bytes: int
    ssd_pages: int
    ssd_bytes: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """What `forecast` finds.

    Attributes:
        smallest_ram_bytes: the least ``memory.ram`` that the model can be trained in.
        resident_ram_bytes: ``memory.ram`` from which on nothing moves, with pages of this size.
        start: when the model is built. step: the most during the steps. commit: that, with the commits that are kept.
        ops: of one step. step_s: predicted; compute_s of it without any wait.
        busy: share of the step that each lane is busy. waits_s: of a step, by the lane that was waited for.
        limiting: the lane that is busy most.
        read_bytes, written_bytes: moved per step.
    """

    parameters: int
    ram_bytes: int
    page_bytes: int
    smallest_ram_bytes: int
    largest_unit: str
    resident_ram_bytes: int
    start: Phase
    step: Phase
    commit: Phase
    commits_kept: int
    ops: int
    step_s: float
    compute_s: float
    steady: bool
    busy: Mapping[str, float]
    waits_s: Mapping[str, float]
    limiting: str
    read_bytes: float
    written_bytes: float
    rates: Rates


def forecast(config: Config, rates: Rates) -> Forecast:
    """Rehearse and simulate the run of a configuration.

    Args:
        config: exact mode, without ``memory.activations``, with the sections model and train; the model takes two int64
            tensors of ``train.batch`` rows and ``train.seq`` tokens.
        rates: of the machine.

    Raises:
        ConfigError: the configuration is another one; says what is not forecast.
        BudgetError: ``memory.ram`` is too small; names the smallest that works.
        RehearsalError, FactoryError: the model cannot be built, or its step not be performed, without values.
    """
    check_forecastable(config)
    assert config.model is not None and config.train is not None
    make_model = factory_of("model", config.model.factory, config.model.arguments)
    need = smallest_budget(make_model, None, config)
    need.check(config.memory.ram)
    cost = CostMode(rates.flops, rates.ram)
    with rehearsed(make_model, config, cost, (rates.ssd_read, rates.ssd_write)) as engine:
        start = _at_start(engine)
        engine.rehearse(config.train.batch, config.train.seq)
        step, commit = _at_step(engine), _at_commit(engine)
        simulated = _simulated(engine)
        mover = engine.store.mover
        return Forecast(
            parameters=sum(parameter.numel() for parameter in engine.model.parameters()),
            ram_bytes=config.memory.ram, page_bytes=mover.arena.page_bytes,
            smallest_ram_bytes=need.smallest_bytes, largest_unit=need.unit,
            resident_ram_bytes=_resident_bytes(engine),
            start=start, step=step, commit=commit, commits_kept=config.commit.keep,
            ops=len(engine.trace.ops), step_s=simulated.step_s, compute_s=engine.trace.compute_s, steady=simulated.steady,
            busy={lane.value: share for lane, share in simulated.busy.items()},
            waits_s=_waits_s(engine, simulated), limiting=simulated.limiting.value,
            read_bytes=simulated.read_bytes, written_bytes=simulated.written_bytes, rates=rates,
        )  # fmt: skip


def check_forecastable(config: Config) -> None:
    """Raise ConfigError for what is not forecast."""
    missing = [name for name in ("model", "train") if getattr(config, name) is None]
    if missing:
        raise ConfigError(f"plan needs the sections {', '.join(missing)} as well")
    if config.update.mode != "exact":
        raise ConfigError(f'update.mode is "{config.update.mode}": plan knows "exact" only, whose updates are part of the step; --set update.mode=exact')
    if config.device != "cpu":
        raise ConfigError(f'device is "{config.device}": plan knows host memory and SSD only; --set device=cpu and leave memory.device out')
    if config.memory.activations is not None:
        raise ConfigError("memory.activations is set: plan does not know which saved tensors would go to pages; leave it out for plan")


def _simulated(engine: Rehearsal) -> Simulation:
    plan = engine.store.driver.plan
    assert plan is not None
    n_bytes = {tensor.id: tensor.n_bytes for tensor in engine.store.mover.tensors.values()}
    return simulate(plan, engine.trace, n_bytes, engine.machine())


def _waits_s(engine: Rehearsal, simulated: Simulation) -> dict[str, float]:
    plan = engine.store.driver.plan
    assert plan is not None
    found = {Lane.SSD_READ.value: 0.0, Lane.SSD_WRITE.value: 0.0}
    for wait in simulated.waits:
        found[wait.lane.value] += wait.seconds / plan.n_steps
    return found


# ---- tiers -------------------------------------------------------------------------------------------------------------


def _phase(engine: Rehearsal, host_pages: int, gradient_bytes: int, ssd_pages: int) -> Phase:
    page_bytes = engine.store.page_bytes
    return Phase(host_pages, host_pages * page_bytes + gradient_bytes, ssd_pages, ssd_pages * page_bytes)


def _resident_bytes(engine: Rehearsal) -> int:
    mover = engine.store.mover
    used = set(engine.trace.tensors())
    return sum(t.n_frames for t in mover.tensors.values() if t.id in used) * mover.arena.page_bytes + engine.store.driver.overhead_bytes


def _at_start(engine: Rehearsal) -> Phase:
    mover = engine.store.mover
    return _phase(engine, mover.host.used_frames, 0, mover.ssd.used_frames)


def _at_step(engine: Rehearsal) -> Phase:
    plan, mover = engine.store.driver.plan, engine.store.mover
    assert plan is not None
    return _phase(engine, plan.peak_frames, engine.peak_gradient_bytes, mover.planned_page_file_frames(plan.stored()))


def _at_commit(engine: Rehearsal) -> Phase:
    step = _at_step(engine)
    ssd_pages = step.ssd_pages + commit_frames(engine.store.mover, engine.config.commit.keep)
    return Phase(step.host_pages, step.host_bytes, ssd_pages, ssd_pages * engine.store.page_bytes)


# ---- rates -------------------------------------------------------------------------------------------------------------


def rates_of(
    config: Config, *, flops: float | None = None, ram: float | None = None, ssd_read: float | None = None, ssd_write: float | None = None
) -> Rates:
    """The rates given, and for others: compute as measured now, the disk as ``ssd.limit_mb_per_s`` says or as the engine assumes.

    Raises:
        ConfigError: a rate is not above 0.
    """
    for name, value in (("--flops", flops), ("--ram-speed", ram), ("--ssd-read", ssd_read), ("--ssd-write", ssd_write)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name} is {value:g}; it must be a number above 0")
    limit = config.ssd.limit_mb_per_s
    assumed = ASSUMED_BYTES_PER_S if limit is None else limit * 1e6
    threads = torch.get_num_threads()
    torch.set_num_threads((config.train and config.train.threads) or threads)
    try:
        return Rates(flops or _measured_flops(), ram or _measured_copy(), ssd_read or assumed, ssd_write or assumed)
    finally:
        torch.set_num_threads(threads)


def _best_s(run: Callable[[], object]) -> float:
    """The shortest of some runs: what disturbs them only makes them longer."""
    took_s = []
    for _ in range(_REPEATS):
        started_s = time.perf_counter()
        run()
        took_s.append(time.perf_counter() - started_s)
    return min(took_s)


def _measured_flops() -> float:
    a = torch.ones(_MATRIX, _MATRIX)
    return 2.0 * _MATRIX**3 / _best_s(lambda: a @ a)


def _measured_copy() -> float:
    source, target = torch.ones(_COPY_BYTES // 4), torch.empty(_COPY_BYTES // 4)
    return 2.0 * _COPY_BYTES / _best_s(lambda: target.copy_(source))


# ---- output ------------------------------------------------------------------------------------------------------------


def forecast_rows(found: Forecast) -> list[tuple[str, str]]:
    """The table as (what, value) pairs."""
    rates = found.rates
    rows = [
        ("parameters", f"{found.parameters:,}"),
        ("memory.ram", f"{format_bytes(found.ram_bytes)}, pages of {format_bytes(found.page_bytes)}"),
        ("smallest memory.ram that works", f"{format_bytes(found.smallest_ram_bytes)} ({found.smallest_ram_bytes}), for {found.largest_unit}"),
        ("memory.ram from which nothing moves", f"{format_bytes(found.resident_ram_bytes)}, with pages of this size"),
    ]
    phases = (("start", found.start), ("step", found.step), (f"commit, {found.commits_kept} kept: at most", found.commit))
    for name, phase in phases:
        host = f"RAM {phase.host_pages} pages, {format_bytes(phase.host_bytes)}"
        rows.append((name, f"{host}; SSD {phase.ssd_pages} pages, {format_bytes(phase.ssd_bytes)}"))
    rows += [
        ("step, predicted", f"{found.step_s:.3f} s, of which compute {found.compute_s:.3f} s, in {found.ops} ops"),
        ("busy", ", ".join(f"{lane} {share:.0%}" for lane, share in found.busy.items())),
        ("limited by", found.limiting),
        ("waits a step", ", ".join(f"{lane} {seconds:.3f} s" for lane, seconds in found.waits_s.items())),
    ]
    for what, n_bytes in (("read", found.read_bytes), ("written", found.written_bytes)):
        rows.append((f"SSD bytes {what} a step", f"{format_bytes(n_bytes)} ({n_bytes / found.parameters:.1f} a parameter)"))
    rows.append(
        (
            "at these rates",
            f"{rates.flops / 1e9:,.1f} GFLOP/s, RAM {rates.ram / 1e6:,.0f} MB/s, SSD read {rates.ssd_read / 1e6:,.0f} MB/s, "
            f"write {rates.ssd_write / 1e6:,.0f} MB/s",
        )
    )
    return rows


def print_forecast(found: Forecast, console: Console, *, as_json: bool) -> None:
    """The table, or one JSON object on one line."""
    if as_json:
        console.print(json.dumps(as_dict(found)), soft_wrap=True, highlight=False, markup=False)
        return
    print_rows("Plan", forecast_rows(found), console)
    if not found.steady:
        console.print("the plan's cycles did not come to repeat in time: the step is the mean of those simulated", highlight=False)


def as_dict(found: Forecast) -> dict[str, Any]:
    """Plain values, with the bytes moved per parameter beside those per step."""
    return {
        **asdict(found),
        "read_bytes_per_parameter": found.read_bytes / found.parameters,
        "written_bytes_per_parameter": found.written_bytes / found.parameters,
    }
