"""The parts of an engine, and how they are put together around a model.

The order matters: what may refuse the model comes before anything of it is paged, and states before the device, which
takes whole units, and before the updater, which divides what is left of the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from offload.activations.blocks import Blocks
from offload.activations.policy import RecomputeChoice
from offload.activations.saved import SavedActivations, chunk_bytes
from offload.assembly.training_step import TrainingStep
from offload.budget.need import check_model
from offload.checkpoint.checkpoints import Checkpoints
from offload.config import Config, OptimizerConfig
from offload.cutting.cut_parameter import CutParameter
from offload.factories import described
from offload.heap import TRAINING_BYTES, UNPACKING_BYTES, give_back_large_blocks, keep_freed_memory, tcache_disabled
from offload.modules.checks import check_parameters
from offload.modules.fast_paths import keep_fast_paths
from offload.modules.structure import Structure
from offload.parameters.inner_tensors import all_parameters, is_packed, is_wrapper, owner_of, reveal
from offload.parameters.optimizer_template import OptimizerLike, assign_groups, optimized_by, template_of
from offload.parameters.paged_parameter import PagedParameter
from offload.parameters.saved_weights import SavedWeights
from offload.store.adoption import adopt, give_back
from offload.store.deferred_init import store_of
from offload.store.make_updater import make_updater
from offload.store.page_store import PageStore
from offload.store.page_views import adopt_view, check_unviewed
from offload.store.plan_file import plan_keeper
from offload.store.store_parts import StoreParts
from optim.exact.updater import ExactUpdater, is_eager
from optim.lockfree.updater import LockFreeUpdater
from optim.optimizer import PagedOptimizer
from optim.rules import rule_for
from optim.scaling.loss_scale import Scaling
from optim.states import StateAccess
from optim.unit import Slot, Unit, Whole
from optim.updater import Updater
from pagemem.errors import OffloadError

#: What takes a change to the model, or a thread, back.
Undo = list[Callable[[], None]]


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of.

    Attributes:
        recompute_choice: None unless ``memory.activations`` is set and ``memory.recompute`` is "auto".
    """

    store: PageStore
    updater: Updater
    optimizer: PagedOptimizer
    checkpoints: Checkpoints
    step: TrainingStep
    recompute_choice: RecomputeChoice | None


class DebugView:
    """A look inside an engine for tests, benchmarks and bug reports, `Engine.debug`. Training thread only.

    Unstable: it follows the engine's parts and changes with them, in any version and without notice. Programs that
    train use `Engine` alone.

    Attributes:
        driver, mover: of host memory. page_files: the SSD tier. device_tier: None where compute runs in host memory.
        binder: binds parameters for each call. committer: makes commits durable.
        units: all of them, in the model's order.
        locks: those that steps take, but for leaf locks of single counters and queues, under which nothing is done.
    """

    def __init__(self, parts: EngineParts, *, closed: bool) -> None:
        self.closed = closed
        self.store = store = parts.store
        self.driver, self.mover = store.driver, store.mover
        self.page_files, self.device_tier = store.page_files, store.device_tier
        self.binder, self.units = store.binder, store.index.units
        self.updater, self.recompute_choice = parts.updater, parts.recompute_choice
        self.checkpoints, self.committer = parts.checkpoints, parts.checkpoints.committer
        movers = [store.mover, *([] if self.device_tier is None else [self.device_tier.mover])]
        late = [self.updater.lock] if isinstance(self.updater, LockFreeUpdater) else []
        self.locks = [*(mover.changed for mover in movers), *late]


class ExtraStates:
    """What a model's modules keep beside parameters and buffers (`torch.nn.Module.get_extra_state`), by the modules'
    names, as one thing that commits track; false where no module has any."""

    def __init__(self, model: nn.Module) -> None:
        plain = nn.Module.get_extra_state
        self._modules = {
            name: module for name, module in model.named_modules() if type(module).get_extra_state is not plain
        }

    def __bool__(self) -> bool:
        return bool(self._modules)

    def state_dict(self) -> dict[str, Any]:
        """All of them."""
        return {name: module.get_extra_state() for name, module in self._modules.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each module its own back."""
        for name, module in self._modules.items():
            module.set_extra_state(state_dict[name])


def built_store(model: nn.Module, config: Config) -> PageStore | None:
    """The store that a model was built into by `deferred_init`, or None for an ordinary one; the model is checked.

    Raises:
        ValueError: the model is none, cannot be paged, or was built for another configuration.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"the model is {described(model)}; give a torch.nn.Module first, then the optimizer, then the configuration"
        )
    reveal(model)
    store = store_of(model)
    if store is not None:
        for name, parameter in all_parameters(model):
            adopt_view(store.binder, store.index.units, name, parameter)
    check_parameters(model, StoreParts.device if store is None else store.parts.device)
    if store is not None:
        if (store.config.memory, store.config.ssd) != (config.memory, config.ssd):
            raise ValueError("the model was built under deferred_init with other memory or ssd settings; use the same")
        check_unviewed(store.binder, store.index.units, model)
    return store


def build_parts(
    model: nn.Module, config: Config, optimizer: OptimizerLike, store: PageStore, undo: Undo
) -> EngineParts:
    """Page the model and make all parts of its engine.

    Args:
        undo: what is to be undone, in order, also after an error, is added to it.

    Raises:
        As `offload.Engine`.
    """
    template = template_of(optimizer, config, model)
    rule = rule_for(template)
    scaling = store.parts.scaling()
    optimized = optimized_by(template)
    check_model(model, optimized, len(rule.state_names), config)
    adopt(store, model, optimized)
    states = StateAccess(store.driver, rule.state_names, store.parts.spill_folder)
    places = _places_of(model)
    assign_groups(template, {parameter: [slot for _, slot in found] for parameter, found in places.items()})
    for unit in store.index.units:
        if unit.trained:
            states.create(unit)
    store.make_resident(sums=not is_eager(scaling, config.update.start) or config.update.accumulation > 1)
    paged_optimizer = PagedOptimizer(template, rule, places, states, store.driver.untraced)
    store.set_order()
    updater = make_updater(store, rule, paged_optimizer.hypers, scaling, partial(_other_gradients, model))
    undo.append(updater.close)
    keeper = plan_keeper(store)
    checkpoints = Checkpoints(model, store, paged_optimizer, updater, config)
    _track_own_states(checkpoints, model, scaling)
    activations = _saved_activations(config, store)
    choice, memory = None, config.memory
    if activations is not None and memory.activations is not None and memory.recompute == "auto":
        choice = _recompute_choice(model, activations, memory.activations, store, undo)
    step = TrainingStep(store, updater, scaling.loss_scale, config.update.accumulation, choice, keeper)
    saved, structure = SavedWeights(store.binder), Structure(model)
    undo += saved.around_forward(model, structure.is_known)
    undo += keep_fast_paths(model, store.binder)
    trainable = optimizer is None or isinstance(optimizer, OptimizerConfig)
    trims, binder = _trims(config, model), store.binder
    binder.train(model, updater, activations, saved.scope, structure.check, only_trainable=trainable, trims=trims)
    in_ram = activations is None and store.device_tier is None and store.collectives is None
    if in_ram and isinstance(updater, ExactUpdater) and not isinstance(updater, LockFreeUpdater):
        binder.bindings.follow(model, store.index.units, updater)
    for module in model.modules():
        store.watch_over(module)
    paged_optimizer.attach(updater, step.ended, structure.check, binder.collect_in_hooks)
    return EngineParts(store, updater, paged_optimizer, checkpoints, step, choice)


def _places_of(model: nn.Module) -> dict[Tensor, Sequence[tuple[Unit, Slot]]]:
    """Unit and slot of each paged parameter, or of each slice of a cut one, whose slots learn what they are part of."""
    found: dict[Tensor, list[tuple[Unit, Slot]]] = {}
    for _, parameter in all_parameters(model):
        if isinstance(parameter, PagedParameter):
            found.setdefault(owner_of(parameter), []).append((parameter._place.unit, parameter._place.slot))
    for owner, places in found.items():
        if isinstance(owner, CutParameter):
            whole = Whole(tuple(places), owner.shape)
            for _, slot in places:
                slot.whole = whole
    return dict(found)


def _track_own_states(checkpoints: Checkpoints, model: nn.Module, scaling: Scaling) -> None:
    """Have commits hold what the engine and the model's modules keep beside tensors."""
    if scaling.loss_scale is not None:
        checkpoints.track("loss scale", scaling.loss_scale)
    extra = ExtraStates(model)
    if extra:
        checkpoints.track("extra states of modules", extra)


def _saved_activations(config: Config, store: PageStore) -> SavedActivations | None:
    """What keeps saved tensors within ``memory.activations``, if it is set."""
    memory = config.memory
    if memory.activations is None:
        return None
    device_mover = None if store.device_tier is None else store.device_tier.mover
    return SavedActivations(store.driver, memory.activations, chunk_bytes(memory.ram, store.page_bytes), device_mover)


def _recompute_choice(
    model: nn.Module, saved: SavedActivations, limit_bytes: int, store: PageStore, undo: Undo
) -> RecomputeChoice:
    blocks = Blocks(model, lambda: store.driver.position, lambda: saved.bytes.ever_bytes)
    undo.append(blocks.close)
    return RecomputeChoice(blocks, store.driver, limit_bytes)


def _trims(config: Config, model: nn.Module) -> bool:
    """Whether free pages of the heap are given back in each step; the heap is set accordingly."""
    heap = config.memory.heap
    unpacks = any(is_packed(parameter) or is_wrapper(parameter) for parameter in model.parameters())
    wanted = unpacks or config.memory.activations is not None
    trims = heap == "trim" or (heap == "auto" and wanted and not tcache_disabled())
    # The process may have been set otherwise by an engine before.
    if trims:
        give_back_large_blocks(UNPACKING_BYTES if unpacks else TRAINING_BYTES)
    else:
        keep_freed_memory()
    return trims


def _other_gradients(model: nn.Module, *, keeps_unoptimized: bool) -> Callable[[], list[tuple[int, Tensor]]]:
    """Gradients that the updater does not keep, which count in the norm as in
    ``clip_grad_norm_(model.parameters())``.

    Args:
        keeps_unoptimized: whether it keeps those of parameters that are not optimized.
    """

    def mine(parameter: Tensor) -> bool:
        first = parameter.slices[0] if isinstance(parameter, CutParameter) else parameter
        return isinstance(first, PagedParameter) and (first._place.slot.group >= 0 or keeps_unoptimized)

    # Slots are numbered by the same list.
    everything = [(order, parameter) for order, (_, parameter) in enumerate(all_parameters(model))]
    others = [(order, parameter) for order, parameter in everything if not mine(parameter)]
    return lambda: [(order, parameter.grad) for order, parameter in others if parameter.grad is not None]


def take_apart(store: PageStore, model: nn.Module, error: BaseException) -> None:
    """After an error while the parts of a plain model's engine were made: make the model ordinary again. Where that
    is not possible, or its values were rounded, a note of the error says so."""
    try:
        give_back(store, model)
    except OffloadError as lost:
        error.add_note(f"the model cannot be made whole again ({lost}); build it anew")
    if store.narrowed:
        error.add_note(
            f"the model's parameters have been rounded to {store.compute_dtype}, as model.dtype asks for; build it anew"
        )
