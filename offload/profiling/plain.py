"""`offload profile --plain module:callable`: what takes the memory of training that does not use the engine, and what
it would save.

The callable is called without arguments and returns ``(model, optimizer, step)``, of which ``step()`` makes one whole
training step: forward, backward, ``optimizer.step()`` and ``zero_grad()``. Nothing is asked of it beyond that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from torch import nn

from offload.config import ConfigError
from offload.console.tables import print_rows
from offload.factories import calls_of, factory_of
from offload.profiling.plain_savings import savings
from offload.profiling.plain_watch import KEPT, PlainWatch
from offload.profiling.profile import (
    WRITTEN,
    check_profile_folder,
    check_steps,
    model_name,
    open_profile_folder,
    write_profile,
)  # fmt: skip
from offload.profiling.summary import Context, summarize
from pagemem.units import format_bytes

#: Told by the summary's "mode".
PLAIN: Final = "plain"
#: In which optimizers make their states and caches fill; the later ones are timed.
WARM_UP_STEPS: Final = 4
_TIMED_STEPS: Final = 3
_TOP_MODULES: Final = 5

Training = tuple[nn.Module, torch.optim.Optimizer, Callable[[], object]]


def profile_plain(reference: str, steps: int, to: Path, console: Console) -> dict[str, Any]:
    """Make some steps of the training that ``reference`` names, record ``steps`` more, and write their profile; returns
    its summary.

    Raises:
        ConfigError: ``steps`` is not positive, there is no such callable, or it returns something else.
        RunDirectoryError: ``to`` holds something other than a profile; nothing was changed.
        Whatever the callable and its steps raise.
    """
    check_steps(steps)
    make = factory_of("--plain", reference, {})
    check_profile_folder(to)
    with calls_of("--plain", reference):
        made = make()
    model, optimizer, step = _training(reference, made)
    with calls_of("--plain", f"{reference}: step()"):
        unwatched_s = _warm_up(step)
    console.print(f"{WARM_UP_STEPS} steps made; recording {steps} more", highlight=False)
    open_profile_folder(to)
    watch = PlainWatch(model, optimizer)
    with watch, calls_of("--plain", f"{reference}: step()"):
        for _ in range(steps):
            step()
    recording = watch.recording()
    if len(recording.step_ends_s) != steps:
        raise ConfigError(
            f"--plain {reference}: {steps} steps made {len(recording.step_ends_s)} updates of the optimizer returned; "
            "a step makes one"
        )
    findings = _findings(reference, model, optimizer, watch, unwatched_s)
    summary = summarize(recording, Context(reference, model_name(model), PLAIN), findings)
    write_profile(to, recording, summary)
    print_rows("Profile", plain_rows(summary), console)
    console.print(f"{WRITTEN} {to}", highlight=False, markup=False, soft_wrap=True)
    return summary


def _training(reference: str, made: object) -> Training:
    if isinstance(made, tuple) and len(made) == 3:
        model, optimizer, step = made
        if isinstance(model, nn.Module) and isinstance(optimizer, torch.optim.Optimizer) and callable(step):
            return model, optimizer, step
    given = ", ".join(type(part).__name__ for part in made) if isinstance(made, tuple) else type(made).__name__
    raise ConfigError(
        f"--plain {reference} returns ({given}); it must return (model, optimizer, step): nn.Module, "
        "torch.optim.Optimizer, callable"
    )


def _warm_up(step: Callable[[], object]) -> float:
    took_s = []
    for _ in range(WARM_UP_STEPS):
        began_s = time.perf_counter()
        step()
        took_s.append(time.perf_counter() - began_s)
    return statistics.median(took_s[-_TIMED_STEPS:])


def _findings(
    reference: str, model: nn.Module, optimizer: torch.optim.Optimizer, watch: PlainWatch, unwatched_s: float
) -> dict[str, Any]:
    engine, why_not = [], ""
    try:
        engine = [asdict(option) for option in savings(model, optimizer, watch.at_peak)]
    except ValueError as error:
        why_not = str(error)
    return {
        "of": reference,
        "unwatched_step_s": unwatched_s,
        "peak_bytes": watch.at_peak.total(),
        "at_peak": {tag.value: n_bytes for tag, n_bytes in watch.at_peak.items() if n_bytes},
        "modules": [
            {"name": name, **{tag.value: tags.get(tag, 0) for tag in KEPT}}
            for name, tags in watch.bytes_by_module().items()
        ],
        "engine": engine,
        "engine_cannot": why_not,
    }  # fmt: skip


def plain_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary as (what, value) pairs, for the terminal."""
    plain = summary["plain"]
    step_s = summary["plan"]["step_s"]["measured"]
    rows = [
        ("steps", f"{summary['steps']}, {step_s:.3f} s each while watched, {plain['unwatched_step_s']:.3f} s before"),
        ("tensors at the peak", f"{format_bytes(plain['peak_bytes'])}: {_by_size(plain['at_peak'])}"),
    ]
    for name, tier in summary["tiers"].items():
        rows.append((f"{name} peak", f"{format_bytes(tier['peak_bytes'])}, mean {format_bytes(tier['mean_bytes'])}"))
    largest = sorted(plain["modules"], key=lambda row: -_held(row))[:_TOP_MODULES]
    for number, row in enumerate(largest, start=1):
        tags = {tag: n_bytes for tag, n_bytes in row.items() if tag != "name" and n_bytes}
        rows.append((f"module {number}", f"{row['name']}: {format_bytes(_held(row))}: {_by_size(tags)}"))
    for choice in plain["engine"]:
        spared = choice["activations_bytes"]
        budget = f"memory.ram {format_bytes(choice['ram_bytes'])}" + (
            "" if spared is None else f", memory.activations {format_bytes(spared)}"
        )
        moved = (
            f"at most {format_bytes(choice['read_bytes'])} read and {format_bytes(choice['written_bytes'])} written a "
            "step"
        )
        share = 1 - choice["peak_bytes"] / choice["plain_bytes"]
        change = f"{abs(share):.0%} {'less' if share >= 0 else 'more'}"
        rows.append((f"engine, {budget}", f"peak {format_bytes(choice['peak_bytes'])} ({change}), {moved}"))
    if plain["engine_cannot"]:
        rows.append(("the engine", f"cannot train this as it is: {plain['engine_cannot']}"))
    return [*rows, ("bottleneck", summary["bottleneck"])]


def _held(row: dict[str, Any]) -> int:
    return sum(value for tag, value in row.items() if tag != "name")


def _by_size(tags: dict[str, int]) -> str:
    return ", ".join(f"{tag} {format_bytes(n)}" for tag, n in sorted(tags.items(), key=lambda row: -row[1]))
