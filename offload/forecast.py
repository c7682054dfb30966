"""`offload plan FILE`: what a run will take, before it is begun. Nothing is trained and no weight is made.

The step is rehearsed without bytes (`offload.rehearsal`), which gives units, pages, ops and plan as the engine would make
them; the plan is then simulated (`scheduler.simulator`) with the bandwidths given. Pages are the engine's; times are as
good as the rates they are computed from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import psutil  # type: ignore[import-untyped]
import torch
from rich.console import Console

from offload.config import Config, ConfigError
from offload.fit import Fit, Room, Taken, advice, commits, depth_argument, largest_batch, largest_depth, room_here
from offload.kernels import CostMode, Kernels, TimedKernels
from offload.launch import factory_of
from offload.memory import commit_frames
from offload.need import BudgetNeed
from offload.rates import Rates, kernels_of, threads_of
from offload.rehearsal import Rehearsal, rehearsed
from offload.report import print_rows
from offload.smallest_budget import smallest_budget
from pagemem.heap import give_back_free_pages
from pagemem.page_reader import CHUNK_BYTES
from pagemem.units import format_bytes
from scheduler.simulator import Lane, Simulation, simulate

#: Processor time of the I/O threads (`benchmarks/README.md`). Where all cores compute, compute is so much longer.
MOVING_S_PER_BYTE: Final = 1.4e-10


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
        start: when the model is built. step: the most during the steps. commit: that, with the commits that are kept. resume: when a
            run has gone on from one, before its first step.
        export_ram_bytes: buffers of `offload export`, beside what Python and its libraries take. export_bytes: of the files it writes.
        ops: of one step. step_s: predicted; compute_s of it without any wait, moving_s: by which moves slow compute down.
        busy: share of the step that each lane is busy. waits_s: of a step, by the lane that was waited for.
        limiting: the lane that is busy most.
        read_bytes, written_bytes: moved per step.
        tensor_bytes: the most that tensors outside of the pages take in a step: activations, gradients in flight, results.
        base_bytes: RAM that Python and its libraries take: of this process; with the kernels' own buffers where they were run here.
        process_bytes: RAM of the process in a step: pages, those tensors, and the base.
        kernels_timed: kernels that were run on this machine, and the seconds that took; kernels_rated: those that could not be.
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
    resume: Phase
    export_ram_bytes: int
    export_bytes: int
    ops: int
    step_s: float
    compute_s: float
    moving_s: float
    steady: bool
    busy: Mapping[str, float]
    waits_s: Mapping[str, float]
    limiting: str
    read_bytes: float
    written_bytes: float
    tensor_bytes: int
    base_bytes: int
    process_bytes: int
    kernels_timed: int
    kernels_timed_s: float
    kernels_rated: int
    fit: Fit
    rates: Rates


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked beyond the run as it is configured.

    Attributes:
        room: the machine's; None: this one's.
        largest: whether to look for the largest batch and depth that fit.
        depth: name of the model's argument that counts its layers; None: a usual one.
    """

    room: Room | None = None
    largest: bool = False
    depth: str | None = None


def forecast(config: Config, rates: Rates, question: Question = Question()) -> Forecast:
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
    argument = depth_argument(config, question.depth)
    need = smallest_budget(make_model, None, config)
    need.check(config.memory.ram)
    base_bytes = _resident_now_bytes()
    kernels = kernels_of(rates)
    with threads_of(config), rehearsed(make_model, config, CostMode(kernels), (rates.ssd_read, rates.ssd_write)) as engine:
        start = _at_start(engine)
        engine.rehearse(config.train.batch, config.train.seq)
        found = _found(engine, rates, kernels, start, need, base_bytes, question.room or room_here(config))
    if not question.largest:
        return found
    room, taken = found.fit.room, found.fit.taken
    fit = replace(
        found.fit, largest_batch=largest_batch(config, room, taken, base_bytes), depth_argument=argument,
        largest_depth=largest_depth(config, room, taken, base_bytes, argument) if argument else None,
    )  # fmt: skip
    return replace(found, fit=fit)


def _found(
    engine: Rehearsal, rates: Rates, kernels: Kernels, start: Phase, need: BudgetNeed, base_bytes: int, room: Room
) -> Forecast:
    """What an engine that has rehearsed its steps tells."""
    config, mover = engine.config, engine.store.mover
    step, commit = _at_step(engine), _at_commit(engine)
    simulated = _simulated(engine)
    timed = kernels if isinstance(kernels, TimedKernels) else None
    busy_cores = torch.get_num_threads() >= len(os.sched_getaffinity(0))
    moving_s = MOVING_S_PER_BYTE * (simulated.read_bytes + simulated.written_bytes) if timed and busy_cores else 0.0
    if timed:
        base_bytes = max(base_bytes, _resident_now_bytes())
    pages_bytes = step.host_pages * mover.arena.page_bytes
    process_bytes = base_bytes + pages_bytes + engine.outside.peak_bytes
    taken = Taken(process_bytes, (commit if commits(config) else step).ssd_bytes)
    return Forecast(
        parameters=sum(parameter.numel() for parameter in engine.model.parameters()),
        ram_bytes=config.memory.ram, page_bytes=mover.arena.page_bytes,
        smallest_ram_bytes=need.smallest_bytes, largest_unit=need.unit, resident_ram_bytes=_resident_bytes(engine),
        start=start, step=step, commit=commit, commits_kept=config.commit.keep,
        resume=Phase(0, 0, commit.ssd_pages, commit.ssd_bytes),
        export_ram_bytes=2 * max(mover.arena.page_bytes, CHUNK_BYTES),
        export_bytes=sum(parameter.numel() * parameter.element_size() for parameter in engine.model.parameters()),
        ops=len(engine.trace.ops), step_s=simulated.step_s + moving_s, compute_s=engine.trace.compute_s, moving_s=moving_s,
        steady=simulated.steady, busy={lane.value: share for lane, share in simulated.busy.items()},
        waits_s=_waits_s(engine, simulated), limiting=simulated.limiting.value,
        read_bytes=simulated.read_bytes, written_bytes=simulated.written_bytes,
        tensor_bytes=engine.outside.peak_bytes, base_bytes=base_bytes, process_bytes=process_bytes,
        kernels_timed=timed.n_timed if timed else 0, kernels_timed_s=timed.spent_s if timed else 0.0,
        kernels_rated=timed.n_others if timed else 0,
        fit=Fit(room, taken, taken.within(room), advice(config, room, taken, pages_bytes, need.smallest_bytes)), rates=rates,
    )  # fmt: skip


def _resident_now_bytes() -> int:
    """RAM of this process, without what is free in its heap."""
    give_back_free_pages(0)
    return int(psutil.Process().memory_info().rss)


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
    phases = (
        ("start", found.start), ("step", found.step), (f"commit, {found.commits_kept} kept: at most", found.commit), ("resume: at most", found.resume),
    )  # fmt: skip
    for name, phase in phases:
        host = f"RAM {phase.host_pages} pages, {format_bytes(phase.host_bytes)}"
        rows.append((name, f"{host}; SSD {phase.ssd_pages} pages, {format_bytes(phase.ssd_bytes)}"))
    rows.append(("export", f"RAM {format_bytes(found.export_ram_bytes)} of buffers; files of {format_bytes(found.export_bytes)}"))
    pages_bytes = found.step.host_pages * found.page_bytes
    rows.append(
        (
            "process, in a step",
            f"{format_bytes(found.process_bytes)}: pages {format_bytes(pages_bytes)}, other tensors {format_bytes(found.tensor_bytes)}, "
            f"Python and libraries {format_bytes(found.base_bytes)}",
        )
    )
    rows += fit_rows(found.fit)
    moving = f"; {found.moving_s:.3f} s by which moves slow it down" if found.moving_s else ""
    rows += [
        ("step, predicted", f"{found.step_s:.3f} s, of which compute {found.compute_s:.3f} s, in {found.ops} ops{moving}"),
        ("busy", ", ".join(f"{lane} {share:.0%}" for lane, share in found.busy.items())),
        ("limited by", found.limiting),
        ("waits a step", ", ".join(f"{lane} {seconds:.3f} s" for lane, seconds in found.waits_s.items())),
    ]
    for what, n_bytes in (("read", found.read_bytes), ("written", found.written_bytes)):
        rows.append((f"SSD bytes {what} a step", f"{format_bytes(n_bytes)} ({n_bytes / found.parameters:.1f} a parameter)"))
    disk = f"SSD read {rates.ssd_read / 1e6:,.0f} MB/s, write {rates.ssd_write / 1e6:,.0f} MB/s"
    if rates.flops is None or rates.ram is None:
        compute = f"{found.kernels_timed} kernels timed here in {found.kernels_timed_s:.1f} s"
        compute += f", {found.kernels_rated} by their flops and bytes" if found.kernels_rated else ""
    else:
        compute = f"{rates.flops / 1e9:,.1f} GFLOP/s, RAM {rates.ram / 1e6:,.0f} MB/s"
    rows.append(("at these rates", f"{compute}, {disk}"))
    return rows


def fit_rows(fit: Fit) -> list[tuple[str, str]]:
    """What fits, and what to change, as (what, value) pairs."""
    taken = f"RAM {format_bytes(fit.taken.ram_bytes)} of {format_bytes(fit.room.ram_bytes)}, disk {format_bytes(fit.taken.disk_bytes)} of {format_bytes(fit.room.disk_bytes)}"
    rows = [("fits", f"{'yes' if fit.fits else 'no'}: {taken}"), *(("to make it fit", line) for line in fit.advice)]
    if fit.largest_batch is not None:
        rows.append(("largest train.batch that fits", str(fit.largest_batch)))
        depth = f"{fit.depth_argument} = {fit.largest_depth}" if fit.depth_argument else "the model has no argument that counts its layers; name one with --depth"
        rows.append(("largest depth that fits", depth))
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
