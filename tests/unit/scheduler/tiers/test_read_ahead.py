"""Reading ahead of ops on demand: what is begun and what is not, whose frames it takes, and who hears of its errors."""

from __future__ import annotations

import string
import threading
from collections.abc import Iterator, Sequence

import pytest
from fake_page_files import TIMEOUT_S, Held
from gated_mover import Gates, opened
from training_rig import Rig, rig

from pagemem.errors import StorageError
from pagemem.frames.page import FrameId
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.tier import Tag
from scheduler import knobs
from scheduler.execution.plan_follower import Mode
from scheduler.tiers.on_demand import OnDemand
from scheduler.tiers.read_ahead import ReadAhead

LETTERS = string.ascii_uppercase[:12]


class Pass:
    """Tensors of one page each, all in page files, and reading ahead among them.

    Attributes:
        coming: reads that were begun ahead, by letter, the first begun first; they end when the test says.
    """

    def __init__(self, gates: Gates, letters: str = LETTERS, tags: Sequence[Tag] = (Tag.PARAM,)) -> None:
        self.files, self.mover = gates.files, gates.mover
        self.tensors: dict[str, PagedTensor] = {}
        for number, letter in enumerate(letters):
            self.tensors[letter] = gates.stored(number + 1, letter)
            self.tensors[letter].tag = tags[number % len(tags)]
        self.ahead = ReadAhead(self.mover)
        self.ahead.set_order(self.tensors.values())
        self.coming: dict[str, Held] = {}
        self._n_ops = 0

    def use(self, letters: str) -> str:
        """Use tensors one after another, bringing each to the last of the free frames; returns what was begun ahead."""
        begun = ""
        for letter in letters:
            if letter in self.coming:
                self.coming.pop(letter).open()
            known = [*self.in_order_of_begin(), letter]
            with self.mover.changed:
                tensor = self.tensors[letter]
                self.ahead.op_begins([tensor.id])
                if tensor.frame is None:
                    self.mover.start_load(tensor, FrameId(max(self.free())))
                    self.files.take("read").open()
                self.ahead.follow(tensor)
                self._n_ops += 1
                self.mover.tenants.used(tensor, self._n_ops)
            for name in (name for name in self.in_order_of_begin() if name not in known):
                self.coming[name] = self.files.take("read")
                begun += name
        return begun

    def let_come(self) -> None:
        """End all reads that are on their way."""
        while self.coming:
            self.coming.pop(next(iter(self.coming))).open()

    def free(self) -> list[int]:
        """Frames that nobody has."""
        book = self.mover.host
        return [frame for frame in range(book.n_frames) if book.owner(FrameId(frame)) is None]

    def there(self) -> str:
        """Letters of the tensors that have frames."""
        return "".join(name for name, tensor in self.tensors.items() if tensor.frame is not None)

    def in_order_of_begin(self) -> list[str]:
        """Letters of what was begun ahead and not used since."""
        return [self.mover.tensors[tensor].name for tensor in self.ahead._begun]


@pytest.fixture
def gates() -> Iterator[Gates]:
    """Sixteen frames, of which two may be read ahead."""
    with opened(16) as made:
        yield made


@pytest.mark.parametrize(
    ("uses", "begun"),
    [
        ("ABC", "DE"), ("LKJ", "IH"), ("DEF", "GH"), ("ALBLC", "DE"), ("JKL", ""), ("CBA", ""), ("AB", ""),
        ("ACE", ""), ("BAC", ""), ("AAA", ""), ("ABB", ""), ("ABDC", "E"),
    ],
)  # fmt: skip
def test_after_three_neighbours_in_order_the_next_two_are_begun(gates: Gates, uses: str, begun: str) -> None:
    assert Pass(gates).use(uses) == begun


def test_a_pass_goes_on_as_what_was_begun_is_used(gates: Gates) -> None:
    found = Pass(gates)
    assert [found.use(letter) for letter in "ABCDEF"] == ["", "", "DE", "F", "G", "H"]
    assert "".join(found.coming) == "GH", "what is on its way counts as well as what is there"


def test_a_pass_that_turns_round_is_followed_back(gates: Gates) -> None:
    found = Pass(gates, "ABCDEF")
    found.use("ABCDEF")
    for letter in "ABC":
        found.mover.drop(found.tensors[letter])
    assert [found.use(letter) for letter in "FEDC"] == ["", "", "CB", "A"]


def test_neighbours_used_long_ago_are_no_pass(gates: Gates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs, "RECENT_USES", 4)
    found = Pass(gates)
    assert found.use("ABLLLC") == ""
    assert found.use("GLHI") == "JK"


def test_each_kind_of_tensor_has_a_pass_of_its_own(gates: Gates) -> None:
    found = Pass(gates, tags=(Tag.PARAM, Tag.MOMENT))
    assert found.use("ABCDE") == "GI", "A, C and E are of one kind, B and D of another"


def test_what_nobody_put_in_order_is_left_alone(gates: Gates) -> None:
    found = Pass(gates)
    found.ahead.set_order([found.tensors[letter] for letter in "ABCD"])
    assert found.use("IJK") == "" and found.use("ABC") == "D"


def test_tensors_of_another_mover_are_left_out(gates: Gates) -> None:
    found = Pass(gates)
    with opened() as others:
        other = others.stored(7, "other")
        found.ahead.set_order([other])
        assert other.id == found.tensors["A"].id and found.use("ABC") == ""


def test_a_pass_ends_at_a_tensor_that_is_gone(gates: Gates) -> None:
    found = Pass(gates)
    found.mover.forget(found.tensors["E"])
    assert found.use("ABC") == "D"


def test_what_reads_as_zeros_is_not_begun(gates: Gates) -> None:
    found = Pass(gates)
    found.mover.discard(found.tensors["D"])
    assert found.use("ABC") == "E"


@pytest.mark.parametrize(("uses", "begun"), [("EABC", "D"), ("DABC", "E"), ("DEABC", "")])
def test_what_lies_between_counts_for_the_limit(gates: Gates, uses: str, begun: str) -> None:
    assert Pass(gates).use(uses) == begun


def test_what_was_not_used_counts_for_the_limit_until_it_is_stale(
    gates: Gates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knobs, "STALE_USES", 4)
    found = Pass(gates)
    assert found.use("ABC") == "DE"
    assert found.use("LKJ") == "", "D and E are as much as may be ahead"
    assert found.use("KJ") == "IH"


def test_a_tensor_larger_than_the_limit_is_not_begun(gates: Gates) -> None:
    found = Pass(gates, "ABC")
    large = gates.stored(9, "large", n_pages=3)
    found.ahead.set_order([*found.tensors.values(), large])
    assert found.use("ABC") == "" and large.frame is None


def test_clean_tensors_used_longest_ago_make_room(gates: Gates) -> None:
    found = Pass(gates)
    gates.dirty(99, 0, "blocker", n_pages=10)
    assert found.use("LKFABC") == "DE"
    assert found.there() == "ABCDEF", "L and K left"
    found.let_come()


@pytest.mark.parametrize("how", ["clean", "dirty", "pinned", "leased", "storing"])
def test_what_may_not_leave_at_once_stays(how: str) -> None:
    with opened(8) as gates:
        found = Pass(gates, "ABCD")
        blocker = gates.dirty(99, 0, "blocker", n_pages=5)
        held = None
        if how != "dirty":
            gates.mover.start_store(blocker)
            write = gates.files.take("write")
            if how == "storing":
                held = write
            else:
                write.open()
        view = gates.lease(blocker) if how == "leased" else None
        blocker.pins += how == "pinned"
        found.use("AB")
        for letter in "AB":
            found.tensors[letter].pins += 1
        assert found.use("C") == ("D" if how == "clean" else "")
        assert (blocker.frame is None) is (how == "clean") and gates.files.idle(), "nothing is stored for it"
        for letter in "AB":
            found.tensors[letter].pins -= 1
        blocker.pins -= how == "pinned"
        del view
        if held is not None:
            held.open()
        found.let_come()


def test_a_tensor_never_leaves_for_one_farther_ahead() -> None:
    with opened(24) as gates:
        found = Pass(gates)
        gates.dirty(99, 0, "blocker", n_pages=19)
        found.use("EDAB")
        for letter in "AB":
            found.tensors[letter].pins += 1
        assert found.use("C") == "" and found.there() == "ABCDE", "E was used longest ago, and is next but one"
        for letter in "AB":
            found.tensors[letter].pins -= 1
        assert found.use("C") == "F" and found.there() == "BCDEF"
        found.let_come()


def test_an_op_keeps_its_own_tensors() -> None:
    with opened(8) as gates:
        found = Pass(gates, "ABCDZ")
        blocker = gates.dirty(99, 0, "blocker", n_pages=4)
        found.use("ZAB")
        with gates.mover.changed:
            found.ahead.op_begins([found.tensors[letter].id for letter in "CZAB"])
            gates.mover.start_load(found.tensors["C"], FrameId(found.free()[0]))
            gates.files.take("read").open()
            found.ahead.follow(found.tensors["C"])
        assert found.there() == "ABCZ" and blocker.frame is not None and gates.files.idle()


def test_a_load_ahead_that_fails_is_heard_of_by_who_wants_the_tensor(gates: Gates) -> None:
    found = Pass(gates)
    assert found.use("ABC") == "DE"
    found.coming.pop("D").fail(StorageError("damaged"))
    found.let_come()
    gates.mover.monitor.check()
    assert found.tensors["D"].state is Residency.STORED and found.tensors["E"].state is Residency.CLEAN
    assert found.use("C") == "", "it is not tried again before it is used"
    gates.mover.start_load(found.tensors["D"], FrameId(found.free()[0]))
    gates.files.take("read").fail(StorageError("damaged"))
    assert found.use("LKJ") == "", "after an error nothing is begun"
    with pytest.raises(StorageError, match="^damaged$"):
        gates.mover.monitor.check()


# ---- under a driver -------------------------------------------------------------------------------------------------


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Letters of what drivers read ahead, in order."""
    found: list[str] = []
    plain = Mover.start_load

    def start_load(mover: Mover, tensor: PagedTensor, frame: FrameId, **how: bool) -> None:
        if tensor.tentative:
            found.append(tensor.name)
        plain(mover, tensor, frame, **how)

    monkeypatch.setattr(Mover, "start_load", start_load)
    return found


def in_page_files(of: Rig) -> None:
    """Have all tensors in page files only, with a pattern in each."""
    of.driver.memories.set_order(of.tensors.values())
    for letter in of.tensors:
        of.op(f"{letter}w")
    of.driver.evict_all()
    of.driver.end_step(repeatable=False)


def test_an_evaluation_reads_ahead_and_reads_nothing_twice(ahead: list[str]) -> None:
    with rig(16, string.ascii_uppercase) as r:
        in_page_files(r)
        for _ in range(2):
            ahead.clear()
            before = r.files.n_reads
            r.read_all()
            assert "".join(ahead) == string.ascii_uppercase[3:] and r.files.n_reads - before == 26
        ahead.clear()
        with r.driver.untraced():
            for letter in reversed(string.ascii_uppercase):
                r.op(f"{letter}r")
        assert "".join(ahead) == "JIHGFEDCBA", "from K on all are still there"


def test_tensors_created_anew_are_not_read(ahead: list[str]) -> None:
    with rig(16, string.ascii_uppercase) as r:
        in_page_files(r)
        ahead.clear()
        for letter in string.ascii_uppercase:
            r.op(f"{letter}c")
        assert not ahead and not r.files.n_reads


def test_steps_by_plan_read_nothing_ahead(ahead: list[str]) -> None:
    ops = [f"{letter}r" for letter in string.ascii_uppercase]
    with rig(16, string.ascii_uppercase) as r:
        in_page_files(r)
        r.step(*ops)
        assert ahead and r.driver.follower.mode is Mode.PLANNED
        ahead.clear()
        for _ in range(3):
            r.step(*ops)
        assert not ahead and r.driver.follower.deviations == 0
        r.read_all()


def test_a_large_tensor_takes_back_what_was_read_ahead(ahead: list[str]) -> None:
    with rig(16, LETTERS, pages={"L": 16}) as r:
        in_page_files(r)
        ahead.clear()
        for letter in "ABC":
            r.op(f"{letter}r")
        assert "".join(ahead) == "DE"
        r.op("Lr")
        assert r.resident() == "L"
        r.read_all()


def test_moving_a_tensor_out_does_not_wait_for_a_read_ahead_that_failed(gates: Gates) -> None:
    found, on_demand = Pass(gates), OnDemand(gates.mover, lambda: None)
    assert found.use("ABC") == "DE"
    begun = threading.Event()

    def move_out() -> None:
        with gates.mover.changed:
            begun.set()
            on_demand.move_out(found.tensors["D"])

    moved = gates.training.submit(move_out)
    assert begun.wait(TIMEOUT_S)
    with gates.mover.changed:
        pass  # it waits by now, which gives the lock up
    found.coming.pop("D").fail(StorageError("damaged"))
    moved.result(TIMEOUT_S)
    gates.mover.monitor.check()
    assert found.tensors["D"].state is Residency.STORED
    found.let_come()
