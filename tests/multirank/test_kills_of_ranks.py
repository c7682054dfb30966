"""Ranks that are killed at any instant, one or all of them, and go on, with as many or as one process: no step of a
commit is lost, and the bits are those of a run that was never killed."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import engine_bodies as bodies
import pytest
from engine_ranks import trained_plainly
from rank_processes import RankProcesses
from tied_model import ADAMW, loss_of, steps_of, tied_model

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
CODE = "import engine_bodies as bodies; bodies.goes_on()"
N_STEPS, N_KILLS = 200, 8


def committed(folder: Path) -> int:
    """The step of the newest commit."""
    from offload.commits.foreign_commits import OTHERS, ForeignCommits

    commits = ForeignCommits([folder], OTHERS)
    return commits.steps[commits.newest()] if commits.newest() else 0


@pytest.mark.parametrize(("seed", "degree"), [(1, "all"), (2, "states"), (3, "all"), (4, "none")])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(seed: int, degree: str, tmp_path: Path) -> None:
    chosen, before = random.Random(seed), 0
    for _ in range(N_KILLS):
        n_ranks = chosen.choice([1, 4, 4])
        ranks = RankProcesses(n_ranks, CODE, (str(tmp_path), degree, str(N_STEPS)))
        victims = ranks.processes if chosen.random() < 0.3 else [chosen.choice(ranks.processes)]
        try:
            victims[0].wait(6 + 3 * chosen.random())  # amid a step, or a commit, whose two phases follow one another
        except Exception:
            for victim in victims:
                victim.send_signal(signal.SIGKILL)
        ranks.end(30)
        assert all(process.poll() is not None for process in ranks.processes)
        now = committed(tmp_path)
        assert now >= before, "a commit is lost"
        before = now
    assert before > 0
    (ended,) = RankProcesses(1, CODE, (str(tmp_path), degree, str(N_STEPS))).end(120)
    model = tied_model()
    trained_plainly(model, ADAMW, steps_of(N_STEPS, 4), loss_of)
    assert ended.result == bodies.digest(model)
