"""What a resumed run resumed from, and which settings differ from those of the commit."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

_NEW: Final = "the new one holds"
#: What holds, where it is not the new value.
_HOLDS: Final = {
    "seed": "random generators go on as the commit has them; the new one is for data that asks for it",
    "memory.page": "pages stay as the commit has them",
}


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that differs from the commit's; as text, one line.

    Attributes:
        key: of the configuration, or of a parameter group.
        then, now: the values.
        holds: which of them holds from here on, in words.
    """

    key: str
    then: Any
    now: Any
    holds: str

    def __str__(self) -> str:
        return f"{self.key}: {reprlib.repr(self.then)} -> {reprlib.repr(self.now)}; {self.holds}"


@dataclass(frozen=True, slots=True)
class Resumed:
    """The commit that a run resumed from.

    Attributes:
        step: optimizer steps made.
        number, name, created: of the commit; the name is None for an unnamed one.
        passed_over: what is wrong with newer commits, which were damaged.
        changed: settings that differ from those of the commit, and which value holds.
    """

    step: int
    number: int
    name: str | None
    created: str
    passed_over: tuple[str, ...] = ()
    changed: tuple[Change, ...] = ()


def config_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Keys that two resolved configurations (`Config.model_dump`) both have, with other values.

    What the optimizer was given is compared by `hyper_changes`: it need not be the configuration's.
    """
    before, after = _flat(then), _flat(now)
    return [
        Change(key, before[key], after[key], _HOLDS.get(key, _NEW))
        for key in after
        if key in before and before[key] != after[key] and not key.startswith("optimizer.")
    ]


def hyper_changes(
    then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], *, kept: bool = False
) -> list[Change]:
    """Hyper-parameters that the parameter groups were given at first then, and are given now.

    A key whose values changed alike in all groups is listed once.

    Args:
        kept: the run keeps its own; otherwise the commit's hold.
    """
    found: dict[str, list[tuple[Any, Any] | None]] = {}
    for place, (before, after) in enumerate(zip(then, now, strict=True)):
        for key in after:
            if key in before and before[key] != after[key]:
                found.setdefault(key, [None] * len(now))[place] = before[key], after[key]
    holds = _NEW if kept else "the commit's holds; set it in optimizer.param_groups after resume() for another"
    changes = []
    for key, pairs in found.items():
        if all(pair == pairs[0] for pair in pairs) and pairs[0] is not None:
            changes.append(Change(f"optimizer.{key}", *pairs[0], holds))
        else:
            changes += [
                Change(f"optimizer.{key} of group {place}", *pair, holds)
                for place, pair in enumerate(pairs)
                if pair is not None
            ]
    return changes


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted names; a section that is not there is the value None."""
    found: dict[str, Any] = {}
    for name, section in config.items():
        if not isinstance(section, Mapping):
            found[name] = section
            continue
        found[name] = "given"
        found.update((f"{name}.{key}", value) for key, value in section.items())
    return found
