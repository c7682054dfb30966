"""Constants of offload that were measured or chosen on one machine: 2 cores, a virtual NVMe disk, torch 2.13 for CPUs.

They are read as ``knobs.NAME`` whenever they are used, so a test overrides one by ``monkeypatch.setattr(knobs, ...)``.
"""

from __future__ import annotations

from typing import Final

from pagemem.units import GiB, KiB, MiB

#: With fewer bytes than this free, the heap is left as it is: mapping the pages anew costs a small model more than a
#: percent of a step. Measured.
WORTH_TRIMMING_BYTES: Final = 96 * MiB

#: Saved storages below this stay with autograd: they cost more than they free. Chosen.
LEAST_SAVED_BYTES: Final = 64 * KiB
#: Most bytes of a saved storage in one paged tensor. Chosen.
MOST_CHUNK_BYTES: Final = 4 * MiB
#: One part in so many of the limit on saved tensors is for storages on their way down from a device: enough to copy one
#: while compute makes the next ones. Chosen.
LEAVING_SHARE: Final = 4
#: Share by which a step has to be cheaper by plan for blocks to be recomputed: the steps without a plan that the change
#: costs. Chosen.
LEAST_RECOMPUTE_GAIN: Final = 0.01
#: How many shares of the eligible blocks are planned. Chosen.
RECOMPUTE_SHARES: Final = 4

#: Least and most parameters (elements) that one slice of optimizer states covers, by update mode: in lock-free mode
#: several slices are in memory at a time, beside all gradients. Chosen.
SLICE_NUMEL: Final = {"exact": (1 << 14, 1 << 20), "lock-free": (1 << 14, 1 << 18)}
#: Budgets from here on have larger slices, in proportion: each slice is an op, and a step of a hundred thousand ops is
#: planned for hours to gain nothing. Measured.
LARGE_BUDGET_BYTES: Final = 4 * GiB
#: The most times that slices grow so.
MOST_SLICE_GROWTH: Final = 32

#: How many times the largest of the streamed units the device keeps room for: one in use, and the next ones on their
#: way. Chosen.
WORKING_UNITS: Final = 4
