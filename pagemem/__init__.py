"""What memory there is and where bytes live: pages, budgets, the host arena, page files, and moves between them."""

from pagemem.budget import Budget, BudgetShortage, Reservation
from pagemem.devices.arena import HostArena
from pagemem.errors import (
    BudgetError,
    ChecksumError,
    DeviceError,
    DiskFullError,
    NonFiniteError,
    OffloadError,
    RunDirectoryError,
    StaleGradientError,
    StorageError,
    TransitionError,
)
from pagemem.files.page_file import PageFiles
from pagemem.files.requests import Route
from pagemem.folders.run_directory import RunDirectory
from pagemem.frames.allocator import PageAllocator
from pagemem.frames.page import Extent, FrameId, Placement, Run, Shortage, TensorId
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.telemetry.events import Event, EventKind, EventLog, EventSink, NullSink
from pagemem.tier import Tag, Tier

__all__ = [
    "Budget",
    "BudgetError",
    "BudgetShortage",
    "ChecksumError",
    "DeviceError",
    "DiskFullError",
    "Event",
    "EventKind",
    "EventLog",
    "EventSink",
    "Extent",
    "FrameId",
    "HostArena",
    "Mover",
    "NonFiniteError",
    "NullSink",
    "OffloadError",
    "PageAllocator",
    "PageFiles",
    "PagedTensor",
    "Placement",
    "Reservation",
    "Residency",
    "Route",
    "Run",
    "RunDirectory",
    "RunDirectoryError",
    "Shortage",
    "StaleGradientError",
    "StorageError",
    "Tag",
    "TensorId",
    "Tier",
    "TransitionError",
]
