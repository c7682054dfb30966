"""Numbers of this package that were found by measuring. Read at each use, so a test overrides one by
``monkeypatch.setattr(knobs, "PIECE_NUMEL", 4096)``.
"""

from __future__ import annotations

#: Elements that a thread of lock-free mode updates at a time: a multiple of what rounding must not see
#: (`optim.unit.SLICE_ALIGN_NUMEL`), and so few that parameters, gradients, states and scratch of all of them fit in a
#: core's cache. Origin: the machine of benchmarks/README.md.
PIECE_NUMEL: int = 1 << 17

#: Seconds for which the end of a program waits for the update thread where nobody has closed the engine. Origin:
#: chosen, well above the update of one slice.
EXIT_PATIENCE_S: float = 10.0

#: Adam's learning rate for the mean gradient of n steps is n to this power times one step's. Origin: losses with 2, 3
#: and 4 merged steps, benchmarks/README.md, "Lock-free updates on a slow disk".
MERGED_LR_POWER: float = 0.25

#: Bytes of gradients of bound units from which on their updates are made in one call. Larger units are updated one by
#: one, while their gradients are in a core's cache. Origin: chosen, about the cache of a core.
BATCH_BYTES: int = 4 << 20
