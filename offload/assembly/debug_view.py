"""A look inside an engine for tests, benchmarks and bug reports: `Engine.debug`.

Unstable: what is here follows the engine's parts and changes with them, in any version and without notice. Programs
that train use `Engine` alone.
"""

from __future__ import annotations

from offload.assembly.lifetime import EngineState
from offload.assembly.parts import EngineParts


class DebugView:
    """The parts of one engine, for reading. Training thread only.

    Attributes:
        driver, mover: of host memory. page_files: the SSD tier. device_tier: None where compute runs in host memory.
        binder: binds parameters for each call. committer: makes commits durable.
        units: all of them, in the model's order.
    """

    def __init__(self, parts: EngineParts, state: EngineState) -> None:
        self.state = state
        self.store = store = parts.store
        self.driver, self.mover = store.driver, store.mover
        self.page_files, self.device_tier = store.page_files, store.device_tier
        self.binder, self.units = store.binder, store.index.units
        self.updater, self.recompute_choice = parts.updater, parts.recompute_choice
        self.checkpoints, self.committer = parts.checkpoints, parts.checkpoints.committer
