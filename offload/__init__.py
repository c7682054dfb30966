"""Train PyTorch models larger than memory, out of RAM and SSD.

`prepare` wraps a model and its optimizer for your own training loop, `initialize` makes an engine with ``backward`` and
``step``, and `deferred_init` builds a model that does not fit in RAM.
"""

from __future__ import annotations

from offload import starting

starting.begin()  # before the imports that take long

import importlib
import importlib.util
from pathlib import Path
from typing import Final

#: Top-level packages of this distribution, whose names others use too.
_SIBLINGS: Final = ("pagemem", "scheduler", "optim")


def _check_siblings() -> None:
    """Make sure that our packages, and not foreign ones of the same name, are what gets imported.

    Raises:
        ImportError: one resolves to another distribution's file; the message names it and the remedy.
    """
    home = Path(__file__).resolve().parent.parent
    for name in _SIBLINGS:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if found is None or found.parent.parent != home:
            raise ImportError(
                f"offload needs its own package {name!r} from {home}, but importing it finds {found or 'nothing'}; "
                f"uninstall the other distribution that provides {name!r}, or put {home} first on sys.path"
            )


_check_siblings()

from pagemem.process import interrupts

for _name in _SIBLINGS:
    interrupts.cover(str(importlib.import_module(_name).__file__))
interrupts.cover(
    __file__,
    open_files=(
        "__main__.py",
        "cli.py",
        "launch/train.py",
        "launch/loop.py",
        "launch/profile_run.py",
        "machine/doctor.py",
    ),
)

from offload.budget.need import BudgetNeed
from offload.budget.smallest import FactoryError, smallest_budget
from offload.callbacks import Callback
from offload.checkpoint.commit_weights import ExportError
from offload.checkpoint.resumed import Change, Resumed
from offload.config import Config, ConfigError, load_config
from offload.engine import Engine, initialize, prepare
from offload.parameters.paged_parameter import PagedParameter, gathered
from offload.profiling.stats import MemoryReport, Stats, TierUse
from offload.store.deferred_init import deferred_init
from pagemem.errors import (
    BudgetError,
    ChecksumError,
    CommitError,
    DeviceError,
    DiskFullError,
    NonFiniteError,
    OffloadError,
    RunDirectoryError,
    StaleGradientError,
    StorageError,
)

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "BudgetNeed",
    "Callback",
    "Change",
    "ChecksumError",
    "CommitError",
    "Config",
    "ConfigError",
    "DeviceError",
    "DiskFullError",
    "Engine",
    "ExportError",
    "FactoryError",
    "MemoryReport",
    "NonFiniteError",
    "OffloadError",
    "PagedParameter",
    "Resumed",
    "RunDirectoryError",
    "StaleGradientError",
    "Stats",
    "StorageError",
    "TierUse",
    "deferred_init",
    "gathered",
    "initialize",
    "load_config",
    "prepare",
    "smallest_budget",
]
