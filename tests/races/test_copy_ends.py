"""Ends of copies: those of one direction are none of the other's."""

from __future__ import annotations

import pytest
import torch
from gated_device import GatedEvent, opened_tiers

from pagemem.frames.page import FrameId
from pagemem.residency.paged_tensor import Residency

R = Residency


def test_a_copy_up_ends_though_one_down_that_was_asked_for_before_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with opened_tiers() as tiers:
        up = GatedEvent()

        def copy_up(source: torch.Tensor, into: torch.Tensor, after: object) -> GatedEvent:
            into.copy_(source)
            return up

        monkeypatch.setattr(tiers.device.accelerator, "copy_up", copy_up)
        saved = tiers.saved(5, 1)
        tensor = tiers.device.mirror(tiers.below.dirty(1))
        lower = tiers.device.lower(tensor.id)
        tiers.device.start_load(tensor, FrameId(0))
        tiers.arrives(tensor)
        up.open()
        tiers.below.mover.monitor.wait_until(lambda: not lower.uploads, lower.name)
        assert saved.state is R.ARRIVING
        tiers.is_there(saved)
