"""What a step would be if parts of its forward pass were computed again in the backward pass. Pure.

What autograd saves in a part of the model and goes to pages is CREATEd there and CONSUMEd in the backward pass. If the
part is computed again, only what it reads is saved: the other creations are gone, its forward ops come once more before
the first of what it had saved would be needed, and the memory and the disk have so much less to do.

    forward P   save 1   save 2   forward Q   ...   saved 2   saved 1   backward P       P saved in pages
    forward P   save 1            forward Q   ...   saved 1   forward P   backward P     P computed again; 1 is what it
    reads
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pagemem.frames.page import TensorId
from scheduler.planning.trace import Access, AccessMode, Op, OpKind, Trace


@dataclass(frozen=True, slots=True)
class ForwardPart:
    """A part of a forward pass.

    Attributes:
        ops: of the step, as the training thread performed them while it was in the part.
        input_bytes: of what the part reads, which is saved also where it is computed again.
    """

    ops: range
    input_bytes: int


@dataclass(slots=True)
class _RecomputedPart:
    """What becomes of one part: ops that are gone, and those that come once more, with what they read, before op
    ``before``."""

    gone: set[int] = field(default_factory=set)
    again: list[int] = field(default_factory=list)
    brought: list[int] = field(default_factory=list)
    before: int = -1


def pages(trace: Trace, part: ForwardPart) -> dict[TensorId, int]:
    """What a part saves in pages, and the ops that create it, in order.

    Copies are made when the next op that uses weights is about to begin. So the first ones in a part are another one's,
    and its own last ones come right after it.
    """
    ops = trace.ops
    begin, end = part.ops.start, part.ops.stop
    while begin < end and _created(ops[begin]) is not None:
        begin += 1
    while begin < end < len(ops) and _created(ops[end]) is not None:
        end += 1
    found = ((_created(ops[index]), index) for index in range(begin, end))
    return {tensor: index for tensor, index in found if tensor is not None}


def recomputed(trace: Trace, parts: Sequence[ForwardPart], n_bytes: Mapping[TensorId, int]) -> Trace:
    """The step in which some parts are computed again instead of having what they save in pages.

    Args:
        trace: with durations. An op that consumes lasts as long as the one that created, which copied as much; the rest
            of its time is compute's that followed.
        parts: without ops in common.
        n_bytes: sizes of the tensors.
    """
    changes = [_change(trace, part, n_bytes) for part in parts]
    gone = {index for change in changes for index in change.gone}
    moved = {index for change in changes for index in change.brought}
    inserted: dict[int, list[_RecomputedPart]] = defaultdict(list)
    for change in changes:
        if change.before >= 0:
            inserted[change.before].append(change)
    copies_s = _copies_s(trace)
    made: list[Op] = []
    last_until: list[int] = []  # for each old op, the last new one so far
    old_until: list[int | None] = []
    for index, op in enumerate(trace.ops):
        for change in inserted.get(index, ()):
            for other in [*change.brought, *change.again]:
                made.append(replace(trace.ops[other], duration_s=copies_s.get(other, trace.ops[other].duration_s)))
                old_until.append(None)
        if index not in gone and index not in moved:
            made.append(op)
            old_until.append(op.until)
        elif made and index in copies_s:
            made[-1] = replace(made[-1], duration_s=made[-1].duration_s + op.duration_s - copies_s[index])
        last_until.append(len(made) - 1)
    for index, until in enumerate(old_until):
        made[index] = replace(
            made[index], until=index if until is None else max(index, last_until[min(until, len(last_until) - 1)])
        )
    return Trace(tuple(made))


def _change(trace: Trace, part: ForwardPart, n_bytes: Mapping[TensorId, int]) -> _RecomputedPart:
    change, kept_bytes = _RecomputedPart(), 0
    saved = pages(trace, part)
    stays: set[TensorId] = set()
    for tensor, index in saved.items():
        if kept_bytes < part.input_bytes:
            kept_bytes += n_bytes[tensor]
            stays.add(tensor)
        else:
            change.gone.add(index)
    if not change.gone:
        return change
    change.again = [index for index in part.ops if _computes(trace.ops[index])]
    for index, tensor in _consumptions(trace, max(saved.values()) + 1, set(saved)):
        change.before = index if change.before < 0 else change.before
        if tensor in stays:
            change.brought.append(index)
        else:
            change.gone.add(index)
    return change


def _consumptions(trace: Trace, begin: int, wanted: set[TensorId]) -> Iterator[tuple[int, TensorId]]:
    """From op ``begin`` on, those that consume the tensors wanted, each once."""
    for index in range(begin, len(trace.ops)):
        tensor = _consumed(trace.ops[index])
        if tensor in wanted:
            wanted.remove(tensor)
            yield index, tensor
            if not wanted:
                return


def _copies_s(trace: Trace) -> dict[int, float]:
    """Seconds of each op that consumes which are the copy's own."""
    created_s: dict[TensorId, float] = {}
    found: dict[int, float] = {}
    for index, op in enumerate(trace.ops):
        created, consumed = _created(op), _consumed(op)
        if created is not None:
            created_s[created] = op.duration_s
        elif consumed is not None:
            found[index] = min(op.duration_s, created_s.get(consumed, 0.0))
    return found


def _computes(op: Op) -> bool:
    return op.kind is OpKind.FORWARD and all(access.mode is AccessMode.READ for access in op.accesses)


def _created(op: Op) -> TensorId | None:
    """What a forward op does nothing but create."""
    return _only(op.accesses, AccessMode.CREATE) if op.kind is OpKind.FORWARD else None


def _consumed(op: Op) -> TensorId | None:
    """What a backward op does nothing but consume."""
    return _only(op.accesses, AccessMode.CONSUME) if op.kind is OpKind.BACKWARD else None


def _only(accesses: Sequence[Access], mode: AccessMode) -> TensorId | None:
    return accesses[0].tensor if len(accesses) == 1 and accesses[0].mode is mode else None
