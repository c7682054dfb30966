"""The engine people use: `prepare` for a training loop of one's own, `initialize` for a whole engine.

    BUILT --(prepare / initialize)--> RUNNING --close--> CLOSED

An engine belongs to the thread that trains. Closing it stops all moves and gives every byte, thread, descriptor and
lock back; its parameters cannot be used afterwards, so take `model.state_dict()` before.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from rich.console import Console
from torch import Tensor, nn

from offload.activations.blocks import Blocks
from offload.activations.policy import RecomputeChoice
from offload.activations.saved import SavedActivations, chunk_bytes
from offload.assembly.debug_view import DebugView
from offload.budget.checks import check_model
from offload.checkpoint.checkpoints import Checkpoints, Stateful
from offload.checkpoint.export import check_alike, check_request, export_commit
from offload.checkpoint.resumed import Resumed
from offload.commits.stored_layout import unlike_state_dict
from offload.config import ConfigLike, load_config, load_optimizer
from offload.factories import described
from offload.heap import give_back_large_blocks, keep_freed_memory, tcache_disabled
from offload.modules.checks import check_parameters
from offload.modules.extra_states import NAME as EXTRA_STATES
from offload.modules.extra_states import ExtraStates
from offload.modules.fast_paths import keep_fast_paths
from offload.modules.structure import Structure
from offload.parameters.binder import Binder
from offload.parameters.optimizer_template import OptimizerLike, assign_groups, from_section, optimized_by, template_of
from offload.parameters.paged_parameter import PagedParameter
from offload.parameters.saved_weights import SavedWeights
from offload.profiling.profile import Profile
from offload.profiling.stats import MemoryReport, Stats, memory_report, planned_step_s, stats_of
from offload.store.deferred_init import store_of
from offload.store.make_updater import make_updater, scaling_of
from offload.store.page_store import PageStore
from offload.store.page_views import adopt_views, check_unviewed
from offload.store.plan_file import plan_keepers
from optim import GradientDownloadQueue, LossScale, PagedOptimizer, StateAccess, rule_for
from optim.clip import check_loss
from optim.exact.updater import is_eager
from optim.loss_scale import Scaling
from optim.optimizer import without_compiler
from optim.unit import Slot, Unit
from optim.updater import refusing_updater
from pagemem.errors import OffloadError
from pagemem.process import forks, interrupts
from pagemem.process.closing import close_all
from pagemem.process.forks import disowned
from pagemem.process.interrupts import left_open
from pagemem.state_machine import StateMachine
from pagemem.units import parse_bytes


class EngineState(enum.Enum):
    """RUNNING from the constructor on; CLOSED for good, or DISOWNED in a forked child."""

    RUNNING = "running"
    CLOSED = "closed"
    DISOWNED = "disowned"


_MOVES: Final = StateMachine(
    "engine",
    {
        EngineState.RUNNING: {EngineState.CLOSED, EngineState.DISOWNED},
        EngineState.CLOSED: {EngineState.DISOWNED},
        EngineState.DISOWNED: {EngineState.DISOWNED},
    },
)


class Engine:
    """A model whose parameters and optimizer states live in pages, and what trains it.

    Use it as a context manager, or call `close`. All methods belong to the training thread.

    Args:
        model: on the CPU, built plainly or under `deferred_init` with the same configuration. Changed in place.
        config: the configuration, or a file or mapping that holds it.
        optimizer: factory or optimizer section; None takes the configuration's.

    Raises:
        ConfigError, ValueError: something does not fit together.
        BudgetError: ``memory.ram`` is too small; names the unit and the smallest budget that works.
        RunDirectoryError: a page-file path is unusable; it was not changed.

    After any of these a plain model is unchanged, unless a note of the error says that ``model.dtype`` has rounded it
    already. A model from `deferred_init` is unchanged where it was built for another configuration; otherwise build it
    anew.
    """

    def __init__(self, model: nn.Module, config: ConfigLike, optimizer: OptimizerLike = None) -> None:
        self.config = load_config(config)
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"the model is {described(model)}; give a torch.nn.Module first, then the optimizer, then the "
                "configuration"
            )
        optimizer = load_optimizer(optimizer) if isinstance(optimizer, Mapping) else optimizer
        self.model = model
        self.state = EngineState.RUNNING
        self._steps = 0
        self._micro_batches = 0
        self._choice: RecomputeChoice | None = None
        deferred = store_of(model)
        if deferred is not None:
            adopt_views(deferred, model)
        check_parameters(model, (deferred or PageStore).device)
        if deferred is not None and (deferred.config.memory, deferred.config.ssd) != (
            self.config.memory,
            self.config.ssd,
        ):
            raise ValueError("the model was built under deferred_init with other memory or ssd settings; use the same")
        if deferred is not None:
            check_unviewed(deferred, model)
        self._store = deferred or PageStore(self.config)
        self._store.has_engine = True
        self._undo: list[Callable[[], None]] = []
        try:
            with without_compiler():
                self._build(optimizer)
            forks.disown_in_children(self)
            interrupts.check()  # raised after the return, it would leave an engine that nobody has to close
        except BaseException as error:
            if deferred is None:
                self._give_back(error)
            self._release()
            raise

    def _build(self, optimizer: OptimizerLike) -> None:
        store, config = self._store, self.config
        template = template_of(optimizer, config, self.model)
        rule = rule_for(template)
        scaling = self._scaling()
        check_model(self.model, optimized_by(template), len(rule.state_names), config)
        store.adopt(self.model)
        states = StateAccess(store.driver, rule.state_names)
        places = self._places()
        assign_groups(template, {parameter: slot for parameter, (_, slot) in places.items()})
        self._make_states(states)
        store.settle_on_device(sums=not is_eager(scaling, config.update.start) or config.update.accumulation > 1)
        self.optimizer = PagedOptimizer(template, rule, places, states, store.driver.untraced)
        self.optimizer.engine = self  # type: ignore[attr-defined]
        self._loss_scale = scaling.loss_scale
        self._updater = make_updater(store, rule, self.optimizer.hypers, scaling)
        self._undo.append(self._updater.close)
        self._plan_keepers = plan_keepers(store)
        binder = store.binder
        structure = Structure(self.model)
        binder.structure_is_known, binder.check_structure = structure.is_known, structure.check
        binder.only_trainable = from_section(optimizer)
        self.optimizer.attach(self._updater, self._count_step, binder.check_structure, binder.collect_in_hooks)
        self._checkpoints = Checkpoints(self.model, store, self.optimizer, self._updater, config)
        if self._loss_scale is not None:
            self.track("loss scale", self._loss_scale)
        extra = ExtraStates(self.model)
        if extra:
            self.track(EXTRA_STATES, extra)
        self._install_hooks()

    def _count_step(self) -> None:
        interrupts.renew()
        self._steps += 1
        self._micro_batches = 0
        if self._choice is not None:
            self._choice.step_ended()
        for keeper in self._plan_keepers:
            keeper.keep()

    def _give_back(self, error: BaseException) -> None:
        try:
            self._store.give_back(self.model)
        except OffloadError as lost:
            error.add_note(f"the model cannot be made whole again ({lost}); build it anew")
        if self._store.narrowed:
            error.add_note(
                f"the model's parameters have been rounded to {self._store.compute_dtype}, as model.dtype asks for; "
                "build it anew"
            )

    def _places(self) -> dict[Tensor, tuple[Unit, Slot]]:
        return {p: (p._place.unit, p._place.slot) for p in self.model.parameters() if isinstance(p, PagedParameter)}

    def _make_states(self, states: StateAccess) -> None:
        """Give units that are optimized their states, and others no masters."""
        for unit in self._store.index.units:
            if unit.trained:
                states.create(unit)
                continue
            for part in unit.slices:
                if part.master is not None:
                    self._store.mover.forget(part.master)
                    part.master = None

    def _scaling(self) -> Scaling:
        return scaling_of(self.config)

    def _saved_weights(self, binder: Binder) -> SavedWeights:
        return SavedWeights(binder)

    def _install_hooks(self) -> None:
        binder = self._store.binder
        memory = self.config.memory
        if memory.activations is not None:
            of_chunk = chunk_bytes(memory.ram, self._store.page_bytes)
            binder.activations = SavedActivations(
                self._store.driver, memory.activations, of_chunk, self._store.device_mover
            )
            if memory.recompute == "auto":
                self._choice = self._choose_recomputation(binder.activations, memory.activations)
        binder.trims = memory.heap == "trim" or (
            memory.heap == "auto" and memory.activations is not None and not tcache_disabled()
        )
        # The process may have been set otherwise by an engine before.
        (give_back_large_blocks if binder.trims else keep_freed_memory)()
        saved = self._saved_weights(binder)
        binder.updater, binder.root, binder.save_hooks = self._updater, self.model, saved.scope
        self._undo.append(saved.around_forward(self.model))
        self._undo += keep_fast_paths(self.model, binder)
        for parameter in self.model.parameters():
            if isinstance(parameter, PagedParameter):
                binder.watch_gradient(parameter)
        self._updater.other_gradients = self._other_gradients()
        for module in self.model.modules():
            self._store.watch_over(module)

    def _other_gradients(self) -> Callable[[], list[tuple[int, Tensor]]]:
        """Gradients of parameters that are not the updater's, which count in the norm as in
        ``clip_grad_norm_(model.parameters())``."""

        def mine(parameter: Tensor) -> bool:
            return isinstance(parameter, PagedParameter) and (
                parameter._place.slot.group >= 0 or self._updater.keeps_unoptimized
            )

        others = [(order, parameter) for order, parameter in enumerate(self.model.parameters()) if not mine(parameter)]
        return lambda: [(order, parameter.grad) for order, parameter in others if parameter.grad is not None]

    def _choose_recomputation(self, saved: SavedActivations, limit_bytes: int) -> RecomputeChoice:
        driver = self._store.driver
        blocks = Blocks(self.model, lambda: driver.position, lambda: saved.bytes.ever_bytes)
        self._undo.append(blocks.close)
        return RecomputeChoice(blocks, driver, limit_bytes)

    # ---- training ----------------------------------------------------------------------------------------------

    @left_open
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self.model(*args, **kwargs)

    @left_open
    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-batch; its loss is divided by ``update.accumulation``.

        Raises:
            NonFiniteError: the loss is NaN or infinite; no parameter was changed by it, and its gradients are dropped.
                On a device nobody waits for the loss: the next forward pass or `step` may be what raises.
        """
        self._check_running()
        if isinstance(self._updater, GradientDownloadQueue) and loss.device == self.torch_device:
            self._updater.expect(loss, self._steps + 1)
        else:
            check_loss(float(loss.detach()), self._steps + 1)
        if self.config.update.accumulation > 1:
            loss = loss / self.config.update.accumulation
        self.scaled(loss).backward()  # type: ignore[no-untyped-call]
        self._micro_batches += 1

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call ``backward`` on in a loop of one's own: times the loss scale, with fp16 parameters."""
        return loss if self._loss_scale is None else loss * self._loss_scale.scale

    @property
    def loss_scale(self) -> LossScale | None:
        """The loss scale and how many steps overflowed, or None without loss scaling."""
        return self._loss_scale

    def step(self) -> bool:
        """Make the optimizer step once ``update.accumulation`` micro-batches are through.

        Returns:
            Whether a step was made.
        """
        self._check_running()
        if self._micro_batches < self.config.update.accumulation:
            return False
        self._micro_batches = 0
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True

    def abandon_step(self) -> None:
        """Give the step under way up, after an error in its backward pass (Ctrl-C in a notebook, say), and be ready for
        another one.

        Gradients that no update has used are dropped, and micro-batches are counted anew. With ``update.start =
        "auto"``, parameters whose update had been made by then keep it, and their optimizer states and step counts with
        them; all others are as they were. With ``update.start = "step"``, or clipping, nothing has changed, and
        `optimizer.zero_grad()` does as well.

        Raises:
            RuntimeError: the error cut the update of a unit off half-way; only a commit leads on.
        """
        self._check_running()
        self._let_failed_backward_go()
        self._store.binder.collect_in_hooks(False)
        self._updater.abandon()
        self._micro_batches = 0

    def _let_failed_backward_go(self) -> None:
        """Free what a backward pass that failed has left in autograd's queue, which only another one or the end of the
        thread empties."""
        if any(unit.live_views for unit in self._store.index.units) and torch._C._current_graph_task_id() == -1:
            with torch.inference_mode(False), torch.enable_grad():
                torch.zeros((), requires_grad=True).clone().backward()  # type: ignore[no-untyped-call]

    def add_gradient(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add to ``parameter.grad``, as a backward pass does; for code that computes gradients outside of one.

        Args:
            gradient: of the parameter's shape and dtype; it is copied.

        Raises:
            ValueError: the parameter is not in pages, or the gradient does not fit.
            StaleGradientError: the parameter's update of this step has been made.
        """
        self._check_running()
        unit, slot = self._place_of(parameter)
        if (gradient.shape, gradient.dtype) != (slot.shape, slot.dtype):
            raise ValueError(
                f"{slot.name}: a gradient of shape {tuple(gradient.shape)} and {gradient.dtype} for a parameter of "
                f"{tuple(slot.shape)} and {slot.dtype}"
            )
        self._updater.gradient(unit, slot, gradient.detach().to(self.torch_device, copy=True))

    def gradient_ready(self, parameter: Tensor, gradient: Tensor | None = None) -> None:
        """Say that no gradient of a parameter comes any more in this step, so that its update can be made.

        For code that computes gradients outside `backward`, as runtimes of pipelines do. Without it, the update waits
        until as many gradients have arrived as in earlier steps, or for the step's end.

        Args:
            gradient: the last one, which is added as `add_gradient` does; None: it is there already, or there is none
                in this step.

        Raises:
            ValueError, StaleGradientError: as `add_gradient`.
        """
        self._check_running()
        place = self._place_of(parameter)
        if gradient is not None:
            self.add_gradient(parameter, gradient)
        self._updater.ready(*place)

    def _place_of(self, parameter: Tensor) -> tuple[Unit, Slot]:
        if not isinstance(parameter, PagedParameter) or parameter._place.binder is not self._store.binder:
            raise ValueError("this parameter is not one that the engine has in pages")
        return parameter._place.unit, parameter._place.slot

    @property
    def grad_norm(self) -> float | None:
        """Global 2-norm of the gradients of the last step that was made, before clipping and without the loss scale.

        Known once `step` has returned; not finite where the step was dropped for it. None before the first step, and
        where nothing needs
        it: without ``update.clip_norm`` and loss scaling. On a device, asking waits for the device.
        """
        norm = self._updater.grad_norm
        return None if norm is None else float(norm)

    def drain(self) -> None:
        """Make every update that has been decided on, and wait until no page moves.

        Raises:
            StorageError: a copy failed; every tensor is whole where it was.
        """
        self._check_running()
        self._updater.drain()
        self._store.driver.quiesce()
        self._store.mover.check()

    # ---- commits -----------------------------------------------------------------------------------------------

    def track(self, name: str, thing: Stateful) -> None:
        """Have the state of an LR scheduler, a data source or the like in every commit, and restored by `resume`.

        Args:
            thing: has ``state_dict()`` and ``load_state_dict()``. A state may have numbers (also infinite ones), text,
                bytes, lists, tuples, sets, dicts with any of these for keys, counters, NumPy's numbers and arrays, and
                tensors on the CPU, 16 MiB in all. It comes back with equal values of equal types.

        Raises:
            ValueError: the name is taken, or the state has something else; says where in it.
        """
        self._checkpoints.track(name, thing)

    def save(self, name: str | None = None, *, wait: bool = True) -> int:
        """Commit the steps made so far; call it at the end of an iteration, when everything tracked is up to date.

        Args:
            name: keeps the commit for good, until a later one takes the name over; None: it is kept as ``commit.keep``
                says.
            wait: until it is durable; otherwise that happens in the background, and the next call raises what went
                wrong.

        Returns:
            The commit's number.

        Raises:
            DiskFullError: there is no room for it; nothing was written, training can go on.
            CommitError, StorageError, OSError: it could not be made; earlier ones are whole.
            RuntimeError: backward has been called since the last step; nothing was begun.
        """
        self._check_running()
        if self._in_a_step:
            raise RuntimeError(
                "a commit between backward and step would miss the gradients of the step under way; call save() and "
                "export() after optimizer.step() (engine.step() returns True), or give the step up with "
                "engine.abandon_step()"
            )
        number = self._checkpoints.save(self._steps, name)
        if wait:
            self._checkpoints.committer.wait()
        return number

    @property
    def _in_a_step(self) -> bool:
        return self._micro_batches > 0 or self._updater.step_under_way

    @property
    def commit_due(self) -> bool:
        """Whether `save_if_due` would commit now: what the commit speaks of must be on the disk before.

        Raises:
            CommitError, StorageError, OSError: a background commit failed.
        """
        self._check_running()
        return self._checkpoints.due(self._steps) and not self._in_a_step

    def save_if_due(self) -> int | None:
        """Commit in the background if ``commit.every_steps`` or ``commit.every_s`` says so; call it at the end of an
        iteration.

        In lock-free mode with ``max_staleness`` above 0, gradients on their way are not waited for: a run that goes on
        from such a commit misses them, at most ``max_staleness`` + 1 of each parameter. `save` has them all.

        Returns:
            The commit's number, or None when it is not time, one is still being written, or backward has been called
            since the last step (between micro-batches).

        Raises:
            CommitError, StorageError, OSError: as `save`, also for a background commit that failed.
        """
        self._check_running()
        return self._checkpoints.save(self._steps, whole=False) if self.commit_due else None

    def resume(
        self, name: str | None = None, *, allow_older: bool = False, keep_hyper_parameters: bool = False
    ) -> Resumed | None:
        """Go on from the newest commit in ``ssd.paths``, or the one of this name.

        Parameters, optimizer states, buffers, hyper-parameters, random generators and everything tracked are as they
        were. What is read later is verified by its checksums.

        Args:
            allow_older: pass over a damaged newest commit; the result says what was wrong with it.
            keep_hyper_parameters: keep those that the optimizer has here (learning rate, weight decay, ...) instead of
                the commit's.

        Returns:
            Where the run goes on, or None when there is no commit.

        Raises:
            CommitError: it is damaged, missing, or of another model, optimizer or precision; the engine is as it was,
                but that a step under way is given up.
        """
        self._check_running()
        if self._in_a_step:
            self.abandon_step()
        resumed = self._checkpoints.resume(name, allow_older=allow_older, keep_hypers=keep_hyper_parameters)
        if resumed is not None:
            self._steps, self._micro_batches = resumed.step, 0
        return resumed

    def export(self, folder: str | Path, *, dtype: str = "keep", max_shard: str | int = "5GB") -> Path:
        """Commit the steps made so far, and write their weights as safetensors files; see `offload export --help`.

        Args:
            folder: new or empty; it appears whole or not at all.
            dtype: "keep", "fp32" (the masters, where there are any), "bf16" or "fp16".
            max_shard: most bytes of tensors in one file.

        Returns:
            The folder.

        Raises:
            ValueError: ``dtype`` or ``max_shard`` is none. ExportError: the folder holds something, or ``state_dict()``
                of the model is not its parameters and buffers alone. Nothing was committed.
            ExportError: also where a value cannot be expressed in ``dtype``; nothing is left of the export then.
            StorageError: the folder cannot be written, and as `save`; nothing is left of the export then.
        """
        folders = [directory.path for directory in self._store.directories]
        shard_bytes = parse_bytes(max_shard)
        to = check_request(folders, Path(folder), dtype=dtype, max_shard_bytes=shard_bytes)
        check_alike(unlike_state_dict(self.model))
        manifest = self._checkpoints.committer.commits[self.save()].manifest
        return export_commit(
            folders, manifest, to, dtype=dtype, max_shard_bytes=shard_bytes, console=Console(quiet=True)
        ).folder

    @property
    def torch_device(self) -> torch.device:
        """Where the model computes, and where its inputs belong."""
        return self._store.binder.torch_device

    @property
    def steps(self) -> int:
        """Optimizer steps made, those before `resume` included."""
        return self._steps

    @property
    def run_id(self) -> str:
        """Identity of the folder that holds the run's commits, the first of ``ssd.paths``."""
        return self._store.directories[0].run_id

    # ---- looking inside ----------------------------------------------------------------------------------------

    @property
    def debug(self) -> DebugView:
        """The engine's parts, for tests and bug reports; unstable, see `offload.assembly.debug_view`."""
        return DebugView(self._store, self._updater, self._checkpoints, self._choice)

    @property
    def planned_step_s(self) -> float | None:
        """Seconds of one step as the plan predicts them, or None while there is no plan. With a device there are two:
        it waits for both."""
        return planned_step_s(self._store)

    @property
    def staleness(self) -> int:
        """Steps that the parameters in use miss, in the unit that is furthest behind; 0 in exact mode."""
        return self._updater.staleness

    def stats(self) -> Stats:
        """Counters since the engine was made."""
        self._check_owned()
        return stats_of(self._store, self._updater, 0 if self._choice is None else self._choice.blocks.n_recomputed)

    def memory_report(self) -> MemoryReport:
        """Bytes per tier now, at their peak, and as planned."""
        self._check_owned()
        return memory_report(self._store, self._updater, self._checkpoints.committer)

    def profile(self, folder: str | Path) -> Profile:
        """Record the steps made inside ``with engine.profile(folder):``, and write what they did to memory when it
        ends.

        The folder then holds report.html, summary.json and trace.json (for ui.perfetto.dev); the value of ``as`` has
        ``summary``. Training computes the same bits. After an error in the block nothing is written.

        Raises:
            RunDirectoryError: on entering, the folder holds something other than an earlier profile; nothing was
                changed.
            RuntimeError: on entering, this engine is being profiled already, or is closed.
        """
        self._check_running()
        return Profile(folder, self._store, self.stats, self.memory_report)

    # ---- the end -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End everything the engine owns. Idempotent.

        Raises:
            StorageError: a background copy had failed and nobody has been told; everything is closed all the same.
        """
        if self._store.given_back:
            return
        if self.state is EngineState.RUNNING:  # else an earlier call was left by what a signal's handler raised
            self.state = _MOVES.move(self.state, EngineState.CLOSED)
        close_all(self._checkpoints.committer.close, self.optimizer.close, self._let_failed_backward_go, self._release)

    def _release(self) -> None:
        undo, self._undo = self._undo, []
        close_all(*undo, self._store.close)

    def disown(self) -> None:
        """In a forked child: the engine is the parent's. Using it raises; closing it does nothing."""
        self.state = _MOVES.move(self.state, EngineState.DISOWNED)
        self._updater = refusing_updater()
        self.optimizer.disown(self._updater)

    def _check_running(self) -> None:
        self._check_owned()
        if self.state is not EngineState.RUNNING:
            raise RuntimeError("this engine is closed")

    def _check_owned(self) -> None:
        if self.state is EngineState.DISOWNED:
            raise disowned("this engine")

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            # The first error is why, as a rule: a device that failed cannot be let go of either.
            error.add_note(f"the engine could not be closed in order, either: {failure}")


def initialize(model: nn.Module, config: ConfigLike, optimizer: OptimizerLike = None) -> Engine:
    """An engine around ``model``; see `Engine` for arguments and errors."""
    return Engine(model, config, optimizer)


def prepare(model: nn.Module, optimizer: OptimizerLike, config: ConfigLike) -> tuple[nn.Module, PagedOptimizer]:
    """Model and optimizer for a loop of one's own: forward, ``loss.backward()``, ``optimizer.step()``.

    Returns:
        The same model, its parameters now paged, and its optimizer, whose ``engine`` is to be closed at the end.
    """
    engine = Engine(model, config, optimizer)
    return model, engine.optimizer
