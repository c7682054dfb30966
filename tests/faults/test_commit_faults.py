"""Each single call of the system goes wrong once, in a life of a run: an error or none, and always a commit to go on
from.

Whatever the call and whatever goes wrong with it, the run either does what it would have done, or ends with one clear
error in one line, which names the file; it never hangs, and leaves no thread, descriptor or lock. The next process goes
on, bit for bit, from the last commit of which the run had heard that it is durable, or a later one; of an export there
is all or nothing. Of bytes that reached the disk changed, a checksum must tell before they are trained on.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from counted_calls import Call, Fault
from faulty_lives import Life, Told, count, one_thread

#: Of the calls that a fault can befall, every so many go wrong in the short test.
SPARSE = 31
LIVES = {
    "probed": Life(),
    "page cache": Life(direct=False),
    "two paths, no checksums": Life(n_paths=2, checksums=False),
    "lock-free": Life(2 << 20, update={"mode": "lock-free", "max_staleness": 0, "exact_steps": 0}),
}
RANDOM_TRIALS = 300


@pytest.fixture(autouse=True, scope="module")
def one_compute_thread() -> Iterator[None]:
    """See there."""
    yield from one_thread()


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Told, list[Call]]]:
    """What happens in a life when nothing goes wrong, and the calls that are made."""
    found: dict[str, tuple[Told, list[Call]]] = {}

    def of(name: str) -> tuple[Told, list[Call]]:
        if name not in found:
            folder = tmp_path_factory.mktemp("known")
            found[name] = LIVES[name].expected(folder / "alone"), count(LIVES[name], folder / "counted")
        return found[name]

    return of


def one(name: str, folder: Path, at: int, fault: Fault, expected: Told, calls: list[Call]) -> None:
    """One trial; what is wrong says which one it was."""
    fitting = [call for call in calls if call.can(fault)]
    try:
        LIVES[name].trial(folder, at, fault, expected)
    except BaseException as error:
        error.add_note(f"{name}: call {at} of {len(fitting)}, here {fitting[at]}, went wrong: {fault.value}")
        raise
    shutil.rmtree(folder)


@pytest.mark.parametrize("fault", Fault)
def test_some_calls_go_wrong(fault: Fault, tmp_path: Path, known: Callable[[str], tuple[Told, list[Call]]]) -> None:
    expected, calls = known("probed")
    for at in range(list(Fault).index(fault), sum(call.can(fault) for call in calls), SPARSE):
        one("probed", tmp_path / str(at), at, fault, expected, calls)


def note(failures: list[str], trial: Callable[[], None]) -> None:
    """Make a trial and go on, whatever it shows."""
    try:
        trial()
    except (AssertionError, Exception) as error:
        failures.append(f"{'; '.join(error.__notes__)}: {type(error).__name__}: {error}")


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", Fault)
def test_every_call_goes_wrong(
    fault: Fault, tmp_path: Path, known: Callable[[str], tuple[Told, list[Call]]], tally: Callable[..., None]
) -> None:
    expected, calls = known("probed")
    kinds = Counter(call.kind for call in calls if call.can(fault))
    failures: list[str] = []
    for at in range(kinds.total()):
        note(failures, lambda at=at: one("probed", tmp_path / str(at), at, fault, expected, calls))  # type: ignore[misc]
    detail = ", ".join(f"{kind} {number}" for kind, number in kinds.most_common())
    tally(f"I/O faults, every call: {fault.name}", trials=kinds.total(), failures=len(failures), detail=detail)
    assert not failures, "\n".join(failures)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_random_instants_of_all_kinds_of_lives(
    tmp_path: Path, known: Callable[[str], tuple[Told, list[Call]]], tally: Callable[..., None]
) -> None:
    draw, failures, lives = random.Random(20), [], Counter[str]()
    for number in range(RANDOM_TRIALS):
        name = draw.choice(list(LIVES))
        fault = draw.choice([fault for fault in Fault if LIVES[name].can(fault)])
        expected, calls = known(name)
        at = draw.randrange(sum(call.can(fault) for call in calls))
        lives[name] += 1
        note(failures, partial(one, name, tmp_path / str(number), at, fault, expected, calls))
    detail = ", ".join(f"{name} {n}" for name, n in lives.items())
    tally("I/O faults, random instants", trials=RANDOM_TRIALS, failures=len(failures), detail=detail)
    assert not failures, "\n".join(failures)
