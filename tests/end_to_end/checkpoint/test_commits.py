"""Going on from commits: every bit as if the run had never stopped; which commits are kept, and what they cost in
room."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from committed_runs import SETUPS, SMALL, Run, Setup, assert_same, uninterrupted

import offload
from pagemem.durable.commit_folder import CommitFolder

STEPS = 7


@pytest.fixture(autouse=True, scope="module")
def one_compute_thread() -> object:
    """Threads cost models this small more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def commits(folder: Path) -> dict[int, tuple[int, str | None]]:
    """Number, step and name of every commit on the disk."""
    on_disk = CommitFolder(folder / "pages")
    manifests = [on_disk.read(number) for number in on_disk.numbers()]
    return {manifest.number: (manifest.step, manifest.name) for manifest in manifests}


# ---- bit by bit -----------------------------------------------------------------------------------------------------


#: Each has something of several others.
OFTEN = {
    "random, clipped, micro-batches",
    "gpt, tied, least RAM",
    "gpt, fp16, clipped",
    "conv, momentum",
    "partly trained",
    "random, lock-free",
    "gpt, lock-free, bf16",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.long) for name in SETUPS]
)
def test_a_run_that_stopped_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    """Commits of every second step, in the background; the run ends in the step after one; the next process draws
    otherwise."""
    setup = SETUPS[name]
    losses, state = uninterrupted(setup, tmp_path, STEPS)
    found: dict[int, torch.Tensor] = {}
    for seed, goes_on_after, until in ((7, 0, 3), (8, 2, 5), (9, 4, STEPS)):
        with Run(setup, tmp_path, seed=seed, every_steps=2) as run:
            resumed = run.engine.resume()
            assert (0 if resumed is None else resumed.step) == run.engine.steps == goes_on_after
            run.train(until)
            found.update(run.losses)
            if until == STEPS:
                assert_same(run.state(), state)
    assert_same(found, losses, "loss")


@pytest.mark.parametrize("then", ["random", "random, all in RAM", "random, lock-free"])
@pytest.mark.parametrize("first", ["random", "random, all in RAM", "random, lock-free"])
def test_another_budget_or_update_mode_goes_on_to_the_same_bits(first: str, then: str, tmp_path: Path) -> None:
    losses, state = uninterrupted(SMALL, tmp_path, STEPS)
    with Run(SETUPS[first], tmp_path) as run:
        run.train(4)
        run.engine.save()
        assert_same(run.losses, {step: losses[step] for step in range(1, 5)}, "loss")
    setup = SETUPS[then]
    if setup is SMALL and SETUPS[first] is not SMALL:
        with pytest.raises(offload.BudgetError, match="the commits in .* were made with more") as raised:
            Run(setup, tmp_path, seed=8)
        setup = replace(setup, ram=raised.value.smallest_bytes)
    with Run(setup, tmp_path, seed=8) as run:
        assert run.engine.resume() is not None
        run.train(STEPS)
        assert_same(run.state(), state)


@pytest.mark.parametrize("name", ["random", "gpt", "gpt, lock-free, clipped"])
def test_commits_change_no_bit_of_the_run_that_makes_them(name: str, tmp_path: Path) -> None:
    losses, state = uninterrupted(SETUPS[name], tmp_path, STEPS)
    with Run(SETUPS[name], tmp_path, every_steps=1, keep=1) as run:
        run.train(STEPS)
        assert_same(run.losses, losses, "loss")
        assert_same(run.state(), state)


def test_every_moment_that_is_kept_can_be_gone_on_from(tmp_path: Path) -> None:
    losses, state = uninterrupted(SMALL, tmp_path, STEPS)
    with Run(SMALL, tmp_path) as run:
        for step in range(1, STEPS + 1):
            run.step()
            run.engine.save(f"after {step}", wait=step % 2 == 0)
    for step in (3, 1, STEPS, 4):
        with Run(SMALL, tmp_path, seed=step) as run:
            resumed = run.engine.resume(f"after {step}")
            assert resumed is not None and (resumed.step, resumed.name) == (step, f"after {step}")
            run.train(STEPS)
            assert_same(run.state(), state)
            assert all(torch.equal(loss, losses[at]) for at, loss in run.losses.items())


def test_going_on_inside_one_process_and_again(tmp_path: Path) -> None:
    """After more steps, with a plan under way and another commit in the making."""
    with Run(SMALL, tmp_path) as run:
        run.train(3)
        run.engine.save("three")
        ends = []
        for _ in range(3):
            run.train(6)
            ends.append(run.state())
            run.engine.save(wait=False)
            resumed = run.engine.resume("three")
            assert resumed is not None and run.engine.steps == resumed.step == 3
            run.schedule.load_state_dict(run.schedule.state_dict())
        run.train(6)
        for end in ends:
            assert_same(run.state() | {"numpy": 0, "python": 0}, end | {"numpy": 0, "python": 0})


def test_16_bit_weights_that_were_edited_reach_their_masters_also_after_going_on(tmp_path: Path) -> None:
    setup = SETUPS["gpt, bf16"]
    states = []
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        with Run(setup, folder) as run:
            run.train(3)
            with offload.gathered(run.model.norm), torch.no_grad():
                run.model.norm.weight.mul_(2)
            run.engine.save()
            if not interrupted:
                run.train(5)
                states.append(run.state())
    with Run(setup, folder, seed=8) as run:
        run.engine.resume()
        run.train(5)
        states.append(run.state())
    assert_same(states[1], states[0])


def test_weights_edited_through_views_are_committed(tmp_path: Path) -> None:
    with Run(SMALL, tmp_path) as run:
        run.train(2)
        view = run.model.last.weight.data
        view.mul_(2)
        run.engine.save(wait=False)
        expected = view.clone()
        view.mul_(3)
        del view
        run.train(3)
    with Run(SMALL, tmp_path, seed=3) as run:
        assert run.engine.resume() is not None
        assert torch.equal(run.model.state_dict()["last.weight"], expected)


# ---- which are kept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_unnamed_commits_are_kept_as_asked_and_all_named_ones(keep: int, tmp_path: Path) -> None:
    with Run(SMALL, tmp_path, every_steps=1, keep=keep) as run:
        for step in range(1, 7):
            run.step()
            run.engine.debug.committer.wait()
            if step in (1, 4):
                run.engine.save(f"at {step}")
    unnamed = {7: 5, 8: 6} if keep == 2 else {8: 6} if keep == 1 else {5: 4, 7: 5, 8: 6}
    assert commits(tmp_path) == {2: (1, "at 1"), 6: (4, "at 4")} | {
        number: (step, None) for number, step in unnamed.items()
    }
    with Run(SMALL, tmp_path, keep=keep) as run:
        resumed = run.engine.resume("at 1")
        assert resumed is not None and resumed.step == 1


def test_a_name_given_again_takes_the_earlier_commits_place(tmp_path: Path) -> None:
    with Run(SMALL, tmp_path) as run:
        for _step in (1, 2):
            run.step()
            run.engine.save("best")
        assert commits(tmp_path) == {2: (2, "best")}
    with Run(SMALL, tmp_path) as run:
        resumed = run.engine.resume("best")
        assert resumed is not None and resumed.step == 2


def test_later_commits_of_a_course_that_was_left_go_with_the_next_one(tmp_path: Path) -> None:
    with Run(SMALL, tmp_path, every_steps=1, keep=3) as run:
        for step in range(1, 6):
            run.step()
            run.engine.debug.committer.wait()
            if step in (2, 5):
                run.engine.save(f"at {step}")
    before = commits(tmp_path)
    assert [step for step, name in before.values() if name is None] == [3, 4, 5]
    with Run(SMALL, tmp_path, seed=8, keep=3) as run:
        assert run.engine.resume("at 2") is not None
        assert commits(tmp_path) == before, "nothing goes before there is another one"
        run.train(3)
        number = run.engine.save()
        assert commits(tmp_path) == {n: c for n, c in before.items() if c[1]} | {number: (3, None)}
    with Run(SMALL, tmp_path) as run:
        resumed = run.engine.resume()
        assert resumed is not None and (resumed.number, resumed.step) == (number, 3)


def test_commits_are_due_by_steps_and_by_time(tmp_path: Path) -> None:
    with Run(SMALL, tmp_path, every_s=1e-9) as run:
        assert run.engine.save_if_due() is None, "no step was made yet"
        run.step()
        run.engine.debug.committer.wait()
        assert run.engine.save_if_due() is None, "none since"
        run.step()
    assert [step for step, _ in commits(tmp_path).values()] == [1, 2]
    with Run(SMALL, tmp_path, every_s=1e9) as run:
        run.engine.resume()
        run.train(4)
    assert [step for step, _ in commits(tmp_path).values()] == [1, 2]


# ---- room -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["random", "gpt, bf16", "gpt, lock-free, clipped"])
def test_many_commits_take_no_more_room_than_two(name: str, tmp_path: Path) -> None:
    """Each copy in use is a tensor's own or a commit's; of pages that two left-overs shared, one may be left."""
    setup = SETUPS[name]
    for seed in (7, 8):
        with Run(setup, tmp_path, seed=seed, keep=1) as run:
            run.engine.resume()
            for _ in range(8):
                run.step()
                run.engine.save()
            assert_no_frame_is_lost(run)
            [commit] = run.engine.debug.committer.commits.values()
            owned = sum(-(-tensor.n_bytes // run.engine.debug.store.page_bytes) for tensor in commit.manifest.tensors)
            assert run.engine.debug.mover.ssd.peak_frames <= 3 * owned, (
                "two commits while one is made, and what training stores"
            )


def assert_no_frame_is_lost(run: Run) -> None:
    """Everything in the page files is some tensor's or some commit's."""
    mover = run.engine.debug.mover
    run.engine.drain()
    used = {id(tensor.copy): tensor.copy for tensor in mover.tensors.values() if tensor.copy is not None}
    for commit in run.engine.debug.committer.commits.values():
        used |= {id(stored): stored for stored in commit.copies.values()}
    assert len(mover.ssd.placements) == len(used)


def test_a_commit_writes_what_is_dirty_and_no_more(tmp_path: Path) -> None:
    with Run(Setup(SMALL.case, 16 << 20), tmp_path) as run:
        run.train(3)
        run.engine.save()
        before = run.engine.stats().bytes_written
        run.engine.save("again")
        run.engine.save("and again")
        assert run.engine.stats().bytes_written == before, "nothing has changed since"
        run.step()
        run.engine.save()
        content = sum(
            t.n_bytes for t in run.engine.debug.mover.tensors.values() if t.tag.value != "grad" and t.readable
        )
        assert 0 < run.engine.stats().bytes_written - before <= content


def test_a_run_that_starts_anew_in_a_folder_with_commits_may_not_commit_over_them(tmp_path: Path) -> None:
    with Run(SMALL, tmp_path) as run:
        run.train(2)
        run.engine.save()
        expected = run.state()
    with Run(SMALL, tmp_path, seed=8) as run:
        run.train(3)
        with pytest.raises(offload.CommitError, match="holds commits, and this run did not go on from one"):
            run.engine.save()
        run.train(4)
    assert commits(tmp_path) == {1: (2, None)}
    with Run(SMALL, tmp_path, seed=9) as run:
        assert run.engine.resume() is not None
        found = run.state()
        assert all(found.pop(key) is not None and expected.pop(key) is not None for key in ("numpy", "python"))
        assert_same(found, expected)


def test_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    with Run(SMALL, tmp_path) as run:
        assert run.engine.resume() is None
        with pytest.raises(offload.CommitError, match="no commit named 'best'; there are: none"):
            run.engine.resume("best")
        run.train(1)
        run.engine.save("last")
        with pytest.raises(offload.CommitError, match="no commit named 'best'; there are: 'last'"):
            run.engine.resume("best")
        run.train(2)
