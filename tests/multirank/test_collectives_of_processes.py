"""Collectives between processes: right to the bit for every mesh, and ended by whatever ends a rank."""

from __future__ import annotations

import os
import signal
import time

import collective_bodies as bodies
import pytest
from rank_processes import RankProcesses, on_processes


@pytest.mark.parametrize("n_ranks", [2, pytest.param(3, marks=pytest.mark.long), 4])
def test_collectives_of_every_mesh(n_ranks: int) -> None:
    assert on_processes(n_ranks, bodies.all_collectives) == [[]] * n_ranks


def test_ranks_agree_while_they_gather() -> None:
    assert on_processes(2, bodies.agreeing_beside_a_gather) == [True, True]


CODE = "import collective_bodies as bodies; bodies.waiting()"


@pytest.mark.parametrize("call", ["gather", pytest.param("agree", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("stops", "rank 0 (process {0} on {1}): the disk is full"),
        ("raises", "rank 0 (process {0} on {1}) raised ValueError: a bad batch"),
        pytest.param("ends", "rank 0 (process {0} on {1}) has ended, and rank", marks=pytest.mark.long),
    ],
)
def test_what_ends_a_rank_ends_the_waits_of_all(what: str, said: str, call: str) -> None:
    ranks = RankProcesses(3, CODE, (what, call))
    began_s = time.monotonic()
    _, *others = ranks.end()
    assert time.monotonic() - began_s < 60
    wanted = said.format(ranks.processes[0].pid, os.uname().nodename)
    for ended in others:
        assert ended.result.startswith(f"RankError: {wanted}"), ended.result


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "has died, or its connection"),
        pytest.param(signal.SIGSTOP, "has been silent for", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("call", ["reduce_scatter", pytest.param("exchange", marks=pytest.mark.long)])
def test_a_rank_that_is_killed_or_stopped_is_named(number: signal.Signals, said: str, call: str) -> None:
    ranks = RankProcesses(3, CODE, ("hangs", call))
    first = ranks.processes[0]
    assert first.stdout is not None and first.stdout.readline().strip() == bodies.RUNNING
    time.sleep(1)
    first.send_signal(number)
    began_s = time.monotonic()
    try:
        for process in ranks.processes[1:]:
            process.wait(40)
    finally:
        first.kill()
    assert time.monotonic() - began_s < 30
    _, *others = ranks.end()
    for ended in others:
        assert ended.result.startswith(f"RankError: rank 0 (process {first.pid}"), ended.result
        assert said in ended.result
