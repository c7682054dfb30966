"""Numbers of this package that were found by measuring on one machine (two cores of an EPYC, one virtual disk;
docs/schedule.md). Read at each use, so a test overrides one by ``monkeypatch.setattr(knobs, "KEPT_SHARES", ())``.
"""

from __future__ import annotations

#: Share of the bandwidths seen so far that a plan relies on: what a disk gives beside computing varies. Origin:
#: such plans wait as little at the full bandwidth, and less at half of it, in simulation; in runs no difference was
#: measured.
RELIABLE_SHARE: float = 0.7

#: Bandwidth of the comm lane, bytes/s, assumed until it has moved something. A guess at ten-gigabit Ethernet.
ASSUMED_COMM_BYTES_PER_S: float = 1e9

#: Seconds that a byte moved beside computing adds to a step. Origin: I/O threads take a core for 0.2 s a GB, checksums
#: included, and the threads that compute wait for the one that is held up.
MOVE_S_PER_BYTE: float = 2e-10

#: Seconds in steps of which stalls are compared: below it the predicted clock is not to be trusted.
STALL_QUANTUM_S: float = 0.0005

#: Shares of the frames that are given to tensors for good, one plan for each.
KEPT_SHARES: tuple[float, ...] = (0.4, 0.55, 0.65, 0.75, 0.82)

#: The one share that is tried where a step has more ops than `MANY_OPS`: reading its trace ahead takes seconds then.
ONE_SHARE: float = 0.75
MANY_OPS: int = 1000

#: Part of the frames that reading ahead of ops on demand may fill with what is not used yet.
READ_AHEAD_PART: int = 8

#: Tensors beyond the present one that are looked at for reading ahead. Chosen.
READ_AHEAD_TENSORS: int = 16

#: Uses within which neighbours were used where a pass is seen: a layer's bases and adapters alternate. Chosen.
RECENT_USES: int = 16

#: Uses after which what was read ahead was not wanted: so many kinds of tensors alternate in an update. Chosen.
STALE_USES: int = 64

#: Ops, times tiers, from which on a step is long enough for restoring a placement to be a small part of it, so that
#: few steps are read ahead.
VERY_MANY_OPS: int = 2500

#: Ops ahead in its plan in which a step that differs from it is looked for: several layers' worth.
RESYNC_OPS: int = 64

#: Plans kept, by the ops of their steps: as many as buckets of length, or phases of a loop, alternate in practice.
KEPT_PLANS: int = 8

#: Of so many steps, those that no step was like before, up to which each new kind of step gets a plan at once. Above,
#: as where every step takes other experts, planning would cost more than it saves.
NOVEL_STEPS: int = 3

#: How many times as long as the longer of two steps a step with the ops of both may be, where each step is a new one
#: and one plan is to serve all. Chosen: experts of 16, of which half are used at a time, come below it.
JOINED_GROWTH: float = 1.5

#: Part of the ops of such a plan which a kind of step that comes again has to have to be served by it: else it gets a
#: plan of its own. Chosen: most steps of a mixture of experts leave out a few of them.
JOINED_SERVES: float = 0.9

#: Kinds of steps that are known to have come before.
SIGNATURES_SEEN: int = 64
