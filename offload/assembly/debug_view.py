"""A look inside an engine for tests, benchmarks and bug reports: `Engine.debug`.

Unstable: what is here follows the engine's parts and changes with them, in any version and without notice. Programs
that train use `Engine` alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from offload.activations.policy import RecomputeChoice
from offload.checkpoint.checkpoints import Checkpoints
from offload.checkpoint.committer import Committer
from offload.parameters.binder import Binder
from offload.store.device_tier import DeviceTier
from offload.store.page_store import PageStore
from optim.unit import Unit
from optim.updater import Updater
from pagemem.files.page_file import PageFiles
from pagemem.residency.mover import Mover
from scheduler.execution.driver import Driver


@dataclass(frozen=True, slots=True)
class DebugView:
    """The parts of one engine, for reading. Training thread only.

    Attributes:
        recompute_choice: None unless ``memory.activations`` is set and ``memory.recompute`` is "auto".
    """

    store: PageStore
    updater: Updater
    checkpoints: Checkpoints
    recompute_choice: RecomputeChoice | None

    @property
    def driver(self) -> Driver:
        """The driver of host memory."""
        return self.store.driver

    @property
    def mover(self) -> Mover:
        """What moves pages between host memory and SSD."""
        return self.store.mover

    @property
    def page_files(self) -> PageFiles:
        """The SSD tier."""
        return self.store.page_files

    @property
    def binder(self) -> Binder:
        """What binds parameters for each call."""
        return self.store.binder

    @property
    def units(self) -> list[Unit]:
        """All units, in the model's order."""
        return self.store.index.units

    @property
    def device_tier(self) -> DeviceTier | None:
        """The device tier, or None where compute runs in host memory."""
        return self.store.device_tier

    @property
    def committer(self) -> Committer:
        """What makes commits durable."""
        return self.checkpoints.committer
