"""Constants of pagemem that were measured or chosen on one machine: 2 cores, a virtual NVMe disk, torch 2.13 for CPUs.

They are read as ``knobs.NAME`` whenever they are used, so a test overrides one by ``monkeypatch.setattr(knobs, ...)``.
"""

from __future__ import annotations

from typing import Final

from pagemem.units import MiB

#: Bandwidth of page files, bytes/s, assumed until they have moved `TELLING_BYTES`. A guess below most NVMe disks.
ASSUMED_BYTES_PER_S: Final = 1.5e9
#: Bandwidth from host memory to a device, bytes/s, likewise. A guess below PCIe 3.0 with 16 lanes.
ASSUMED_UPLOAD_BYTES_PER_S: Final = 5e9
#: Bytes moved before a bandwidth is taken for measured: four requests of 4 MiB.
TELLING_BYTES: Final = 16 * MiB

#: Seconds' worth of bytes that a limit on bandwidth lets through at once after idling. Chosen.
BURST_S: Final = 0.05

#: Stores under way at a time for a snapshot, beside those that training needs. Chosen.
STORES_AT_A_TIME: Final = 2

#: Part of the frames that storing behind ops on demand keeps clean: twice what reading ahead may fill. Chosen.
WRITE_BEHIND_PART: Final = 4
#: How often the tenants are looked at while ops change as many frames as there are. Chosen.
WRITE_BEHIND_LOOKS: Final = 16

#: With more tenants than this, windows of frames are looked for near the best tenants instead of ranking all of them.
#: Origin: plans for 27M, 112M, 357M and experts are as good as with 256 (10.56, 30.0, 6.75 s a cycle) and
#: take a half to a quarter of the time; with 32 they cost up to 3 % more.
MANY_TENANTS: Final = 64
#: Near so many of the best tenants, at most, once a window is found. Chosen.
LOOKED_AT: Final = 8

#: Of the bytes free on a device, the share that pages may take without a warning. Chosen.
TIGHT_SHARE: Final = 0.85
