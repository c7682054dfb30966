"""How parameters change: update rules over pages, gradients, clipping, exact updates and the optimizer users hold."""

from optim.exact.gradient_downloads import GradientDownloadQueue
from optim.exact.gradient_store import GradientStore
from optim.exact.updater import ExactUpdater, is_eager
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
    "GradientDownloadQueue",
    "ExactUpdater",
    "GradientStore",
    "LockFreeUpdater",
    "LossScale",
    "UnitChannel",
    "PagedOptimizer",
    "SGDRule",
    "Scaling",
    "Slice",
    "Slot",
    "StateAccess",
    "Unit",
    "UnitIndex",
    "UpdateRule",
    "is_eager",
    "rule_for",
]
