"""`offload plan FILE`: what a run will take, before it is begun. Nothing is trained and no weight is made.

The step is rehearsed without bytes (`offload.forecast.rehearsal`), which gives units, pages, ops and plan as the engine
would make them; the plan is then simulated (`scheduler.simulation.simulator`) with the bandwidths given. Pages are the
engine's; times are as good as the rates they are computed from.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import psutil  # type: ignore[import-untyped]
import torch

from offload.budget.need import BudgetNeed
from offload.budget.smallest import smallest_budget
from offload.budget.verdict import Available, decide
from offload.config import Config, ConfigError
from offload.factories import model_factory
from offload.forecast.explained import Explained, explain
from offload.forecast.fit import (
    Fit,
    Taken,
    advice,
    commit_pages,
    depth_argument,
    largest_batch,
    largest_depth,
)
from offload.forecast.kernels import CostMode, Kernels, TimedKernels
from offload.forecast.planned import planned
from offload.forecast.rates import Rates, kernels_of, threads_of
from offload.forecast.rehearsal import Rehearsal, rehearsed
from offload.forecast.step_times import StepTimes
from offload.heap import give_back_free_pages
from offload.machine.facts import available_here
from offload.parameters.inner_tensors import all_parameters, is_wrapper, n_elements
from offload.profiling.stats import commit_frames
from pagemem.durable.page_reader import CHUNK_BYTES
from pagemem.frames.page import TensorId
from pagemem.tier import Tier

#: Processor time of the I/O threads on the machine of `benchmarks/README.md`. Where all cores compute, compute is so
#: much longer.
MOVING_S_PER_BYTE: Final = 1.4e-10


@dataclass(frozen=True, slots=True)
class Phase:
    """Bytes of each tier at one point of a run: pages, and in RAM also gradients in flight; the device's are pages
    alone."""

    host_pages: int
    host_bytes: int
    ssd_pages: int
    ssd_bytes: int
    device_pages: int = 0
    device_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Forecast:
    """What `forecast` finds.

    Attributes:
        smallest_ram_bytes: the least ``memory.ram`` that the model can be trained in.
        resident_ram_bytes: ``memory.ram`` from which on nothing moves, with pages of this size.
        start: when the model is built. step: the most during the steps. commit: that, with the commits that are kept.
            resume: when a run has gone on from one, before its first step.
        export_ram_bytes: buffers of `offload export`, beside what Python and its libraries take. export_bytes: of the
            files it writes.
        ops: of one step. times: predicted. moving_s: of them, by which moves slow compute down.
        recomputed_blocks: of the model, computed again in the backward pass instead of having what they save in pages.
        device_units: of all units, those that keep parameters and states on the device and are updated there.
        tensor_bytes: the most that tensors outside of the pages take in a step: activations, gradients in flight,
            results.
        base_bytes: RAM that Python and its libraries take: of this process; with the kernels' own buffers where they
            were run here.
        process_bytes: RAM of the process in a step: pages, those tensors, and the base; where the machine's device has
            memory of its own, without what is there.
        undisturbed_share: of the time in which kernels were timed, the share in which they had a processor; 1 where
            none was timed.
        kernels_timed: kernels that were run on this machine, and the seconds that took; kernels_rated: those that could
            not be.
        updates: the mode of updates; where "auto" stands for it, with why.
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
    times: StepTimes
    moving_s: float
    recomputed_blocks: int
    device_units: int
    units: int
    tensor_bytes: int
    base_bytes: int
    process_bytes: int
    kernels_timed: int
    kernels_timed_s: float
    undisturbed_share: float
    kernels_rated: int
    fit: Fit
    rates: Rates
    updates: str = "exact"
    explained: Explained | None = None


def forecast(
    config: Config,
    rates: Rates,
    room: Available | None = None,
    *,
    largest: bool = False,
    depth: str | None = None,
    explained: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Forecast:
    """Rehearse and simulate the run of a configuration.

    Args:
        config: with the sections model and train; the model takes two int64 tensors of ``train.batch`` rows and
            ``train.seq`` tokens.
        rates: of the machine. progress: called with what is being done.
        room: what the run is to fit into; None: what this machine has, with the limits on this process.
        largest: whether to look for the largest batch and depth that fit.
        depth: name of the model's argument that counts its layers; None: a usual one. explained: tell a step's tasks.

    Raises:
        ConfigError: the configuration is not supported by forecasts; names the key.
        BudgetError: ``memory.ram`` is too small; names the smallest that works.
        RehearsalError, FactoryError: the model cannot be built, or its step not be performed, without values.
    """
    check_forecastable(config)
    model, train = config.model, config.train
    assert model is not None and train is not None and train.seq is not None
    make_model = model_factory(model)
    argument = depth_argument(config, depth)
    progress("the model without bytes")
    need = smallest_budget(make_model, None, config)
    need.check(config.memory.ram)
    base_bytes = _resident_now_bytes()
    kernels = kernels_of(rates, lambda n_timed: progress(f"a step, kernel by kernel: {n_timed} timed"))
    progress("a step without bytes")
    with threads_of(config), rehearsed(make_model, config, CostMode(kernels), rates) as engine:
        mover = engine.store.mover
        start = _phase(engine, mover.host.used_frames, mover.ssd.used_frames)
        engine.rehearse(train.batch, train.seq)
        progress("the plan, followed on paper")
        room = room or available_here(config)
        found = _found(engine, rates, kernels, start, need, base_bytes, room)
        found = replace(found, explained=explain(planned(engine)) if explained else None)
    if not largest:
        return found
    progress("the largest batch and depth")
    return replace(found, fit=_largest(config, room, found.fit, base_bytes, argument))


def _largest(config: Config, room: Available, fit: Fit, base_bytes: int, argument: str) -> Fit:
    return replace(
        fit, largest_batch=largest_batch(config, room, fit.taken, base_bytes), depth_argument=argument,
        largest_depth=largest_depth(config, room, fit.taken, base_bytes, argument) if argument else None,
    )  # fmt: skip


def predicted(engine: Rehearsal, rates: Rates, kernels: Kernels) -> tuple[StepTimes, float]:
    """The times of a rehearsed step, and the seconds of it by which moves slow compute down."""
    times = StepTimes.of(engine)
    slowed = isinstance(kernels, TimedKernels) and torch.get_num_threads() >= len(os.sched_getaffinity(0))
    move_s = MOVING_S_PER_BYTE if rates.move_s_per_byte is None else rates.move_s_per_byte
    moving_s = move_s * (times.read_bytes + times.written_bytes) if slowed else 0.0
    return replace(times, step_s=times.step_s + moving_s), moving_s


def _found(
    engine: Rehearsal,
    rates: Rates,
    kernels: Kernels,
    start: Phase,
    need: BudgetNeed,
    base_bytes: int,
    room: Available,
) -> Forecast:
    config, mover = engine.config, engine.store.mover
    step, commit = _at_step(engine), _at_step(engine, commit_frames(mover, config.commit.keep))
    times, moving_s = predicted(engine, rates, kernels)
    timed = kernels if isinstance(kernels, TimedKernels) else None
    base_bytes = max(base_bytes, _resident_now_bytes()) if timed else base_bytes
    fit = _fit(engine, step, need, base_bytes, room)
    stored, stats = [p for _, p in all_parameters(engine.model) if not is_wrapper(p)], engine.engine.stats()
    return Forecast(
        parameters=n_elements(engine.model),
        ram_bytes=config.memory.ram,
        page_bytes=mover.arena.page_bytes,
        smallest_ram_bytes=need.smallest_bytes,
        largest_unit=need.unit,
        resident_ram_bytes=_resident_bytes(engine),
        start=start,
        step=step,
        commit=commit,
        commits_kept=config.commit.keep,
        resume=Phase(0, 0, commit.ssd_pages, commit.ssd_bytes),
        export_ram_bytes=2 * max(mover.arena.page_bytes, CHUNK_BYTES),
        export_bytes=sum(parameter.numel() * parameter.element_size() for parameter in stored),
        ops=len(engine.driver.follower.trace.ops),
        times=times,
        moving_s=moving_s,
        recomputed_blocks=stats.recomputed_blocks,
        device_units=stats.device_units,
        units=len(engine.store.index.units),
        tensor_bytes=engine.tensor_bytes,
        base_bytes=base_bytes,
        process_bytes=fit.taken.ram_bytes,
        kernels_timed=timed.n_timed if timed else 0,
        kernels_timed_s=timed.spent_s if timed else 0.0,
        undisturbed_share=timed.undisturbed_share if timed else 1.0,
        kernels_rated=timed.n_others if timed else 0,
        fit=fit,
        rates=rates,
        updates=config.update.said,
    )


def _fit(engine: Rehearsal, step: Phase, need: BudgetNeed, base_bytes: int, room: Available) -> Fit:
    """Whether the run fits the room, and what to change if not."""
    config, page_bytes = engine.config, engine.store.page_bytes
    pages_bytes = step.host_pages * page_bytes
    taken = Taken.of(
        base_bytes,
        (pages_bytes, step.device_bytes),
        engine.tensor_bytes,
        engine.peak_gradient_bytes,
        step.ssd_bytes + commit_pages(config, engine.store.mover) * page_bytes,
        room,
    )
    lacks = tuple(shortage.line for shortage in decide(config, need, "", room).shortages)
    changes = advice(config, room, taken, pages_bytes, need.smallest_bytes) or lacks
    return Fit(
        room, taken, taken.missing_bytes(room) <= 0 and taken.disk_bytes <= room.disk_bytes and not lacks, changes
    )


def _resident_now_bytes() -> int:
    """RAM of this process, without what is free in its heap."""
    give_back_free_pages(0)
    return int(psutil.Process().memory_info().rss)


def check_forecastable(config: Config) -> None:
    """Raise ConfigError for what is not forecast."""
    config.require("plan", "model", "train")
    if config.train is not None and config.train.seq is None:
        raise ConfigError(
            "plan needs train.seq: it gives the model two int64 tensors of train.batch rows and train.seq tokens"
        )


# ---- tiers ----------------------------------------------------------------------------------------------------------


def _phase(engine: Rehearsal, host_pages: int, ssd_pages: int, device_pages: int = 0, gradient_bytes: int = 0) -> Phase:
    page_bytes = engine.store.page_bytes
    host_bytes = host_pages * page_bytes + gradient_bytes
    return Phase(host_pages, host_bytes, ssd_pages, ssd_pages * page_bytes, device_pages, device_pages * page_bytes)


def _resident_bytes(engine: Rehearsal) -> int:
    mover = engine.store.mover
    used = set(engine.driver.follower.trace.tensors())
    used |= _late(engine)
    return (
        sum(t.n_frames for t in mover.tensors.values() if t.id in used) * mover.arena.page_bytes
        + engine.store.driver.memories.overhead_bytes
    )


def _late(engine: Rehearsal) -> set[TensorId]:
    """Of the units that lock-free mode's update thread has: states and masters."""
    return {
        tensor.id
        for channel in engine.channels
        for part in channel.unit.slices
        for tensor in (part.states, part.master)
        if tensor is not None
    }


def _at_step(engine: Rehearsal, commits_pages: int = 0) -> Phase:
    """The most during the steps, with pages that commits keep."""
    plan, mover = engine.driver.follower.plan, engine.store.mover
    assert plan is not None
    device_pages = plan.peaks.get(Tier.DEVICE, 0)
    stored = [*plan.stored(), *(plan.updates.stored() if plan.updates is not None else ())]
    ssd_pages = mover.planned_page_file_frames(stored) + commits_pages
    host_pages = plan.peak_frames + engine.engine.debug.updater.state_frames
    return _phase(engine, host_pages, ssd_pages, device_pages, engine.peak_gradient_bytes)
