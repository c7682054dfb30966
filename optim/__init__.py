"""How parameters change: update rules over pages, gradients, clipping, exact updates and the optimizer users hold."""

from optim.exact.updater import ExactUpdater
from optim.lockfree.updater import LockFreeUpdater
from optim.loss_scale import LossScale, Scaling
from optim.optimizer import PagedOptimizer
from optim.rules import AdamRule, AdamWRule, SGDRule, UpdateRule, rule_for
from optim.states import StateAccess
from optim.unit import Slot, Unit, UnitIndex
from optim.updater import Updater

__all__ = [
    "AdamRule",
    "AdamWRule",
    "ExactUpdater",
    "LockFreeUpdater",
    "LossScale",
    "PagedOptimizer",
    "SGDRule",
    "Scaling",
    "Slot",
    "StateAccess",
    "Unit",
    "UnitIndex",
    "UpdateRule",
    "Updater",
    "rule_for",
]
