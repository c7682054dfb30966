"""What lock-free updates take on this machine or at given rates, of the update thread and of training."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import torch
from threadpoolctl import threadpool_limits
from torch.utils._python_dispatch import _disable_current_modes

from offload.forecast.rates import Rates, measured_ram_speed
from offload.forecast.rehearsal import Rehearsal
from offload.forecast.timed_runs import timed_runs, told_s
from optim import knobs
from optim.rules import AdamRule, Batch
from optim.unit import Unit
from scheduler.planning.trace import Op, Trace
from scheduler.planning.update_round import RoundUnit
from scheduler.planning.work import Work

#: Bytes of an update that pass between memory and processor for each element and state, beside those of parameter,
#: gradient and result: read and written.
_STATE_BYTES: Final = 8
_OTHER_BYTES: Final = 16
#: Bytes that pass for each element whose new value is copied into the parameters in use.
_ADOPTED_BYTES: Final = 8
_NUMEL: Final = 1 << 22


def update_s_per_element(n_states: int, rates: Rates, n_threads: int) -> float:
    """Seconds of the update thread for an element: measured, or by the bytes at a given rate."""
    if rates.ram is not None:
        return (_OTHER_BYTES + _STATE_BYTES * n_states) / rates.ram
    return (
        _outside(lambda: _measured_s(n_threads))
        * (_OTHER_BYTES + _STATE_BYTES * n_states)
        / (_OTHER_BYTES + 2 * _STATE_BYTES)
    )


def _outside(measure: Callable[[], float]) -> float:
    """What is measured on a thread of its own, which has its own compute threads and nothing of the rehearsal."""
    found: list[float] = []
    n_threads = torch.get_num_threads()

    def run() -> None:
        torch.set_num_threads(n_threads)
        found.append(measure())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def _measured_s(n_threads: int) -> float:
    """Of Adam's update and its lookahead, piece by piece, of states that are not in the processor's caches."""
    rule = AdamRule(torch.optim.AdamW)
    hyper = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
    with _disable_current_modes(), torch.no_grad(), threadpool_limits(n_threads, user_api="openmp"):
        values = [torch.ones(_NUMEL) for _ in range(4)]
        size = min(knobs.PIECE_NUMEL * n_threads, _NUMEL)
        scratch = torch.empty(2, size)

        def update() -> None:
            for begin in range(0, size * (_NUMEL // size), size):
                parameter, gradient, *states = (value[begin : begin + size] for value in values)
                rule.apply_lookahead((1e-4, 1e-8), -1, parameter, states, scratch[1], scratch[0])
                rule.apply(hyper, Batch([scratch[0]], [gradient], [[state] for state in states], [5]))
                gradient.copy_(scratch[0])

        return told_s(timed_runs(update)) / (size * (_NUMEL // size))


def with_late_costs(work: Work, engine: Rehearsal) -> Work:
    """A rehearsed step with what lock-free updates take: of the update thread, and of the training thread beside its
    kernels. As it is in exact mode."""
    updates, config, rates = work.updates, engine.config, engine.rates
    if updates is None:
        return work
    channels = {channel.unit.parameters.id: channel for channel in engine.channels}
    n_threads, cores = config.update.threads, len(os.sched_getaffinity(0))
    ops = work.trace.ops
    each_s = 0.0
    if channels:
        each_s = update_s_per_element(_n_states(engine.channels[0].unit), rates, n_threads)
    per_byte_s = 1 / (rates.ram or _outside(measured_ram_speed))
    ops_s = [op.duration_s for op in ops]
    slices: list[Op] = []
    units: list[RoundUnit] = []
    for unit in updates.units:
        channel = channels[unit.parameters]
        parts = channel.unit.slices
        timed = zip(unit.ops, parts, strict=True)
        slices += [replace(updates.trace.ops[op], duration_s=part.numel * each_s) for op, part in timed]
        units.append(replace(unit, handed_over=min(max(0, channel.handed_over - 1), len(ops) - 1)))
        ops_s[unit.first_use] += _ADOPTED_BYTES * per_byte_s * sum(part.numel for part in parts)
    if ops_s:  # Gradients are looked at as they come.
        checked_bytes = sum(unit.gradient_bytes for unit in engine.store.index.units if unit.trained)
        ops_s[-1] += 0.0 if config.update.clip_norm is not None else checked_bytes * per_byte_s
    return replace(
        work,
        trace=Trace(tuple(replace(op, duration_s=op_s) for op, op_s in zip(ops, ops_s, strict=True))),
        machine=replace(work.machine, together=min(1.0, cores / (torch.get_num_threads() + n_threads))),
        updates=replace(updates, trace=Trace(tuple(slices)), units=tuple(units)),
    )


def _n_states(unit: Unit) -> int:
    states, numel = unit.slices[0].states, unit.slices[0].numel
    return 0 if states is None else round(states.n_bytes / (4 * numel))
