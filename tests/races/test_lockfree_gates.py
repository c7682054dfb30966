"""The updater held at each of its points while the training thread does each thing it may do meanwhile.

The training thread may wait for two reasons only: the bound, before a use that would miss too many steps, and a look at
parameters or states from outside the step, which have to be up to date. `UpdaterGates` sees every wait.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lockfree_run import RESIDENT, STREAMING, Run, Scale, running
from pairwise import each_value, full_product
from updater_gates import POINTS

import offload

UNITS = ("layers.0", "layers.1", "layers.2")
SECOND = UNITS[1]


SCALES = {"all_in_ram": RESIDENT, "streaming": STREAMING}


def test_the_scales_are_what_they_are_named(tmp_path: Path) -> None:
    with running(tmp_path / "1", 1, RESIDENT) as run:
        assert run.resident
        assert all(len(box.unit.slices) == 2 for box in run.boxes.values())
    with running(tmp_path / "2", 1, STREAMING) as run:
        assert not run.resident
        assert all(part.master is not None for box in run.boxes.values() for part in box.unit.slices)


@full_product(point=POINTS, unit=UNITS, scale=SCALES)
def test_another_step_does_not_wait(point: str, unit: str, scale: Scale, tmp_path: Path) -> None:
    with running(tmp_path, 1, scale) as run:
        run.warm_up()
        run.catch(point, unit)
        # The step under way uses what the warm-up left, or what was published; both miss at most one step.
        run.step()
        assert run.gates.waits == []
        run.assert_replayed()


@full_product(point=POINTS, unit=UNITS, max_staleness=[0, 1, 3])
def test_the_step_that_would_miss_too_many_waits_and_no_other(
    point: str, unit: str, max_staleness: int, tmp_path: Path
) -> None:
    with running(tmp_path, max_staleness) as run:
        run.warm_up()
        run.catch(point, unit)
        # While the updater is held no unit gets on. The one that is furthest behind says how many steps are free.
        applied = {name: run.clock(name)[1] for name in run.units}
        behind = min(applied, key=lambda name: applied[name])
        assert applied[unit] == (3 if point == "published" else 2)
        while len(run.steps) - applied[behind] <= max_staleness:
            run.step()
            assert run.gates.waits == [], "it waited although the bound allowed another step"
        run.step()
        assert run.gates.waits[:1] == [behind], "it did not wait for the first unit that is too far behind"
        run.assert_replayed()


def looks() -> dict[str, Callable[[Run], object]]:
    """Ways to look at the model from outside a step."""

    def evaluate(run: Run) -> object:
        run.model.eval()
        with torch.no_grad():
            loss = run.model(*run.steps[-1][0])
        run.model.train()
        return loss

    def gather(run: Run) -> object:
        with offload.gathered(run.model):
            return [parameter.sum() for parameter in run.model.parameters()]

    return {
        "evaluation": evaluate,
        "gathered": gather,
        "model state": lambda run: run.model.state_dict(),
        "optimizer state": lambda run: run.optimizer.state_dict(),
        "drain": lambda run: run.engine.drain(),
    }


#: The model of the streaming scale does not fit in memory at once, so it cannot be gathered there.
LOOKS = [
    (look, scale) for look in looks() for scale in (RESIDENT, STREAMING) if (look, scale) != ("gathered", STREAMING)
]


@each_value(
    at={f"{look}-{'all_in_ram' if scale is RESIDENT else 'streaming'}": (look, scale) for look, scale in LOOKS},
    point=POINTS,
)
def test_a_look_waits_until_everything_is_applied(at: tuple[str, Scale], point: str, tmp_path: Path) -> None:
    look, scale = at
    with running(tmp_path, 4, scale) as run:
        run.warm_up()
        run.catch(point, SECOND)
        run.step()
        assert run.gates.waits == []
        looks()[look](run)
        assert run.gates.waits, "the updater was held, so somebody must have waited"
        assert all(run.clock(unit) == (4, 4, 4) for unit in run.units)
        run.step()
        run.assert_replayed()


@each_value(point=POINTS, scale=SCALES)
def test_an_edit_comes_after_all_updates_and_before_the_next(point: str, scale: Scale, tmp_path: Path) -> None:
    with running(tmp_path, 4, scale) as run:
        run.warm_up()
        run.catch(point, SECOND)
        run.step()
        with offload.gathered(run.model.layers[1]), torch.no_grad():
            assert run.clock(SECOND) == (4, 4, 4)
            assert all(slot.lookahead for slot in run.boxes[SECOND].unit.slots), (
                "what is edited was not ahead of its update"
            )
            before = run.model.layers[1].weight.clone()
            run.model.layers[1].weight.mul_(0.5)
        run.gates.open()
        assert torch.equal(run.model.state_dict()[f"{SECOND}.weight"], before * 0.5)
        run.optimizer.param_groups[0]["lr"] = run.optimizer.param_groups[1]["lr"] = 0.0
        run.step(4)
        assert torch.equal(run.model.state_dict()[f"{SECOND}.weight"], before * 0.5), "the edit was lost"


@pytest.mark.parametrize("point", POINTS)
def test_zero_grad_throws_away_what_was_not_handed_over_and_nothing_else(point: str, tmp_path: Path) -> None:
    with running(tmp_path, 4) as run:
        run.warm_up()
        run.catch(point, SECOND)
        bytes_before, clocks = run.gates.updater.direct_bytes, [run.clock(unit)[0] for unit in run.units]
        run.optimizer.zero_grad()
        assert [run.clock(unit)[0] for unit in run.units] == clocks
        assert run.gates.updater.direct_bytes == bytes_before
        loss = run.model(*run.steps[-1][0])
        loss.backward()
        with pytest.raises(
            RuntimeError, match=r"updates of this step have been made already.*engine\.abandon_step\(\)"
        ):
            run.optimizer.zero_grad()
        assert run.gates.waits == []


@each_value(point=POINTS, unit=UNITS)
def test_closing_ends_the_updater_wherever_it_stands(point: str, unit: str, tmp_path: Path) -> None:
    with running(tmp_path, 4) as run:
        run.warm_up()
        run.catch(point, unit)
        run.step()
        begun = run.gates.passed.count(("slice", unit))
        run.engine.close()
        assert run.gates.waits == []
        # It was told to stop before it went on: the slice that it had in hand was finished, no other one was begun.
        assert run.gates.passed.count(("slice", unit)) == begun


@pytest.mark.parametrize("unit", UNITS)
def test_a_version_is_published_only_when_every_slice_is_done(unit: str, tmp_path: Path) -> None:
    with running(tmp_path, 4) as run:
        run.warm_up()
        mailbox = run.boxes[unit]
        for number in range(len(mailbox.unit.slices)):
            if number == 0:
                run.catch("slice", unit)
            else:
                run.gates.open_one()
                run.gates.await_standing("slice", unit)
            assert mailbox.clock.applied == 2 and mailbox.unadopted() is None
            run.step()
            assert mailbox.clock.adopted == 2
        run.gates.hold("applied", unit)
        run.gates.open_one()
        run.gates.await_standing("applied", unit)
        assert mailbox.clock.applied == 2 and mailbox.unadopted() is None
        run.assert_replayed()


def test_steps_that_the_updater_missed_are_merged(tmp_path: Path) -> None:
    with running(tmp_path, 4) as run:
        run.warm_up()
        run.catch("taken", SECOND)
        run.step(3)
        assert run.gates.waits == []
        run.assert_replayed()
        assert run.history.published[SECOND][-2:] == [3, 6]


def test_the_unit_that_is_waited_for_is_served_next(tmp_path: Path) -> None:
    with running(tmp_path, 4) as run:
        run.warm_up()
        run.catch("chosen", UNITS[0])
        run.step(2)  # Every unit has gradients now, and the first in order is layers.1.
        begun = len(run.gates.passed)
        with offload.gathered(run.model.layers[2]):
            pass
        served = [unit for point, unit in run.gates.passed[begun:] if point == "chosen"]
        assert served[:1] == [UNITS[2]], "another unit was served before the one that the training thread waits for"
        run.assert_replayed()
