"""The loss scale follows torch.amp.GradScaler's rules, and the coefficient of a step undoes it exactly."""

from __future__ import annotations

import math

import pytest
import torch

from optim.scaling.loss_scale import FIRST_SCALE, GROWTH_INTERVAL, LEAST_SCALE, MOST_SCALE, LossScale, Scaling


def test_an_overflow_halves_and_a_run_of_good_steps_doubles() -> None:
    scale = LossScale()
    scale.update(finite=False)
    assert (scale.scale, scale.dropped_steps) == (FIRST_SCALE / 2, 1)
    for _ in range(GROWTH_INTERVAL - 1):
        scale.update(finite=True)
    assert scale.scale == FIRST_SCALE / 2
    scale.update(finite=True)
    assert (scale.scale, scale.good_steps) == (FIRST_SCALE, 0)


def test_an_overflow_begins_the_run_of_good_steps_anew() -> None:
    scale = LossScale()
    for finite in [*[True] * (GROWTH_INTERVAL - 1), False, *[True] * (GROWTH_INTERVAL - 1)]:
        scale.update(finite=finite)
    assert scale.scale == FIRST_SCALE / 2


def test_it_stays_within_its_bounds() -> None:
    scale = LossScale()
    for _ in range(100):
        scale.update(finite=False)
    assert scale.scale == LEAST_SCALE
    scale.scale = MOST_SCALE
    for _ in range(GROWTH_INTERVAL):
        scale.update(finite=True)
    assert scale.scale == MOST_SCALE


def test_a_fixed_one_never_changes_but_counts() -> None:
    scale = LossScale(128.0, dynamic=False)
    for finite in (False, True, False):
        scale.update(finite=finite)
    assert (scale.scale, scale.dropped_steps) == (128.0, 2)


def test_its_state_survives_a_round_trip() -> None:
    scale, other = LossScale(), LossScale()
    for finite in (False, True, True):
        scale.update(finite=finite)
    other.load_state_dict(scale.state_dict())
    assert other == scale


def test_the_coefficient_is_of_the_scale_that_the_gradients_had() -> None:
    scaling = Scaling(None, LossScale(4.0))
    assert scaling.coefficient(torch.tensor(math.inf)) is None
    coefficient = scaling.coefficient(torch.tensor(8.0))
    assert coefficient is not None and coefficient.item() == 1 / 2.0


@pytest.mark.parametrize("norm", [0.1, 1.0, 50.0])
def test_clipping_sees_the_unscaled_norm(norm: float) -> None:
    plain = Scaling(1.0, None).coefficient(torch.tensor(norm))
    scaled = Scaling(1.0, LossScale(1024.0)).coefficient(torch.tensor(norm * 1024))
    assert plain is not None and scaled is not None
    assert torch.equal(scaled * 1024, plain)


def test_without_either_no_norm_is_needed() -> None:
    assert not Scaling().needs_norm
    assert Scaling(1.0).needs_norm and Scaling(None, LossScale()).needs_norm
