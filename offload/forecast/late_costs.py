"""What lock-free updates take on this machine or at given rates, and the tasks of a rehearsed engine's late units."""

from __future__ import annotations

import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import torch
from threadpoolctl import threadpool_limits
from torch.utils._python_dispatch import _disable_current_modes

from offload.forecast.late_updates import LateSpec, LateTask, LateTaskKind, LateUnit
from offload.forecast.rates import Rates, measured_ram_speed
from offload.forecast.rehearsal import Rehearsal
from optim import knobs
from optim.lockfree.updater import LockFreeUpdater
from optim.rules import AdamRule, Batch
from optim.unit import Unit

#: Bytes of an update that pass between memory and processor for each element and state, beside those of parameter,
#: gradient and result: read and written.
_STATE_BYTES: Final = 8
_OTHER_BYTES: Final = 16
#: Bytes that pass for each element whose new value is copied into the parameters in use.
_ADOPTED_BYTES: Final = 8
_NUMEL: Final = 1 << 22
_RUNS: Final = 3


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
        took_s = []
        for _ in range(_RUNS):
            began_s = time.perf_counter()
            for begin in range(0, _NUMEL, size):
                parameter, gradient, *states = (value[begin : begin + size] for value in values)
                rule.apply_lookahead((1e-4, 1e-8), -1, parameter, states, scratch[1], scratch[0])
                rule.apply(hyper, Batch([scratch[0]], [gradient], [[state] for state in states], [5]))
                gradient.copy_(scratch[0])
            took_s.append(time.perf_counter() - began_s)
    return statistics.median(took_s) / _NUMEL


def late_spec(engine: Rehearsal, rates: Rates) -> LateSpec | None:
    """What `simulate_late` is to be told of a rehearsed engine; None in exact mode."""
    updater = engine.engine.debug.updater
    if not isinstance(updater, LockFreeUpdater):
        return None
    config, ops = engine.config, engine.driver.follower.trace.ops
    first_use: dict[int, int] = {}
    for place, op in enumerate(ops):
        for access in op.accesses:
            first_use.setdefault(access.tensor, place)
    n_threads, cores = config.update.threads, len(os.sched_getaffinity(0))
    n_states = _n_states(engine.channels[0].unit) if engine.channels else 0
    each_s = update_s_per_element(n_states, rates, n_threads) if engine.channels else 0.0
    per_byte_s = 1 / (rates.ram or _outside(measured_ram_speed))
    ops_s = [op.duration_s for op in ops]
    units, number = [], 0
    for channel in engine.channels:
        resident = [number + k in updater.windows.resident for k in range(len(channel.unit.slices))]
        number += len(resident)
        handed_over = min(max(0, channel.handed_over - 1), len(ops) - 1)
        used = first_use.get(channel.unit.parameters.id, 0)
        units.append(LateUnit(used, handed_over, _tasks(channel.unit, resident, each_s)))
        ops_s[used] += _ADOPTED_BYTES * per_byte_s * sum(part.numel for part in channel.unit.slices)
    if ops_s:  # Gradients are looked at as they come.
        checked_bytes = sum(unit.gradient_bytes for unit in engine.store.index.units if unit.trained)
        ops_s[-1] += 0.0 if config.update.clip_norm is not None else checked_bytes * per_byte_s
    limit = math.inf if rates.ssd_limit is None else rates.ssd_limit
    return LateSpec(
        ops_s, units, min(rates.ssd_read, limit), min(rates.ssd_write, limit),
        rates.ssd_limit is not None, config.update.max_staleness,
        min(1.0, cores / (torch.get_num_threads() + n_threads)),
    )  # fmt: skip


def _n_states(unit: Unit) -> int:
    states, numel = unit.slices[0].states, unit.slices[0].numel
    return 0 if states is None else round(states.n_bytes / (4 * numel))


def _tasks(unit: Unit, resident: Sequence[bool], each_s: float) -> list[LateTask]:
    tasks: list[LateTask] = []
    for part, stays in zip(unit.slices, resident, strict=True):
        n_bytes = sum(tensor.n_bytes for tensor in (part.states, part.master) if tensor is not None)
        if stays or not n_bytes:
            tasks.append(LateTask(LateTaskKind.UPDATE, "update", 0, part.numel * each_s))
            continue
        at = len(tasks)
        tasks += [
            LateTask(LateTaskKind.LOAD, "ssd_read", n_bytes, 0.0),
            LateTask(LateTaskKind.UPDATE, "update", 0, part.numel * each_s, (at,)),
            LateTask(LateTaskKind.STORE, "ssd_write", n_bytes, 0.0, (at + 1,)),
        ]
    return tasks
