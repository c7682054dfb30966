"""The engine people use; `offload.choosing.preparation` makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from offload.assembly.lifetime import Lifetime
from offload.assembly.parts import DebugView, EngineParts, build_parts, built_store, take_apart
from offload.assembly.training_step import HasLoss
from offload.checkpoint.compatibility import Resumed
from offload.checkpoint.export import check_exportable, check_request, export_commit
from offload.checkpoint.model_files import write_model_files
from offload.checkpoint.run_state import Stateful
from offload.commits.stored_layout import unlike_state_dict
from offload.config_loading import ConfigLike, load_config, load_optimizer
from offload.parameters.optimizer_template import OptimizerLike
from offload.profiling.profile import Profile
from offload.profiling.stats import MemoryReport, Stats, memory_report, planned_step_s, stats_of
from offload.store.page_store import PageStore
from optim.optimizer import PagedOptimizer, refusing_updater, without_compiler
from optim.scaling.loss_scale import LossScale
from pagemem.process import forks, interrupts
from pagemem.process.closing import close_all
from pagemem.process.interrupts import left_open
from pagemem.units import parse_bytes


class Engine:
    """A model whose parameters and optimizer states live in pages, and what trains it.

    Use it as a context manager, or call `close`, which gives every byte, thread, descriptor and lock back; the
    parameters cannot be used afterwards, so take ``model.state_dict()`` before. All methods belong to the training
    thread.

    Args:
        model: on the CPU, built plainly or under `deferred_init` with the same configuration. Changed in place. One on
            meta has no values: load, resume or initialise them before they are used.
        config: the configuration, or a file or mapping that holds it.
        optimizer: factory or optimizer section; None takes the configuration's.

    Raises:
        ConfigError, ValueError: something does not fit together.
        BudgetError: ``memory.ram`` is too small; names the unit and the smallest budget that works.
        RunDirectoryError: a page-file path is unusable; it was not changed.

    After any of these a plain model is as it was, unless a note of the error says otherwise; one of `deferred_init` is
    to be built anew.
    """

    def __init__(self, model: nn.Module, config: ConfigLike, optimizer: OptimizerLike = None) -> None:
        self.config = load_config(config)
        self.model = model
        deferred = built_store(model, self.config)
        optimizer = load_optimizer(optimizer) if isinstance(optimizer, Mapping) else optimizer
        self._store = deferred or PageStore(self.config)
        self._store.has_engine = True
        self._lifetime = Lifetime(self._store.close)
        try:
            with without_compiler():
                self._parts = build_parts(model, self.config, optimizer, self._store, self._lifetime.undo)
            self.optimizer.engine = self  # type: ignore[attr-defined]
            forks.disown_in_children(self)
            interrupts.check()  # raised after the return, it would leave an engine that nobody has to close
        except BaseException as error:
            if deferred is None:
                take_apart(self._store, model, error)
            self._lifetime.release()
            raise

    @property
    def _running(self) -> EngineParts:
        """The engine's parts; raises RuntimeError unless it is running."""
        self._lifetime.check_running()
        return self._parts

    @property
    def optimizer(self) -> PagedOptimizer:
        """The optimizer, for your own training loop."""
        return self._parts.optimizer

    @left_open
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self.model(*args, **kwargs)

    @left_open
    def backward(self, loss: Tensor | HasLoss | Mapping[str, Any]) -> None:
        """Backward of a micro-batch: of its loss, or an output that has one, divided by ``update.accumulation``.

        Raises:
            ValueError: the loss is not one number. NonFiniteError: it is NaN or infinite; no parameter was changed by
                it, and its gradients are dropped. On a device the next forward pass or `step` may be what raises.
        """
        self._running.step.backward(loss)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call ``backward`` on in your own loop: multiplied by the loss scale, with fp16 parameters."""
        return self._parts.step.scaled(loss)

    @property
    def loss_scale(self) -> LossScale | None:
        """The loss scale and how many steps overflowed, or None without loss scaling."""
        return self._parts.step.loss_scale

    def step(self) -> bool:
        """Make the optimizer step once ``update.accumulation`` micro-batches are through; returns whether it did."""
        if not self._running.step.take_micro_batches():
            return False
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True

    def abandon_step(self) -> None:
        """Give up the step under way, after an error in its backward pass (Ctrl-C in a notebook, say).

        Gradients that no update has used are dropped, updates that were made stay (``update.start = "step"``: none).
        Raises RuntimeError if the error cut the update of a unit off half-way; only a commit leads on.
        """
        self._running.step.abandon()

    def add_gradient(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add to ``parameter.grad``, as a backward pass does; for code that computes gradients outside of one.

        Args:
            gradient: of the parameter's shape and dtype; it is copied.

        Raises:
            ValueError: the parameter is not in pages, or the gradient does not fit.
            StaleGradientError: the parameter's update of this step has been made.
        """
        self._running.step.add_gradient(parameter, gradient)

    def gradient_ready(self, parameter: Tensor, gradient: Tensor | None = None) -> None:
        """Say that no gradient of a parameter comes any more in this step, so that its update need not wait for as
        many as in earlier steps, or for the step's end; for code that computes gradients outside `backward`.

        Args:
            gradient: the last one, added as `add_gradient` does, with its errors; None: it is there already, or there
                is none.
        """
        self._running.step.gradient_ready(parameter, gradient)

    @property
    def grad_norm(self) -> float | None:
        """Global 2-norm of the last step's gradients, before clipping and without the loss scale; not finite where the
        step was dropped for it. None before the first step, and without clipping and loss scaling."""
        norm = self._parts.updater.grad_norm
        return None if norm is None else float(norm)

    def drain(self) -> None:
        """Make every update that has been decided on, and wait until no page moves. Raises as `close`."""
        self._running.updater.drain()
        self._store.driver.quiesce()
        self._store.mover.monitor.check()

    def track(self, name: str, thing: Stateful, *, replace: bool = False) -> None:
        """Save the state of an LR scheduler, a data source or the like in every commit; `resume` restores it.

        Args:
            thing: has ``state_dict()`` and ``load_state_dict()``: Python's plain values and containers, NumPy's numbers
                and arrays, and tensors on the CPU, 16 MiB in all. replace: what has the name so far.

        Raises:
            ValueError: the name is taken, or the state has something else; says where in it.
        """
        self._parts.checkpoints.track(name, thing, replace=replace)

    def save(self, name: str | None = None, *, wait: bool = True) -> int:
        """Commit the steps made so far; call it between steps, when everything tracked is up to date.

        Args:
            name: named commits are never deleted; a later one may take the name over.
            wait: until it is durable; otherwise that happens in the background, and the next call raises its error.
                Either way the commit's number is returned.

        Raises:
            DiskFullError: there is no room for it; nothing was written, training can go on.
            CommitError, StorageError, OSError: it could not be made; earlier ones are whole.
            RuntimeError: backward has been called since the last step; nothing was begun.
        """
        self._running.step.check_ended()
        number = self._parts.checkpoints.save(self._parts.step.made, name)
        if wait:
            self._parts.checkpoints.committer.wait()
        return number

    @property
    def commit_due(self) -> bool:
        """Whether `save_if_due` would commit now. Raises what went wrong with a background commit."""
        return self._running.checkpoints.due(self._parts.step.made) and not self._parts.step.under_way

    def save_if_due(self) -> int | None:
        """Commit in the background if ``commit.every_steps`` or ``commit.every_s`` says so; call it between steps.

        In lock-free mode, gradients on their way are not waited for: a run that resumes from such a commit misses them,
        at most ``max_staleness`` + 1 of each parameter. `save` has them all.

        Returns the commit's number, or None when it is not time, one is still being written, or a step is under way.
        Raises as `save`, also for a background commit that failed.
        """
        return self._parts.checkpoints.save(self._parts.step.made, whole=False) if self.commit_due else None

    def resume(
        self, name: str | None = None, *, allow_older: bool = False, keep_hyper_parameters: bool = False
    ) -> Resumed | None:
        """Resume from the newest commit in ``ssd.paths``, or the one of this name; returns it, or None without one.

        Parameters, optimizer states, buffers, hyper-parameters, random generators and everything tracked are as they
        were. A step under way is given up.

        Args:
            allow_older: pass over a damaged newest commit; the result says what was wrong with it.
            keep_hyper_parameters: keep those that the optimizer has here (learning rate, ...), not the commit's.

        Raises:
            CommitError: it is damaged, missing, or of another model, optimizer or precision; nothing was changed.
        """
        if self._running.step.under_way:
            self.abandon_step()
        resumed = self._parts.checkpoints.resume(name, allow_older=allow_older, keep_hypers=keep_hyper_parameters)
        if resumed is not None:
            self._parts.step.go_on_from(resumed.step)
        return resumed

    def export(self, folder: str | Path, *, dtype: str = "keep", max_shard: str | int = "5GB") -> Path:
        """Commit the steps made so far, and write their weights as safetensors files; see `offload export --help`.

        Models of transformers get their config.json, generation_config.json and tokenizer's files beside them.

        Args:
            folder: new or empty; it appears whole or not at all. Returned.
            dtype: "keep", "fp32" (the masters, where there are any), "bf16" or "fp16".
            max_shard: most bytes of tensors in one file.

        Raises:
            ValueError: ``dtype`` or ``max_shard`` is none.
            ExportError: the folder holds something, or ``state_dict()`` of the model is not its parameters and buffers
                alone (nothing was committed); or ``dtype`` does not have a value (nothing is left of the export).
            StorageError: the folder cannot be written, and as `save`; nothing is left of the export.
        """
        folders = [directory.path for directory in self._store.directories]
        shard_bytes = parse_bytes(max_shard)
        to = check_request(folders, Path(folder), dtype=dtype, max_shard_bytes=shard_bytes)
        check_exportable(unlike_state_dict(self.model))
        parts = self._parts.checkpoints.parts_of(self.save())
        beside, console = partial(write_model_files, self.model, dtype=dtype), Console(quiet=True)
        with self._parts.checkpoints.on_first_rank() as is_first:
            if is_first:
                export_commit(parts, to, dtype=dtype, max_shard_bytes=shard_bytes, console=console, beside=beside)
        return to

    @property
    def torch_device(self) -> torch.device:
        """Where the model computes, and where its inputs belong."""
        return self._store.binder.torch_device

    @property
    def steps(self) -> int:
        """Optimizer steps made, those before `resume` included."""
        return self._parts.step.made

    @property
    def run_id(self) -> str:
        """Identity of the folder that holds the run's commits, the first of ``ssd.paths``."""
        return self._store.directories[0].run_id

    @property
    def debug(self) -> DebugView:
        """The engine's parts, for tests and bug reports; unstable, see `offload.assembly.parts.DebugView`."""
        return DebugView(self._parts, closed=self._lifetime.closed)

    @property
    def planned_step_s(self) -> float | None:
        """Seconds of one step as planned, waits for all tiers included; None while there is no plan. In lock-free mode
        without waits for late updates, which `offload plan` simulates."""
        return planned_step_s(self._store)

    @property
    def staleness(self) -> int:
        """Steps that the parameters in use miss, in the unit that is furthest behind; 0 in exact mode."""
        return self._parts.updater.staleness

    def stats(self) -> Stats:
        """Counters since the engine was made."""
        self._lifetime.check_owned()
        return stats_of(self._store, self._parts.updater, self._parts.recompute_choice)

    def memory_report(self) -> MemoryReport:
        """Bytes per tier now, at their peak, and as planned."""
        self._lifetime.check_owned()
        return memory_report(self._store, self._parts.updater, self._parts.checkpoints.committer)

    def profile(self, folder: str | Path, title: str | None = None) -> Profile:
        """Record the steps made inside ``with engine.profile(folder):``; training computes the same bits.

        At the end the folder holds report.html, summary.json and trace.json (for ui.perfetto.dev), unless the block
        raised; the value of ``as`` has ``summary``. Default title: ``output.run``, or the model's class.

        Raises:
            RunDirectoryError: on entering, the folder holds something else. RuntimeError: a profile is being made.
        """
        self._lifetime.check_running()
        return Profile(folder, title, self.model, self._store, self.stats, self.memory_report, self.debug.locks)

    def close(self) -> None:
        """End everything the engine owns. Idempotent.

        Raises:
            StorageError: a background copy had failed; everything is closed all the same.
        """
        if self._store.given_back:
            return
        self._lifetime.end()
        step, committer = self._parts.step, self._parts.checkpoints.committer
        close_all(committer.close, self.optimizer.close, step.free_failed_backward, self._lifetime.release)

    def disown(self) -> None:
        """In a forked child: the engine is the parent's. Using it raises; closing it does nothing."""
        self._lifetime.disown()
        self._parts = replace(self._parts, updater=refusing_updater())
        self.optimizer.disown(self._parts.updater)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            # The first error is why, as a rule: a device that failed cannot be let go of either.
            error.add_note(f"the engine could not be closed in order, either: {failure}")
