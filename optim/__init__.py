"""How parameters change: update rules over pages, gradients, clipping, exact updates and the optimizer users hold."""

from optim.exact.gradient_store import GradientStore
from optim.exact.updater import ExactUpdater, is_eager
from optim.gradient_downloads import GradientDownloadQueue
from optim.lockfree.unit_channel import UnitChannel
from optim.lockfree.updater import LockFreeUpdater
from optim.loss_scale import LossScale, Scaling
from optim.optimizer import PagedOptimizer
from optim.rules import AdamRule, AdamWRule, SGDRule, UpdateRule, rule_for
from optim.states import StateAccess
from optim.unit import Slice, Slot, Unit, UnitIndex

__all__ = [
    "AdamRule",
    "AdamWRule",
    "ExactUpdater",
    "GradientDownloadQueue",
    "GradientStore",
    "LockFreeUpdater",
    "LossScale",
    "PagedOptimizer",
    "SGDRule",
    "Scaling",
    "Slice",
    "Slot",
    "StateAccess",
    "Unit",
    "UnitChannel",
    "UnitIndex",
    "UpdateRule",
    "is_eager",
    "rule_for",
]
