"""What `benchmarks.gpu_check` checks, in order. Each check has a process of its own, and may leave it in any state.

| check | number |
|---|---|
| memory, training | the tests of tests/gpu |
| assert | seconds that `Engine.close` takes after an assertion in a kernel of the fourth step; it must end, with no
thread left |
| fork | bytes copied up that are the parent's, written while a child lives; the child must take no memory |
| synchronisations | of one planned step, as `torch.cuda.set_sync_debug_mode` counts them; none |
| host-memory | bytes that torch's own pinned pool has after ten steps, beside ``memory.ram``; at most 1 MiB |
| pinning | seconds for 64 GiB |
| uploads | GB/s of copies up; at least 40 |
| home, home-clipped, streamed, streamed-clipped | step time over plain PyTorch's (`benchmarks.step`) |
| bf16 | steps of a 16-bit block whose outputs and gradients are plain PyTorch's, bit for bit, under the math kernel of
attention |
| activations | share of the copies of saved tensors that is beside kernels, from torch's profiler |
| waiting | processor time of a thread that waits for the device, over the time it waits; at most 0.1 |
| exit | seconds of a program that ends without closing its engine while copies are under way; it must end with 0 |
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import offload
from benchmarks.common import Block
from benchmarks.gpu_check.memory_checks import fork, host_memory, pinning, synchronisations, uploads, waiting
from benchmarks.gpu_check.setting import PLANNED, Outcome, Run, Setting, Status, judged
from offload.store.store_parts import StoreParts
from pagemem.devices.accelerator import Copy, DeviceEvent, RamDevice
from pagemem.telemetry.intervals import union

ROOT: Final = Path(__file__).resolve().parents[2]


def tests(file: str, _: Setting) -> Outcome:
    """Tests of tests/gpu."""
    command = [sys.executable, "-m", "pytest", f"tests/gpu/{file}", "-q", "-p", "no:cacheprovider"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    lines = ended.stdout.strip().splitlines() or [ended.stderr.strip()]
    failed = [line.partition(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return judged(ended.returncode == 0, lines[-1].strip("= "), "; ".join(failed[:3]))


class FailingDevice(RamDevice):
    """A device of ordinary memory of which every call raises from some time on, as of a GPU after an assertion in a
    kernel."""

    failed = False

    def _check(self) -> None:
        if self.failed:
            raise RuntimeError("device-side assert (emulated)")

    def reached(self) -> bool:
        """As an event: of anything."""
        self._check()
        return True

    def wait(self) -> None:
        """As an event."""
        self._check()

    def seconds(self, *_: Any) -> float:
        """As a copy, and as a clock."""
        return 1e-6

    def record_event(self) -> DeviceEvent:
        """As `Accelerator.record_event`."""
        self._check()
        return self

    def wait_for(self, event: DeviceEvent) -> None:
        """As `Accelerator.wait_for`."""
        self._check()

    def copy_up(self, source: Tensor, into: Tensor, after: DeviceEvent) -> Copy:
        """As `Accelerator.copy_up`."""
        self._check()
        super().copy_up(source, into, after)
        return self


def assertion(setting: Setting) -> Outcome:
    """An assertion in a kernel of the fourth step; then close."""
    emulated = FailingDevice()
    if setting.emulated:
        StoreParts.accelerator = lambda _: emulated  # type: ignore[assignment,method-assign]
    run = Run(setting, setting.config())
    run.steps(3)
    raised = ""
    try:
        x, y = run.batch()
        if setting.emulated:
            emulated.failed = True
        else:
            x[0, 0] = 1 << 30  # no such row in the embedding
        run.engine.backward(run.engine(x, y))
        run.engine.step()
        run.steps(1)
    except RuntimeError as error:
        raised = str(error).splitlines()[0]
    began_s = time.perf_counter()
    try:
        run.engine.close()
    except RuntimeError as error:
        raised = raised or str(error).splitlines()[0]
    spent_s = time.perf_counter() - began_s
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith(("pagemem", "optim", "offload"))]
    detail = "no error was raised" if not raised else f"threads left: {', '.join(left)}" if left else raised
    return judged(bool(raised) and not left, f"close took {spent_s:.3f} s", detail)


def timed_step(options: Sequence[str], setting: Setting) -> Outcome:
    """`benchmarks.step` against plain PyTorch."""
    device = [] if setting.emulated else ["--device", "cuda"]
    environment = os.environ.copy()
    if not setting.emulated and setting.torch_device.index is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(setting.torch_device.index)
    command = [
        sys.executable, "-m", "benchmarks.step", "--size", setting.size, "--json", "--turns", "2", "--ram-share", "1.7",
        "--dir", str(setting.folder), *device, *options,
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if ended.returncode:
        return Outcome(
            Status.FAILED, detail=(ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        )
    record = json.loads(ended.stdout.splitlines()[-1])
    ratio, engine = record["ratio"]["plain"], record["step_s"]["engine"]
    equal = {True: "losses equal bit for bit", False: "losses differ", None: "bits not compared"}[
        record["losses_equal"]
    ]
    number = f"{ratio['median']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f}) of plain torch"
    good = record["losses_equal"] is not False and not record["deviations"]
    return judged(good, number, f"{engine['median']:.3f} s a step, {record['deviations']} deviations, {equal}")


class _Attention(nn.Module):
    """A transformer block with a mean of squares."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(256)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, 256) to a scalar."""
        y: Tensor = self.block(x)
        return y.float().square().mean()


def bf16(setting: Setting) -> Outcome:
    """A 16-bit block at a learning rate of 0: outputs and gradients of every step are plain PyTorch's."""
    torch.manual_seed(1)
    built = _Attention()
    plain = _Attention()
    plain.load_state_dict(built.state_dict())
    plain = plain.bfloat16().to(setting.torch_device)
    config = setting.config() | {"model": {"factory": "none:none", "dtype": "bf16"}}

    def still(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.0, fused=True)

    n_equal = 0
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        offload.initialize(built, config, still) as engine,
    ):
        for number in range(PLANNED):
            generator = torch.Generator().manual_seed(number)
            values = torch.randn(4, 64, 256, generator=generator).bfloat16().to(setting.torch_device)
            ours, theirs = (values.clone().requires_grad_() for _ in range(2))
            loss = engine(ours)
            engine.backward(loss)
            engine.step()
            expected = plain(theirs)
            expected.backward()
            n_equal += bool(
                torch.equal(loss.detach(), expected.detach()) and torch.equal(_gradient(ours), _gradient(theirs))
            )
    return judged(n_equal == PLANNED, f"{n_equal} of {PLANNED} steps equal")


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def activations(setting: Setting) -> Outcome:
    """Saved tensors in host pages: how much of their copies is beside kernels in a planned step."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    run = Run(setting, setting.config(device="64MiB", activations=0, recompute="never"))
    run.steps(PLANNED)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run.steps(1)
    run.engine.close()
    spans: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for event in profiled.events() or []:
        if event.device_type == DeviceType.CUDA and not event.name.startswith("Memset"):
            spans[event.name.startswith("Memcpy")].append(
                (round(event.time_range.start * 1e3), round(event.time_range.end * 1e3))
            )
    share = beside(spans[True], spans[False])
    n_kernels = len(spans[False])
    return judged(
        bool(spans[True] and n_kernels),
        f"{share:.0%} beside kernels",
        f"{len(spans[True])} copies, {n_kernels} kernels",
    )


def beside(copies: Sequence[tuple[int, int]], kernels: Sequence[tuple[int, int]]) -> float:
    """The share of the time of copies in which there are kernels, too; both are [start, end), in any order."""
    moving, computing = union(list(copies)), union(list(kernels))
    total = sum(end - start for start, end in moving)
    shared = sum(max(0, min(end, stop) - max(start, begin)) for start, end in moving for begin, stop in computing)
    return shared / total if total else 0.0


def exiting(setting: Setting) -> Outcome:
    """A program that ends without closing its engine, copies under way. What it ends with is seen by whoever started
    it."""
    began_s = time.perf_counter()
    run = Run(setting, setting.config(activations=0))
    for _ in range(PLANNED):
        run.step()
    run.engine.backward(run.engine(*run.batch()))
    return judged(True, f"{time.perf_counter() - began_s:.1f} s until its end")


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        needs_gpu: whether there is nothing to see on the emulated device.
        ends_at_once: whether its process is left without tearing down what it has: how that ends is not what is
            checked.
    """

    name: str
    what: str
    make: Callable[[Setting], Outcome]
    limit_s: float
    needs_gpu: bool = True
    ends_at_once: bool = False


_HOME: Final = ["--device-share", "3.3"]
_STREAMED: Final = ["--device-share", "0.5", "--device-states", "never"]
_CLIPPED: Final = ["--clip-norm", "1.0"]

CHECKS: Final = (
    Check("memory", "tests/gpu/test_cuda_memory.py", partial(tests, "test_cuda_memory.py"), 300),
    Check("training", "tests/gpu/test_cuda_training.py", partial(tests, "test_cuda_training.py"), 600),
    Check(
        "assert", "an assertion in a kernel of step 4, then close", assertion, 60, needs_gpu=False, ends_at_once=True
    ),
    Check("fork", "a child while memory is pinned", fork, 60, needs_gpu=False),
    Check("synchronisations", "of one planned step", synchronisations, 120),
    Check("host-memory", "torch's pinned pool after ten steps", host_memory, 120),
    Check("pinning", "64 GiB, once", pinning, 180),
    Check("uploads", "GB/s of copies up", uploads, 60, needs_gpu=False),
    Check("home", "steps with all at home on the device", partial(timed_step, _HOME), 600, needs_gpu=False),
    Check(
        "home-clipped",
        "likewise, with clipping",
        partial(timed_step, ["--device-share", "4.4", *_CLIPPED]),
        600,
        needs_gpu=False,
    ),
    Check("streamed", "steps with parameters that come and go", partial(timed_step, _STREAMED), 600, needs_gpu=False),
    Check(
        "streamed-clipped",
        "likewise, with clipping",
        partial(timed_step, [*_STREAMED, *_CLIPPED]),
        600,
        needs_gpu=False,
    ),
    Check("bf16", "a 16-bit block against plain torch", bf16, 120, needs_gpu=False),
    Check("activations", "copies of saved tensors beside kernels", activations, 180),
    Check("waiting", "processor time of a waiting thread", waiting, 60),
    Check("exit", "a program that does not close its engine", exiting, 120, needs_gpu=False),
)
