"""Every error this engine raises at run time, one class per thing a caller can react to.

Bad arguments raise ``ValueError``; a broken internal invariant raises ``AssertionError`` explicitly. An expected
shortage inside the allocator is a return value (`pagemem.frames.page.Shortage`), not an exception.
"""

from __future__ import annotations


class OffloadError(Exception):
    """Base of all run-time failures of the engine."""


class BudgetError(OffloadError):
    """A tier cannot hold what is asked of it. Nothing was moved out for it that was not whole elsewhere.

    Attributes:
        smallest_bytes: the smallest budget that would have served the request, as far as is known when it fails.
    """

    def __init__(self, message: str, smallest_bytes: int) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


class StorageError(OffloadError):
    """A file of the run could not be read or written. Data that was already in a page file is untouched."""


class DiskFullError(StorageError):
    """The file system has no room for a file of the run. Nothing was allocated."""


class ChecksumError(StorageError):
    """Bytes read from a page file are not the bytes that were written there."""


class DeviceError(OffloadError):
    """A device is not there, or is used in a way that its copies cannot be ordered with. Nothing was changed."""


class RankError(OffloadError):
    """Another rank failed, has left, or does something else than this one. Nothing is exchanged any more."""


class RunDirectoryError(OffloadError):
    """A run directory belongs to something else, is in use, or cannot be written. It was not changed."""


class CommitError(OffloadError):
    """A commit is damaged, missing, or not of this model. Nothing was changed by the attempt to use it."""


class DamagedCommitError(CommitError):
    """A file of a commit was read to its end, and is not what was written: only such a commit is ever removed for its
    state."""


class UnknownCommitError(CommitError):
    """What a commit names cannot be told: now, as the system fails, or by this version. Until it can, its pages are not
    to be written."""


class TransitionError(OffloadError):
    """A stateful object was asked for a move that its state does not allow. The state is unchanged."""


class NonFiniteError(OffloadError):
    """A loss or a gradient norm is NaN or infinite. No parameter was changed by the step that produced it."""


class StaleGradientError(OffloadError):
    """A gradient arrived for a parameter whose update of this step has already been applied."""
