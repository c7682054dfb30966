"""The configuration: one file (JSON, TOML or YAML) or mapping, checked whole when it is read.

Unknown keys are errors that name the nearest known key. Sizes are integers (bytes) or text such as ``"4GiB"``. What is
read is resolved once and saved with the run; nothing changes it afterwards.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)

from offload.config_file import ConfigError as ConfigError
from pagemem.frames.page import MAX_PAGE_BYTES, MIN_PAGE_BYTES
from pagemem.units import BLOCK_BYTES, KiB, MiB, format_bytes, parse_bytes


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f'not a size: {value!r}; write whole bytes or text such as "4GiB"')
    return parse_bytes(value)


def _page(value: object) -> int | str:
    return "auto" if value == "auto" else _size(value)


def _direct(value: object) -> bool | str:
    if value == "auto" or isinstance(value, bool):
        return value
    raise ValueError(f'must be "auto", true or false, not {value!r}')


def _worker(value: object) -> bool | str:
    if value == "auto" or isinstance(value, bool):
        return value
    raise ValueError(f'must be "auto", true or false, not {value!r}')


def _device(value: str) -> str:
    if re.fullmatch(r"cpu|cpu-emulated|cuda(:\d+)?", value) is None:
        raise ValueError(f'must be "cpu", "cuda", "cuda:N" or "cpu-emulated", not {value!r}')
    return value


def _scale(value: object) -> float | str:
    if value == "auto" or (
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
    ):
        return value if isinstance(value, str) else float(value)
    raise ValueError(f'must be "auto" or a number above 0, not {value!r}')


def _folder(value: str) -> str:
    if not value.strip() or "\0" in value or "\n" in value:
        raise ValueError(
            f"must be the name of a folder, not {'an empty one' if not value.strip() else reprlib.repr(value)}"
        )
    return value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


#: The module of the example factories, which a user replaces.
PLACEHOLDER: Final = "my_module"
_FACTORY: Final = r"^[\w.]+:[\w.]+$"
Size = Annotated[int, BeforeValidator(_size)]
Folder = Annotated[str, AfterValidator(_folder)]
#: A decay rate of a moment.
Decay = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    # Strict: a number in quotes or a yes for a true is a slip of the pen, not a value.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class MemoryConfig(_Section):
    """Host memory."""

    ram: Size = Field(gt=0, examples=["4GiB"])
    """RAM budget of the model's states: parameters, gradients in flight and optimizer states. Activations and the
    interpreter are not part of it."""
    activations: Size | None = Field(default=None, ge=0)
    """Memory for tensors that autograd saves for the backward pass, in addition to ``ram`` (or ``device``). Beyond it,
    results of elementwise ops are recomputed where possible; of the others, those saved first go to pages of ``ram``
    and from there to SSD. None: all stay in memory."""
    recompute: Literal["auto", "never"] = "auto"
    """With ``activations``: "auto" recomputes whole blocks (entries of an ``nn.ModuleList`` or ``nn.Sequential``) in
    the backward pass, as many as the plan predicts to shorten the step; "never": none."""
    device: Size | None = Field(default=None, gt=0)
    """Budget of pages on the device. Required where ``device`` is not "cpu", refused otherwise."""
    device_states: Literal["auto", "never"] = "auto"
    """Which units keep parameters and optimizer states on the device, and are updated there: "auto" as many as fit
    beside the streamed ones; "never": none, and all updates run in RAM."""
    heap: Literal["auto", "keep", "trim"] = "auto"
    """What happens to heap memory that a step frees: "keep" leaves it with the process for the next step, which is
    faster; "trim" returns blocks of 32 MiB, or over quantised weights of 4 MiB, at once and, where not all pages fit
    in ``ram``, other free pages once a step. "auto" trims where ``activations`` is set and over quantised weights,
    unless the process was started with ``GLIBC_TUNABLES=glibc.malloc.tcache_count=0``, as ``offload launch`` starts
    itself where ``activations`` is set. The setting applies to the whole process."""
    page: Annotated[Literal["auto"] | int, BeforeValidator(_page)] = "auto"
    """Page size, a power of two from 64KiB to 64MiB. "auto": about a 128th of ``ram``, up to 256KiB, and
    about a 4096th of large budgets, up to 4MiB."""

    @model_validator(mode="after")
    def _check(self) -> MemoryConfig:
        page = resolve_page_bytes(self.ram) if self.page == "auto" else self.page
        if page & (page - 1) or not MIN_PAGE_BYTES <= page <= MAX_PAGE_BYTES:
            raise ValueError(f"page is {page} bytes; it must be a power of two from 64KiB to 64MiB")
        if self.ram < page:
            raise ValueError(f"ram is {format_bytes(self.ram)}, less than one page of {format_bytes(page)}; raise ram")
        if self.device is not None and self.device < page:
            raise ValueError(
                f"device is {format_bytes(self.device)}, less than one page of {format_bytes(page)}; raise device"
            )
        return self


class SsdConfig(_Section):
    """Page files."""

    paths: list[Folder] = Field(min_length=1, examples=[["runs/example/pages"]])
    """Folders for the page files, one per disk; pages are striped over them. Each must be new, empty or of an
    earlier run."""
    direct: Annotated[Literal["auto"] | bool, BeforeValidator(_direct)] = "auto"
    """O_DIRECT: "auto" where the file system takes it, true to insist, false for buffered I/O through aiofiles."""
    checksums: bool = True
    """Keep an xxh3 checksum of every page written and verify it on every read."""
    threads: int = Field(default=4, ge=1, le=64)
    """I/O threads per path, for reading and for writing each."""
    limit_mb_per_s: float | None = Field(default=None, ge=0.01)
    """Bandwidth (10^6 bytes/s) of reads and writes together, to model a slower disk. None: as fast as it goes."""
    max_request: Size = Field(default=16 * MiB, ge=4 * KiB, le=16 * MiB)
    """Largest single read or write, a multiple of 4KiB up to 16MiB; larger tensors are split over the threads.

    Each request costs the wake-up of a thread, which holds up the threads that compute.
    """

    @model_validator(mode="after")
    def _check(self) -> SsdConfig:
        if self.max_request % BLOCK_BYTES:
            raise ValueError(f"max_request is {self.max_request} bytes; it must be a multiple of {BLOCK_BYTES}")
        resolved = [str(Path(path).resolve()) for path in self.paths]
        if len(set(resolved)) < len(resolved):
            raise ValueError(f"paths name the same folder twice: {self.paths}")
        return self


class UpdateConfig(_Section):
    """When and how gradients become updates."""

    mode: Literal["exact", "lock-free", "auto"] = "exact"
    """"exact": the same bits as plain PyTorch. "lock-free": a thread applies updates as fast as the disk allows, and
    training waits for it only to keep ``max_staleness``. "auto": the one whose steps are forecast to be quicker, see
    docs/updates.md."""
    max_staleness: int = Field(default=4, ge=0)
    """Lock-free mode: how many of the steps before a step its parameters may miss. 0: the bits of exact mode."""
    exact_steps: int = Field(default=100, ge=0)
    """Lock-free mode: how many first updates of each parameter are made as in exact mode."""
    on_time: Literal["auto", "never"] = "never"
    """Lock-free mode: "auto" updates as many units as fit in RAM with their states on the training thread, as exact
    mode does, so that only the others can be late; "never": the update thread has all updates."""
    threads: int = Field(default=1, ge=1, le=64)
    """Lock-free mode: compute threads of the updates, which run beside those of the step."""
    worker: Annotated[Literal["auto"] | bool, BeforeValidator(_worker)] = "auto"
    """Exact mode: whether a thread of its own makes the updates in RAM, beside compute. "auto": where there is a
    device, so that the thread that gives it work does not stop for them."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest global 2-norm of the gradients; larger ones are scaled down. None: no clipping. With clipping, updates
    wait for the whole backward pass and gradients are kept in pages until then."""
    norm: Literal["auto", "torch", "blocks"] = "auto"
    """How the gradients' norm is summed up: "torch" as ``torch.nn.utils.clip_grad_norm_`` does, "blocks" over blocks of
    64 elements, exactly, so that it is the same for any number of ranks. "auto": "torch" on one rank, else "blocks"."""
    loss_scale: Annotated[Literal["auto"] | float, BeforeValidator(_scale)] = "auto"
    """What losses are multiplied by before backward: "auto" is dynamic for fp16 parameters and none for others; a
    number is fixed. A step whose gradients overflow is dropped. In your own loop call backward on
    ``engine.scaled(loss)``."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches per optimizer step of ``engine.step()`` and of launch. Your own loop simply calls backward several
    times."""
    start: Literal["auto", "step"] = "auto"
    """"auto" updates a unit as soon as its gradients are complete, judged by earlier steps; "step" waits for
    ``optimizer.step()``: for loops that touch gradients later than in their first step, or whose steps get more
    backward passes over time."""
    _why: str = PrivateAttr(default="")

    @model_validator(mode="after")
    def _check(self) -> UpdateConfig:
        if self.norm == "blocks" and self.mode != "exact":
            raise ValueError(f'norm is "blocks", which only mode "exact" has; mode is "{self.mode}"')
        return self

    @property
    def lock_free(self) -> bool:
        """Whether updates are lock-free; with "auto" they are exact until another mode is chosen."""
        return self.mode == "lock-free"

    @property
    def said(self) -> str:
        """The mode, and where it was chosen by a forecast, why, in one line."""
        return self._why or ("exact (auto: no forecast was made)" if self.mode == "auto" else self.mode)

    def chosen(self, mode: Literal["exact", "lock-free"], why: str) -> UpdateConfig:
        """The same with a mode that "auto" stands for."""
        made = self.model_copy(update={"mode": mode})
        made._why = why
        return made


Degree = Literal["none", "states", "gradients", "all"]


class ParallelConfig(_Section):
    """How the processes of a run, its ranks, share a model. All ranks have the same section."""

    shard: int | None = Field(default=None, ge=1)
    """Ranks among which units are cut; ranks r with the same ``r // shard`` have the whole model together, and such
    groups are replicas of each other. None: all ranks over ``replicate``."""
    replicate: int | None = Field(default=None, ge=1)
    """Groups of ``shard`` ranks. None: as many as there are; with neither given, one."""
    degree: Degree = "all"
    """What is cut: "none": nothing, every rank has and updates everything; "states": masters and optimizer states, and
    the summed gradients; "gradients": the same, as sums are never kept whole here; "all": parameters as well, which are
    gathered for each use, unless there is room to keep them. Never changes a bit of what is trained."""
    degree_of: dict[str, Degree] = {}
    """Other degrees for some units: of the patterns (as in shells, such as "*.norm*") that match the name of one of a
    unit's parameters, the first decides."""


class CommitConfig(_Section):
    """When training is made durable, and how much of it is kept."""

    every_steps: int | None = Field(default=None, ge=1)
    """Commit in the background once so many steps are made since the last commit of any kind, by time, by name or at
    the end of a launch included. None: not by steps."""
    every_s: float | None = Field(default=None, gt=0)
    """Commit when the last one is this old, in seconds. None: not by time."""
    at_end: bool = True
    """`offload launch`: commit when training ends, also on Ctrl-C, SIGTERM or a closed output pipe."""
    keep: int = Field(default=2, ge=1)
    """Unnamed commits that are kept. Named commits are never deleted; a later commit may take the name over."""
    keep_best: bool = False
    """`offload launch`: commit the lowest validation loss so far under the name "best", whenever an evaluation of
    ``train.evaluate_every`` finds one."""
    hyper_parameters: Literal["commit", "configuration"] = "commit"
    """`offload launch`: which hyper-parameters of the optimizer (learning rate, weight decay, ...) hold when a run
    resumes: those of the commit, or those of the configuration."""
    resume: Literal["auto", "never"] = "auto"
    """`offload launch`: "auto" resumes from the newest commit in ``ssd.paths``, "never" refuses a folder that contains
    commits."""


class OptimizerConfig(_Section):
    """The optimizer, unless a factory is given in code."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """Which of torch's optimizers."""
    lr: float = Field(default=3e-4, ge=0)
    """Learning rate; a schedule multiplies it."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.95)
    """Decay of Adam's first and second moment, each in [0, 1) (adam, adamw)."""
    eps: float = Field(default=1e-8, ge=0)
    """Added to the root of the second moment (adam, adamw)."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Weight decay; decoupled for adamw."""
    momentum: float = Field(default=0.9, ge=0)
    """Momentum (sgd)."""
    nesterov: bool = False
    """Nesterov momentum (sgd)."""
    no_decay: list[str] = []
    """Parameters without weight decay: parts of their names; "1d" stands for all with fewer than two dimensions."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError('nesterov needs name "sgd" and a momentum above 0')
        return self

    @property
    def n_states(self) -> int:
        """States that it keeps for each element."""
        return int(self.momentum != 0) if self.name == "sgd" else 2


#: In place of `ModelConfig.factory` where a training loop of one's own has the model.
_NO_FACTORY: Final = "none:none"


class ModelConfig(_Section):
    """What `offload launch` trains. In your own loop ``dtype`` stands alone."""

    factory: str = Field(pattern=_FACTORY, examples=[f"{PLACEHOLDER}:make_model"])
    """``module:callable`` that returns the model; called with ``arguments``. Its forward(x, y) returns the loss."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the factory."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Parameters in compute: fp32, or bf16 or fp16 with an fp32 master in pages."""

    @model_validator(mode="before")
    @classmethod
    def _without_factory(cls, raw: Any) -> Any:
        return {**raw, "factory": _NO_FACTORY} if isinstance(raw, Mapping) and set(raw) == {"dtype"} else raw

    @property
    def has_factory(self) -> bool:
        """Whether the model comes from here."""
        return self.factory != _NO_FACTORY


class DataConfig(_Section):
    """What `offload launch` trains on."""

    factory: str = Field(pattern=_FACTORY, examples=[f"{PLACEHOLDER}:make_data"])
    """``module:callable`` that returns the data; called with ``folder`` (for its cache), ``seed`` and ``arguments``."""
    arguments: dict[str, Any] = {}
    """Further keyword arguments of the factory."""


class TrainConfig(_Section):
    """How long and how `offload launch` trains."""

    steps: int = Field(ge=1, examples=[1000])
    """Optimizer steps."""
    batch: int = Field(ge=1, examples=[8])
    """Rows per micro-batch."""
    seq: int | None = Field(default=None, ge=1)
    """Length of a row, given to the data as the last argument. None: none is given."""
    log_every: int = Field(default=1, ge=1)
    """Steps between two progress lines in a pipe."""
    evaluate_batches: int = Field(default=8, ge=0)
    """Validation batches of an evaluation, before and after training; 0: no validation."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between two evaluations during training. None: only before and after it."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or cosine to a tenth at the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """Compute threads of torch. None: torch's own choice."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, more than steps ({self.steps}); lower it or raise steps"
            )
        if self.evaluate_every is not None and not self.evaluate_batches:
            raise ValueError(f"evaluate_every is {self.evaluate_every}, but evaluate_batches is 0; set both")
        return self


class OutputConfig(_Section):
    """What `offload launch` leaves behind."""

    run: Folder = Field(examples=["runs/example/log"])
    """Folder for metrics, the resolved configuration and the loss curve. Must be new, empty or of an earlier run."""
    log: Annotated[list[Literal["jsonl", "csv"]], BeforeValidator(_as_list), Field(min_length=1)] = ["jsonl"]
    """Files with the metrics of each step, one or a list: "jsonl" writes metrics.jsonl, "csv" metrics.csv."""
    callbacks: list[Annotated[str, Field(pattern=_FACTORY)]] = []
    """``module:callable`` factories of callbacks, called without arguments; each returns an ``offload.Callback``, whose
    methods are called as the run trains."""


class Config(_Section):
    """The configuration. ``memory`` and ``ssd`` are required; the last four sections are for `offload launch`."""

    seed: int = Field(default=1, ge=0, le=(1 << 64) - 1)
    """Seed of torch's generator and of the data order (launch)."""
    device: Annotated[str, AfterValidator(_device)] = "cpu"
    """Where compute runs: "cpu", directly on host pages; "cuda" (or "cuda:1", ...), on pages of a third tier with a
    budget of its own, ``memory.device``; "cpu-emulated", the same with the third tier in ordinary RAM, for tests."""
    memory: MemoryConfig
    """Host memory."""
    ssd: SsdConfig
    """Page files."""
    update: UpdateConfig = UpdateConfig()
    """Updates."""
    parallel: ParallelConfig = ParallelConfig()
    """Ranks, where the program was started as one of several (by torchrun)."""
    commit: CommitConfig = CommitConfig()
    """Commits."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer."""
    model: ModelConfig | None = None
    """Model (launch; ``model.dtype`` also in your own loop)."""
    data: DataConfig | None = None
    """Data (launch)."""
    train: TrainConfig | None = None
    """Training (launch)."""
    output: OutputConfig | None = None
    """Output (launch)."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if (self.device == "cpu") != (self.memory.device is None):
            wanted = (
                "leave memory.device out"
                if self.device == "cpu"
                else "set memory.device, the budget of parameters there"
            )
            raise ValueError(f'device is "{self.device}": {wanted}')
        if self.device != "cpu" and self.update.lock_free:
            raise ValueError(f'device is "{self.device}", for which updates are exact; set update.mode to "exact"')
        if self.output is not None:
            run = Path(self.output.run).resolve()
            for path in self.ssd.paths:
                if run.is_relative_to(Path(path).resolve()):
                    raise ValueError(
                        f"output.run ({self.output.run}) lies in the page-file folder {path}; name another folder"
                    )
        if self.commit.keep_best and (self.train is None or self.train.evaluate_every is None):
            raise ValueError("commit.keep_best needs train.evaluate_every, which is not set")
        return self

    def require(self, command: str, *sections: str) -> None:
        """Raise ConfigError where one of the sections that a command needs is missing."""
        missing = [name for name in sections if getattr(self, name) is None]
        if missing:
            raise ConfigError(f"{command} needs the sections {', '.join(missing)} as well")
        if "model" in sections and self.model is not None and not self.model.has_factory:
            raise ConfigError(f"{command} needs model.factory as well")

    def for_training(self, command: str, *more: str) -> TrainingConfig:
        """The same, with all that is trained; raises ConfigError where one of these sections is missing."""
        self.require(command, "model", "data", "train", *more)
        return TrainingConfig.model_construct(**{name: getattr(self, name) for name in Config.model_fields})

    def dumped(self) -> str:
        """The resolved configuration as the text of a JSON file."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


class TrainingConfig(Config):
    """A configuration with the sections of a training; ``output`` is for `offload launch` alone."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig


def resolve_page_bytes(ram_bytes: int) -> int:
    """The page size that "auto" stands for: a power of two not above ``ram_bytes / 128``, 64KiB to 256KiB, and beyond
    that not above ``ram_bytes / 4096``, up to 4MiB.

    Large pages make few checksums; small ones lose less to rounding tensors up to whole pages (see docs/pages.md).
    """
    page_bytes = MIN_PAGE_BYTES
    while page_bytes * 2 <= min(ram_bytes // 128, max(ram_bytes // 4096, 256 * KiB), 4 * MiB):
        page_bytes *= 2
    return page_bytes
