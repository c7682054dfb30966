"""Errors for gradients, parameters and hyper-parameters that are used when an early update has already used them up.

Each says what plain PyTorch would do, why that is impossible here, and what to change.
"""

from __future__ import annotations

from typing import Final

from optim.unit import Slot, Unit
from pagemem.errors import StaleGradientError

#: What to do when steps differ from each other.
START_HINT: Final = 'set update.start = "step" in the configuration'
#: What to do in a run that is to go on after an error in the middle of a step.
ABANDON_HINT: Final = "engine.abandon_step() gives this step up"


def stale_gradient(unit: Unit, slot: Slot) -> StaleGradientError:
    """A gradient arrived, and the one it has to be added to has been used up."""
    if not unit.updated:
        return StaleGradientError(
            f"{slot.name}: a gradient arrived that plain PyTorch would add to the one of the last step, which was not "
            f"cleared and has been used up; call optimizer.zero_grad() after each step, or {START_HINT}"
        )
    return StaleGradientError(
        f"{slot.name}: a gradient arrived after the update of this step, which was begun when gradient {slot.arrivals} "
        "had arrived, as many as any step before had; for steps with a varying number of backward passes "
        f"{START_HINT}; {ABANDON_HINT}"
    )


def spent_gradient(slot: Slot) -> RuntimeError:
    """A gradient is read or changed that an update has used up."""
    return RuntimeError(
        f"{slot.name}: its gradient was used up by its update, which was made during the backward pass; to read, "
        f"change or clip gradients {START_HINT}, or clip by update.clip_norm alone (transformers: max_grad_norm=0); "
        f"{ABANDON_HINT}"
    )


def uncleared_gradient(slot: Slot) -> RuntimeError:
    """A step begins although a gradient of an earlier one was used up and not cleared."""
    return RuntimeError(
        f"{slot.name}: its gradient of an earlier step was not cleared, so that plain PyTorch would use it again, but "
        f"it has been used up; call optimizer.zero_grad() after each step, or {START_HINT}"
    )


def changed_hypers() -> RuntimeError:
    """Hyper-parameters changed after updates of the step had used them."""
    return RuntimeError(
        "learning rate or another hyper-parameter changed between backward and step, but updates of this step "
        f"have already used the old values; change them before backward, or {START_HINT}"
    )


def skipped_step() -> RuntimeError:
    """A step is to be skipped of which some updates have been made."""
    return RuntimeError(
        "zero_grad() without step(), but updates of this step have been made already; to skip steps "
        f"{START_HINT}; {ABANDON_HINT}"
    )


def torn_step(unit: Unit) -> RuntimeError:
    """Parameters and states are looked at while those of ``unit`` belong to the step under way."""
    return RuntimeError(
        f"{unit.name} has its update of the step under way already, so that parameters and states are not of one step; "
        f"call this after optimizer.step(), or {START_HINT}; {ABANDON_HINT}"
    )


def early_use(slot: Slot, *, in_forward: bool) -> Exception:
    """A parameter is used between backward and step, when its update of the step has been made already.

    Args:
        in_forward: the use is in one more forward pass of the same step, for all that is known.
    """
    if in_forward:
        return StaleGradientError(
            f"{slot.name} is used in a forward pass after its update of this step, which was begun when gradient "
            f"{slot.arrivals} had arrived, as many as any step before had; for steps with a varying number of backward "
            f"passes, or optimizer.step() after the next forward pass, {START_HINT}; {ABANDON_HINT}"
        )
    return RuntimeError(
        f"{slot.name} is used between backward and step, where plain PyTorch has its old values, but its update of "
        f"this step has been made already; use it after optimizer.step(), or {START_HINT}; {ABANDON_HINT}"
    )


def late_use(slot: Slot) -> RuntimeError:
    """The backward pass asks for a parameter whose values may be those of the next step."""
    return RuntimeError(
        f"{slot.name} is used in the backward pass after its gradient was complete, as it was in the step before, and "
        f"may have been updated; save it for backward (ctx.save_for_backward), or {START_HINT}"
    )


def check_unshared(unit: Unit, slot: Slot) -> None:
    """Raise RuntimeError where a gradient is to be read or changed of which each rank has its own until ranks have
    summed them."""
    if unit.sharing is not None:
        raise RuntimeError(
            f"{slot.name}: with several ranks its gradient is on none of them alone, so it can be neither read nor "
            "changed; use update.clip_norm to clip (transformers: max_grad_norm=0), and one rank to look at gradients"
        )
