"""A look inside an engine for tests, benchmarks and bug reports: `Engine.debug`.

Unstable: what is here follows the engine's parts and changes with them, in any version and without notice. Programs
that train use `Engine` alone.
"""

from __future__ import annotations

from offload.assembly.lifetime import EngineState
from offload.assembly.parts import EngineParts
from offload.checkpoint.committer import Committer
from offload.parameters.binder import Binder
from offload.store.device_tier import DeviceTier
from optim.unit import Unit
from pagemem.files.page_file import PageFiles
from pagemem.residency.host_mover import HostMover
from scheduler.execution.driver import Driver


class DebugView:
    """The parts of one engine, for reading. Training thread only."""

    def __init__(self, parts: EngineParts, state: EngineState) -> None:
        self.state = state
        self.store = parts.store
        self.updater = parts.updater
        self.checkpoints = parts.checkpoints
        self.recompute_choice = parts.recompute_choice

    @property
    def driver(self) -> Driver:
        """The driver of host memory."""
        return self.store.driver

    @property
    def mover(self) -> HostMover:
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
