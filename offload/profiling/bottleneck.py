"""What bounds the steps of a profile, and what to change: one sentence, from the figures of its summary."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from pagemem.units import format_bytes

#: Share of the time from which waits are what to change first, even where compute takes more.
_NOTABLE_WAITS: Final = 0.1
_LANES: Final = {"read": "the disk", "write": "the disk", "h2d": "copies to the device", "update": "the updater"}
_UPDATER_REMEDY: Final = "raise update.max_staleness, or update.threads"
_DEVICE_REMEDY: Final = "raise memory.device, so that fewer bytes are copied in a step"
_PLAIN_REMEDIES: Final = {
    "activation": "recompute them with torch.utils.checkpoint, or page them with memory.activations of the engine",
    "temporary": "use a smaller batch",
}


def bottleneck(summary: dict[str, Any]) -> str:
    """The verdict of a profile.

    Args:
        summary: everything else of `offload.profiling.summary.summarize`.
    """
    if not summary["steps"]:
        return "No whole step was recorded: record at least one."
    if "plain" in summary:
        return _of_plain(summary["plain"])
    waits: Counter[str] = Counter()
    for cause in summary["wait_causes"]:
        waits[_LANES.get(cause["lane"], "page moves")] += cause["total_s"] / summary["elapsed_s"]
    compute, waiting = (summary["lanes"][lane]["share"] for lane in ("compute", "waits"))
    outside = max(0.0, 1 - compute - waiting)
    what, share = max(waits.items(), key=lambda item: item[1], default=("nothing", 0.0))
    if waiting >= min(_NOTABLE_WAITS, compute):
        remedy = _remedy(what, summary)
        if share < compute:
            return f"{compute:.0%} of the time is compute, but {share:.0%} goes to waiting for {what}; {remedy}."
        verb = "bound" if what in ("copies to the device", "page moves") else "bounds"
        return (
            f"{what.capitalize()} {verb} the step: {share:.0%} of the time is waiting, {compute:.0%} compute; {remedy}."
        )
    if outside > compute:
        return (
            f"Work outside of the model bounds the step: {outside:.0%} of the time is neither compute nor a wait; "
            "look at data loading, evaluation and what the loop does between steps."
        )
    gain = "memory.ram may be smaller" if not waiting else "more memory would gain no more than that"
    return f"Compute bounds the step: {compute:.0%} of the time, and waits for memory {waiting:.1%}; {gain}."


def _remedy(what: str, summary: dict[str, Any]) -> str:
    if what == "the updater":
        return _UPDATER_REMEDY
    if what == "copies to the device":
        return _DEVICE_REMEDY
    moved = " and ".join(
        f"{format_bytes(summary['plan'][key]['measured'])} are {verb}"
        for key, verb in (("read_bytes", "read"), ("written_bytes", "written"))
    )
    host = summary["tiers"].get("host", {}).get("budget_bytes")
    remedies = [f"raise memory.ram above {format_bytes(host)}" if host else "raise memory.ram"]
    if summary["ssd_limit_mb_per_s"] is not None:
        remedies.append(f"raise ssd.limit_mb_per_s above {summary['ssd_limit_mb_per_s']:g}")
    else:
        remedies.append("add a disk to ssd.paths")
    if summary["mode"] == "exact":
        remedies.append('set update.mode to "lock-free"')
    return f"{moved} in a step, so {', or '.join(remedies)}"


def _of_plain(plain: dict[str, Any]) -> str:
    tag, n_bytes = max(plain["at_peak"].items(), key=lambda item: item[1], default=("", 0))
    if not n_bytes:
        return "No tensor was seen."
    tensors = "Temporary tensors" if tag == "temporary" else f"{tag.capitalize()}s"
    said = f"{tensors} take {n_bytes / plain['peak_bytes']:.0%} of the peak of {format_bytes(plain['peak_bytes'])}"
    remedy = _PLAIN_REMEDIES.get(tag, "page them with memory.ram of the engine")
    if not plain["engine"]:
        return f"{said}: {remedy}; the engine cannot train this as it is: {plain['engine_cannot']}."
    least = min(plain["engine"], key=lambda option: option["peak_bytes"])
    less = 1 - least["peak_bytes"] / plain["peak_bytes"]
    with_engine = f"with the engine the peak can be {format_bytes(least['peak_bytes'])} ({less:.0%} less)"
    return f"{said}: {remedy}" + (f"; {with_engine}." if less > 0 else "; the engine would not lower the peak.")
