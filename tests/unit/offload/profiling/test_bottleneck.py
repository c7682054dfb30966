"""The verdict of a profile names what took the time and a setting that changes it."""

from __future__ import annotations

from typing import Any

import pytest

from offload.profiling.bottleneck import bottleneck

MIB = 1 << 20


def summary(compute: float, mode: str = "exact", limit: float | None = None, **waits: float) -> dict[str, Any]:
    """Figures of ten seconds: shares of compute, and of waits by lane."""
    return {
        "steps": 4,
        "mode": mode,
        "elapsed_s": 10.0,
        "ssd_limit_mb_per_s": limit,
        "lanes": {"compute": {"share": compute}, "waits": {"share": sum(waits.values())}},
        "wait_causes": [{"lane": lane, "total_s": 10 * share} for lane, share in waits.items()],
        "plan": {"read_bytes": {"measured": 3 * MIB}, "written_bytes": {"measured": 2 * MIB}},
        "tiers": {"host": {"budget_bytes": 20 * MIB}},
    }


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        (
            summary(0.2, read=0.3, write=0.4),
            (
                "The disk bounds the step: 70% of the time is waiting, 20% compute; 3.0 MiB are read and 2.0 MiB are "
                "written in a step, so raise memory.ram above 20.0 MiB, or add a disk to ssd.paths, or "
                'set update.mode to "lock-free".'
            ),
        ),
        (
            summary(0.7, "lock-free", 150, read=0.2),
            (
                "70% of the time is compute, but 20% goes to waiting for the disk; 3.0 MiB are read and 2.0 MiB are "
                "written in a step, so raise memory.ram above 20.0 MiB, or raise ssd.limit_mb_per_s above 150."
            ),
        ),
        (
            summary(0.3, "lock-free", update=0.5, read=0.1),
            (
                "The updater bounds the step: 50% of the time is waiting, 30% compute; raise update.max_staleness, or "
                "update.threads."
            ),
        ),
        (
            summary(0.3, h2d=0.4),
            (
                "Copies to the device bound the step: 40% of the time is waiting, 30% compute; raise memory.device, so "
                "that fewer bytes are copied in a step."
            ),
        ),
        (summary(0.97, read=0.01), "Compute bounds the step: 97% of the time, and waits for memory 1.0%; "),
        (
            summary(1.0),
            "Compute bounds the step: 100% of the time, and waits for memory 0.0%; memory.ram may be smaller.",
        ),
        (
            summary(0.2, read=0.05),
            "Work outside of the model bounds the step: 75% of the time is neither compute nor a wait",
        ),
        ({**summary(0.5), "steps": 0}, "No whole step was recorded: record at least one."),
    ],
)
def test_the_largest_share_and_its_remedy_are_named(figures: dict[str, Any], said: str) -> None:
    assert bottleneck(figures).startswith(said)


def plain(at_peak: dict[str, int], engine_peak: int | None) -> dict[str, Any]:
    """Figures of training without the engine."""
    engine = [] if engine_peak is None else [{"peak_bytes": engine_peak}]
    found = {"at_peak": at_peak, "peak_bytes": sum(at_peak.values()), "engine": engine, "engine_cannot": "no rule"}
    return {"steps": 1, "plain": found}


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        (
            plain({"activation": 60, "moment": 40}, 25),
            "Activations take 60% of the peak of 100 B: recompute them with ",
        ),
        (plain({"activation": 60, "moment": 40}, 25), "; with the engine the peak can be 25 B (75% less)."),
        (plain({"moment": 60, "temporary": 40}, 101), "; the engine would not lower the peak."),
        (plain({"temporary": 60}, 60), "Temporary tensors take 100% of the peak of 60 B: use a smaller batch; "),
        (plain({"moment": 60}, None), "; the engine cannot train this as it is: no rule."),
        (plain({}, None), "No tensor was seen."),
    ],
)
def test_plain_training_is_told_what_its_peak_is_made_of(figures: dict[str, Any], said: str) -> None:
    assert said in bottleneck(figures)
