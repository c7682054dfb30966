"""Which path and which place of its page file each frame has, when one tier is spread over several files."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from pagemem.units import ceil_div

IntArray = npt.NDArray[np.int64]

#: A manifest names no more.
MAX_PATHS: Final = 64


class Striping:
    """Deals a tier's frames out to ``n_paths`` files in turn, so that each file is filled without gaps.

    Raises:
        ValueError: there is no path, or more than `MAX_PATHS`.
    """

    def __init__(self, n_paths: int) -> None:
        if not 1 <= n_paths <= MAX_PATHS:
            raise ValueError(f"1 to {MAX_PATHS} paths are supported, not {n_paths}")
        self.n_paths = n_paths

    def locate(self, frames: IntArray) -> tuple[IntArray, IntArray]:
        """Path and file frame of each frame; arrays of the same shape."""
        file_frames, paths = np.divmod(frames, self.n_paths)
        return paths, file_frames

    def file_frames(self, n_frames: int) -> list[int]:
        """How many frames each path's file holds when the tier holds ``n_frames``."""
        return [ceil_div(n_frames - path, self.n_paths) for path in range(self.n_paths)]
