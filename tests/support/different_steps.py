"""Steps that differ from their plans: ops left out, put in, replaced, made again, beside the step or in a pass of their
own, announcements, and views that are kept for a while."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Final

from hypothesis import strategies as st
from training_rig import Rig

#: A place in the step, what to do there, and with which op.
Edits = list[tuple[int, str, str]]
KINDS: Final = ("leave out", "insert", "replace", "leave out more", "again", "aside", "pass", "announce", "hold")


def edits_of(ops: st.SearchStrategy[str]) -> st.SearchStrategy[Edits]:
    """What becomes of a step."""
    return st.lists(st.tuples(st.integers(0, 11), st.sampled_from(KINDS), ops), max_size=4)


def letters(op: str) -> list[str]:
    """The tensors of an op."""
    return [word[0] for word in op.removeprefix("u: ").split()]


def perform(r: Rig, step: Sequence[str], changes: Edits, pass_of: Callable[[str], Sequence[str]]) -> None:
    """Make a step with so many differences.

    Args:
        pass_of: the ops of a pass that is made where an edit says so, by the edit's op.
    """
    left_out: set[int] = set()
    view = None
    for place, what, _ in changes:
        if what.startswith("leave out"):
            left_out |= set(range(place, place + (5 if what.endswith("more") else 1)))
    for place, op in enumerate(step):
        here = [(what, other) for at, what, other in changes if at == place]
        for what, other in here:
            _put_in(r, what, other, pass_of)
        if place not in left_out:
            replaced = [other for what, other in here if what == "replace"]
            r.op(replaced[0] if replaced else op)
            if any(what == "again" for what, _ in here):
                r.op(op)
        held = [letters(other)[0] for what, other in here if what == "hold"]
        # On some ranks, perhaps: what is there depends on the time that copies took.
        if held and r.tensors[held[0]].readable and view is None:
            view = r.lease(held[0])  # somebody keeps a view for a while
    del view
    gc.collect(0)
    r.driver.end_step(repeatable=True)


def _put_in(r: Rig, what: str, other: str, pass_of: Callable[[str], Sequence[str]]) -> None:
    """Do what comes before an op of the step."""
    if what == "insert":
        r.op(other)
    elif what == "aside":
        with r.driver.untraced():
            r.op(other)
    elif what == "pass":
        with r.driver.evaluating():
            for op in pass_of(other):
                r.op(op)
    elif what == "announce":
        r.driver.announce([r.tensors[letter].id for letter in letters(other)])
