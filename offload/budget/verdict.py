"""Whether a configuration can be trained on this machine: one decision, which `plan`, `doctor` and `launch` share.

It is made of what is certain beforehand: the budget against what the model needs of it at once, and the least that its
states take of RAM, of the limits on this process and of the disks. `plan` knows activations as well, by rehearsing a
step (`offload.forecast.fit`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from offload.budget.need import BudgetNeed
from offload.budget.smallest import FactoryError, smallest_budget
from offload.config import Config
from pagemem.errors import BudgetError
from pagemem.units import format_bytes


@dataclass(frozen=True, slots=True)
class Available:
    """What a machine has for a run, in bytes.

    Attributes:
        ram_bytes: that the process can have. disk_bytes: for page files, those that are there already included.
        device_bytes: for the pages there and for what kernels make; None: a device is a part of RAM, as
            ``cpu-emulated`` is.
        limits: on the memory of this process, by their names.
    """

    ram_bytes: int
    disk_bytes: int
    device_bytes: int | None = None
    limits: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Something that is too small: what there is, and what to change."""

    said: str
    remedy: str

    @property
    def line(self) -> str:
        """Both in one line."""
        return f"{self.said}; {self.remedy}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision.

    Attributes:
        need: what the model needs of ``memory.ram``, or None where that cannot be known before it is built.
        unknown: why it cannot.
        shortages: what is too small; empty where the run can begin.
    """

    need: BudgetNeed | None
    unknown: str
    shortages: tuple[Shortfall, ...]

    def check(self) -> None:
        """Raise BudgetError for the first shortage."""
        if self.shortages:
            raise BudgetError(self.shortages[0].line, self.need.needed_bytes if self.need is not None else 0)


def verdict_of(config: Config, make_model: Callable[[], nn.Module] | None, available: Available) -> Verdict:
    """The decision for a configuration.

    Args:
        make_model: called once, on torch's meta device; None: the configuration names no model.

    Raises:
        ConfigError, ValueError: the model or the optimizer cannot be trained, whatever there is.
    """
    need, unknown = None, "the configuration names no model"
    if make_model is not None:
        try:
            need, unknown = smallest_budget(make_model, None, config), ""
        except FactoryError as error:
            unknown = str(error)
    return decide(config, need, unknown, available)


def decide(config: Config, need: BudgetNeed | None, unknown: str, available: Available) -> Verdict:
    """The decision, by what the model needs."""
    memory, found = config.memory, []
    ram = f"memory.ram {format_bytes(memory.ram)}"
    if need is not None and need.needed_bytes > memory.ram:
        found.append(Shortfall(need.said(memory.ram), need.remedy))
    for name, limit_bytes in available.limits:
        if memory.ram >= limit_bytes:  # Mapped whole, whatever of it is used.
            found.append(
                Shortfall(f"{ram}, {name} is {format_bytes(limit_bytes)}", "lower memory.ram, or raise the limit")
            )
    content_bytes = memory.ram if need is None else need.content_bytes
    # For a device all of it is pinned, whatever of it is used.
    used_bytes = memory.ram if config.device.startswith("cuda") else min(memory.ram, content_bytes)
    if used_bytes > available.ram_bytes:
        used = (
            ram if used_bytes == memory.ram else f"{ram}, of which the model's states take {format_bytes(used_bytes)}"
        )
        said = f"{used}, {format_bytes(available.ram_bytes)} of RAM can be had"
        found.append(Shortfall(said, f"set memory.ram to less than {available.ram_bytes}, or end what uses the memory"))
    if need is not None:
        stored_bytes = content_bytes if commits_at_all(config) else max(0, content_bytes - memory.ram)
        if stored_bytes > available.disk_bytes:
            said = (
                f"page files take at least {format_bytes(stored_bytes)}, the disks of ssd.paths have room for "
                f"{format_bytes(available.disk_bytes)}"
            )
            found.append(Shortfall(said, "free some, or name another disk in ssd.paths"))
    return Verdict(need, unknown, tuple(found))


def commits_at_all(config: Config) -> bool:
    """Whether a run stores all of its states at some time: for commits between steps, or for that at the end of a
    launch."""
    commit = config.commit
    return commit.every_steps is not None or commit.every_s is not None or (commit.at_end and config.output is not None)
