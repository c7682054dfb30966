"""The forecast of a run as a table, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.progress import TextColumn, TimeElapsedColumn

from offload.console.live_bar import LiveBar
from offload.console.tables import print_line, print_rows
from offload.forecast.explained import HEADINGS, explained_rows, title_of
from offload.forecast.explained import as_dict as explained_dict
from offload.forecast.fit import Fit
from offload.forecast.forecast import Forecast
from offload.forecast.step_times import H2D
from offload.forecast.timed_runs import UNDISTURBED
from pagemem.units import format_bytes


@contextmanager
def shown(console: Console, what: str = "plan") -> Iterator[Callable[[str], None]]:
    """Inside, what is being done is shown on a terminal, with the time since the beginning."""
    bar = LiveBar(console, TextColumn(what), TextColumn("{task.description}"), TimeElapsedColumn())
    task = bar.add_task("", total=None)
    with bar:
        yield lambda stage: bar.move(task, description=stage)


def forecast_rows(found: Forecast) -> list[tuple[str, str]]:
    """The table as (what, value) pairs."""
    rows = [
        ("parameters", f"{found.parameters:,}"),
        ("memory.ram", f"{format_bytes(found.ram_bytes)}, pages of {format_bytes(found.page_bytes)}"),
        (
            "smallest memory.ram that works",
            f"{format_bytes(found.smallest_ram_bytes)} ({found.smallest_ram_bytes}), for {found.largest_unit}",
        ),
        ("memory.ram from which nothing moves", f"{format_bytes(found.resident_ram_bytes)}, with pages of this size"),
    ]
    phases = (
        ("start", found.start),
        ("step", found.step),
        (f"commit, {found.commits_kept} kept: at most", found.commit),
        ("resume: at most", found.resume),
    )
    for name, phase in phases:
        host = f"RAM {phase.host_pages} pages, {format_bytes(phase.host_bytes)}"
        if phase.device_pages:
            host = f"device {phase.device_pages} pages, {format_bytes(phase.device_bytes)}; {host}"
        rows.append((name, f"{host}; SSD {phase.ssd_pages} pages, {format_bytes(phase.ssd_bytes)}"))
    rows.append(
        (
            "export",
            f"RAM {format_bytes(found.export_ram_bytes)} of buffers; files of {format_bytes(found.export_bytes)}",
        )
    )
    return [*rows, *memory_rows(found), *fit_rows(found.fit), *step_rows(found), *rate_rows(found)]


def step_rows(found: Forecast) -> list[tuple[str, str]]:
    """The predicted step and what it moves, as (what, value) pairs."""
    times = found.times
    moving = f"; {found.moving_s:.3f} s by which moves slow it down" if found.moving_s else ""
    ops = f"{found.ops} ops"
    rows = [
        ("updates", found.updates),
        (
            "step, predicted",
            f"{times.step_s:.3f} s, of which compute {times.compute_s:.3f} s, in {ops}{moving}",
        ),
        ("busy", ", ".join(f"{lane} {share:.0%}" for lane, share in times.busy.items())),
        ("limited by", times.limiting),
        ("waits a step", ", ".join(f"{lane} {seconds:.3f} s" for lane, seconds in times.waits_s.items())),
    ]
    if found.recomputed_blocks:
        rows.append(
            (
                "recomputed in the backward pass",
                f"{found.recomputed_blocks} of the blocks of the model, which costs less than pages for what they save",
            )
        )
    if found.device_units:
        rows.append(("updated on the device, where their states are", f"{found.device_units} of {found.units} units"))
    for what, n_bytes in (("read", times.read_bytes), ("written", times.written_bytes)):
        rows.append(
            (f"SSD bytes {what} a step", f"{format_bytes(n_bytes)} ({n_bytes / found.parameters:.1f} a parameter)")
        )
    if H2D in times.busy:
        rows.append(("bytes copied to the device a step", format_bytes(times.h2d_bytes)))
    if found.rates.n_ranks > 1:
        part = times.comm_bytes * found.rates.sent_share
        rows.append(
            (
                f"of {found.rates.n_ranks} ranks, each sends a step",
                f"{format_bytes(part)}, at {found.rates.link / 1e6:,.0f} MB/s; all else above is of each rank",
            )
        )
    return rows


def rate_rows(found: Forecast) -> list[tuple[str, str]]:
    """The rates behind the prediction, as (what, value) pairs."""
    rates = found.rates
    disk = f"SSD read {rates.ssd_read / 1e6:,.0f} MB/s, write {rates.ssd_write / 1e6:,.0f} MB/s"
    disk += f", both together {rates.ssd_limit / 1e6:,.0f} MB/s" if rates.ssd_limit is not None else ""
    if rates.flops is None or rates.ram is None:
        compute = f"{found.kernels_timed} kernels timed here in {found.kernels_timed_s:.1f} s"
        compute += f", {found.kernels_rated} by their flops and bytes" if found.kernels_rated else ""
    else:
        compute = f"{rates.flops / 1e9:,.1f} GFLOP/s, RAM {rates.ram / 1e6:,.0f} MB/s"
    if rates.device_ram is not None:
        compute += f", the device's {rates.device_ram / 1e6:,.0f} MB/s"
    up = f", to the device {rates.h2d / 1e6:,.0f} MB/s" if H2D in found.times.busy else ""
    rows = [("at these rates", f"{compute}, {disk}{up}")]
    if rates.source:
        rows.append(("of this machine", rates.source))
    if found.undisturbed_share < UNDISTURBED:
        said = (
            f"kernels had a processor for {found.undisturbed_share:.0%} of the time in which they were timed: "
            "something else computes on this machine"
        )
        rows.append(("disturbed", f"{said}; steps will be faster than predicted, or plan again when it is quiet"))
    return rows


def memory_rows(found: Forecast) -> list[tuple[str, str]]:
    """What the process and, where it has memory of its own, the device hold in a step, as (what, value) pairs."""
    pages = f"pages {format_bytes(found.step.host_pages * found.page_bytes)}"
    on_device, others = (
        f"pages {format_bytes(found.step.device_bytes)}",
        f"other tensors {format_bytes(found.tensor_bytes)}",
    )
    base = f"Python and libraries {format_bytes(found.base_bytes)}"
    own = found.fit.taken.device_bytes
    on_their_way = f"gradients {format_bytes(found.step.host_bytes - found.step.host_pages * found.page_bytes)}"
    parts = (
        [pages, on_their_way, base]
        if own
        else [pages, *([f"device's {on_device}"] if found.step.device_pages else []), others, base]
    )
    rows = [("process, in a step", f"{format_bytes(found.process_bytes)}: {', '.join(parts)}")]
    if own:
        rows.append(("device, in a step", f"{format_bytes(own)}: {on_device}, {others}"))
    return rows


def fit_rows(fit: Fit) -> list[tuple[str, str]]:
    """What fits, and what to change, as (what, value) pairs."""
    taken = (
        f"RAM {format_bytes(fit.taken.ram_bytes)} of {format_bytes(fit.room.ram_bytes)}, disk "
        f"{format_bytes(fit.taken.disk_bytes)} of {format_bytes(fit.room.disk_bytes)}"
    )
    if fit.room.device_bytes is not None:
        taken = f"device {format_bytes(fit.taken.device_bytes)} of {format_bytes(fit.room.device_bytes)}, {taken}"
    rows = [("fits", f"{'yes' if fit.fits else 'no'}: {taken}"), *(("to make it fit", line) for line in fit.advice)]
    if fit.largest_batch is not None:
        rows.append(("largest train.batch that fits", str(fit.largest_batch)))
        depth = (
            f"{fit.depth_argument} = {fit.largest_depth}"
            if fit.depth_argument
            else "the model has no argument that counts its layers; name one with --depth"
        )
        rows.append(("largest depth that fits", depth))
    return rows


def print_forecast(found: Forecast, console: Console, *, as_json: bool) -> None:
    """The table, or one JSON object on one line."""
    if as_json:
        print_line(console, json.dumps(as_dict(found)))
        return
    print_rows("Plan", forecast_rows(found), console)
    if found.explained is not None:
        print_line(console, title_of(found.explained))
        print_rows("Tasks, times in ms", explained_rows(found.explained), console, HEADINGS)
    if not found.times.steady:
        print_line(console, "the plan's cycles did not come to repeat in time: the step is the mean of those simulated")


def as_dict(found: Forecast) -> dict[str, Any]:
    """Plain values, with the bytes moved per parameter beside those per step."""
    plain = asdict(replace(found, explained=None))
    if found.explained is not None:
        plain["explained"] = explained_dict(found.explained)
    else:
        del plain["explained"]
    return {
        **{key: value for key, value in plain.items() if key != "times"},
        **asdict(found.times),
        "limiting": found.times.limiting,
        "read_bytes_per_parameter": found.times.read_bytes / found.parameters,
        "written_bytes_per_parameter": found.times.written_bytes / found.parameters,
    }
