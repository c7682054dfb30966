"""Whether a run fits into a machine, how much larger it could be, and what to change if it does not fit.

RAM is the whole process's: pages, other tensors, Python. Tensors outside of the pages grow evenly with the batch and
with the number of equal layers, so two rehearsals of one step each tell how much one row, or one layer more, takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from offload.budget.verdict import Available, commits_at_all
from offload.config import Config, ConfigError
from offload.factories import model_factory
from offload.forecast.kernels import CostMode, RatedKernels
from offload.forecast.rates import Rates
from offload.forecast.rehearsal import rehearsed
from offload.profiling.stats import commit_frames
from pagemem.residency.host_mover import HostMover
from pagemem.residency.mover import Mover
from pagemem.units import format_bytes

#: Names of a model's argument that counts its layers, where none is given.
DEPTHS: Final = ("n_layer", "n_layers", "num_layers", "num_hidden_layers", "layers", "depth")
#: Steps by which a batch found by arithmetic is corrected by rehearsing it.
_CORRECTIONS: Final = 8


@dataclass(frozen=True, slots=True)
class Taken:
    """What a run takes of it."""

    ram_bytes: int
    disk_bytes: int
    device_bytes: int = 0

    @classmethod
    def of(
        cls,
        base_bytes: int,
        pages: tuple[int, int],
        tensor_bytes: int,
        gradient_bytes: int,
        disk_bytes: int,
        room: Available,
    ) -> Taken:
        """By the parts of a process.

        Args:
            base_bytes: Python and its libraries. pages: bytes of those in RAM, and of those on a device. tensor_bytes:
                other tensors of a step.
            gradient_bytes: the most of gradients outside of pages in RAM: some of those tensors, or copies of a
                device's.
        """
        host_bytes, device_bytes = pages
        if room.device_bytes is None:
            return cls(base_bytes + host_bytes + device_bytes + tensor_bytes, disk_bytes)
        return cls(base_bytes + host_bytes + gradient_bytes, disk_bytes, device_bytes + tensor_bytes)

    def missing_bytes(self, room: Available) -> int:
        """Memory by which the room is exceeded, of RAM or of the device, whichever lacks more; below 0: what is
        left."""
        on_device = (
            self.device_bytes - room.device_bytes if room.device_bytes is not None else self.ram_bytes - room.ram_bytes
        )
        return max(self.ram_bytes - room.ram_bytes, on_device)


@dataclass(frozen=True, slots=True)
class Fit:
    """A run in a machine.

    Attributes:
        advice: what to change, most telling first; empty where it fits.
        largest_batch: rows, with everything else as it is; 0: none fits; None: not looked for.
        largest_depth: of the model's argument ``depth_argument``; likewise.
    """

    room: Available
    taken: Taken
    fits: bool
    advice: tuple[str, ...]
    largest_batch: int | None = None
    largest_depth: int | None = None
    depth_argument: str = ""


def commits(config: Config) -> bool:
    """Whether a run makes commits between its steps."""
    return config.commit.every_steps is not None or config.commit.every_s is not None


def commit_pages(config: Config, mover: HostMover) -> int:
    """Page-file pages that a run's commits take beside the newest copies."""
    if commits(config):
        return commit_frames(mover, config.commit.keep)
    return commit_frames(mover, 0) if commits_at_all(config) else 0


def taken_by(config: Config, base_bytes: int, room: Available) -> Taken:
    """What one step of a configuration takes, by rehearsing it.

    Args:
        base_bytes: RAM of Python and its libraries.
        room: whether the device is a part of RAM.
    """
    assert config.model is not None and config.train is not None and config.train.seq is not None
    make_model: Callable[[], nn.Module] = model_factory(config.model)
    with rehearsed(make_model, config, CostMode(RatedKernels(1.0, 1.0)), Rates(1.0, 1.0, 1.0, 1.0, 1.0)) as engine:
        engine.rehearse(config.train.batch, config.train.seq, steps=1)
        store, tier = engine.store, engine.store.device_tier
        on_device = 0 if tier is None else _pages_used(tier.mover)
        disk_pages = _pages_of(store.mover) + commit_pages(config, store.mover)
        pages = _pages_used(store.mover) * store.page_bytes, on_device * store.page_bytes
        gradient_bytes, disk_bytes = engine.peak_gradient_bytes, disk_pages * store.page_bytes
        return Taken.of(base_bytes, pages, engine.tensor_bytes, gradient_bytes, disk_bytes, room)


def _pages_of(mover: Mover) -> int:
    return sum(tensor.n_frames for tensor in mover.tensors.values())


def _pages_used(mover: Mover) -> int:
    return min(mover.arena.n_frames, _pages_of(mover))


def advice(config: Config, room: Available, taken: Taken, pages_bytes: int, smallest_ram_bytes: int) -> tuple[str, ...]:
    """What would make a run fit.

    Args:
        pages_bytes: RAM of the pages in use.
    """
    found = []
    short_bytes = taken.ram_bytes - room.ram_bytes
    if short_bytes > 0:
        lower_bytes = pages_bytes - short_bytes
        if lower_bytes >= smallest_ram_bytes:
            found.append(f"set memory.ram to {lower_bytes} ({format_bytes(lower_bytes)}) or less")
        else:
            found.append(
                f"lower memory.ram (the smallest that works is {smallest_ram_bytes}) is not enough by itself: "
                f"{format_bytes(short_bytes)} are missing"
            )
            found.append(
                "lower train.batch or train.seq, recompute layers (torch.utils.checkpoint), or set memory.activations"
            )
    if room.device_bytes is not None and taken.device_bytes > room.device_bytes:
        over = format_bytes(taken.device_bytes - room.device_bytes)
        found.append(
            f"the device lacks {over}: lower memory.device, train.batch or train.seq, or recompute layers "
            "(torch.utils.checkpoint)"
        )
    if taken.disk_bytes > room.disk_bytes:
        missing = format_bytes(taken.disk_bytes - room.disk_bytes)
        fewer = " or keep fewer commits (commit.keep)" if commits(config) and config.commit.keep > 1 else ""
        found.append(f"free {missing} in the file systems of ssd.paths, name another disk there{fewer}")
    return tuple(found)


def _changed(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def largest_batch(config: Config, room: Available, taken: Taken, base_bytes: int) -> int:
    """The most rows of ``train.batch`` that fit; 0 where none does.

    Args:
        taken: by the configuration as it is; rows take no disk.
    """
    assert config.train is not None
    rows = config.train.batch

    def missing_bytes(n: int) -> int:
        return taken_by(_changed(config, "train", batch=n), base_bytes, room).missing_bytes(room)

    if taken.disk_bytes > room.disk_bytes:
        return 0
    one_bytes = missing_bytes(rows)
    a_row_bytes = max(1.0, (missing_bytes(2 * rows) - one_bytes) / rows)
    found = max(0, rows + int(-one_bytes // a_row_bytes))
    for _ in range(_CORRECTIONS):
        if found and missing_bytes(found) > 0:
            found -= 1
        elif missing_bytes(found + 1) <= 0:
            found += 1
        else:
            break
    return found


def depth_argument(config: Config, named: str | None) -> str:
    """The model's argument that counts its layers; "" where there is none that is known.

    Raises:
        ConfigError: ``named`` is not an argument of the model, or no whole number.
    """
    assert config.model is not None
    arguments: dict[str, Any] = config.model.arguments
    if named is None:
        return next((name for name in DEPTHS if isinstance(arguments.get(name), int)), "")
    if not isinstance(arguments.get(named), int):
        raise ConfigError(f"--depth {named}: model.arguments has {arguments}; name one that is a whole number")
    return named


def largest_depth(config: Config, room: Available, taken: Taken, base_bytes: int, argument: str) -> int:
    """The most layers that fit, by what one more takes; 0 where none does.

    Args:
        taken: by the configuration as it is.
    """
    assert config.model is not None
    given = config.model.arguments
    layers = int(given[argument])

    def at(n: int) -> Taken:
        arguments = {**given, argument: n}
        return taken_by(_changed(config, "model", arguments=arguments), base_bytes, room)

    one, more = at(layers), at(layers + 1)
    by_memory = -taken.missing_bytes(room) // max(1, more.missing_bytes(room) - one.missing_bytes(room))
    # A plan stores a part of what there is, see `Forecast.step`.
    a_layer_bytes = max(1, (more.disk_bytes - one.disk_bytes) * taken.disk_bytes / one.disk_bytes)
    return max(0, layers + min(by_memory, int((room.disk_bytes - taken.disk_bytes) // a_layer_bytes)))
