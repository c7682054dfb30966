"""Train PyTorch models larger than memory, out of RAM and SSD.

`prepare` wraps a model and its optimizer for your own training loop, `initialize` makes an engine with ``backward`` and
``step``, and `deferred_init` builds a model that does not fit in RAM.
"""

from offload import starting

starting.begin()  # before the imports that take long
starting.find_own_packages()

from offload.budget.need import BudgetNeed
from offload.budget.smallest import FactoryError, smallest_budget
from offload.callbacks import Callback
from offload.checkpoint.commit_weights import ExportError
from offload.checkpoint.compatibility import Change, Resumed
from offload.choosing.preparation import deferred_init, initialize, prepare
from offload.config import Config, ConfigError
from offload.config_loading import load_config
from offload.cutting.announcing import announce
from offload.cutting.make_cut import gathered
from offload.engine import Engine
from offload.parameters.paged_parameter import PagedParameter
from offload.profiling.stats import MemoryReport, Stats, TierUse
from offload.weights.load import load_weights
from offload.weights.pretrained import from_pretrained
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
    "announce",
    "deferred_init",
    "from_pretrained",
    "gathered",
    "initialize",
    "load_config",
    "load_weights",
    "prepare",
    "smallest_budget",
]
