"""A measured process of `benchmarks.lockfree`: one engine that trains a byte-level GPT on real text when it is told to.

It reads commands from standard input, one a line, and answers each with one line of JSON:

    run N             N steps; what each took, moved and missed
    drain             wait until every update is made and no page moves
    validate N ROWS   bits a byte of N validation batches, each by itself
    stop              close and end
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

import offload
from benchmarks import common
from benchmarks.subjects import Pipe, updates_off
from examples.byte_gpt import byte_gpt, python_source_text
from offload.config import OptimizerConfig, TrainConfig
from offload.launch.loop import learning_rate
from offload.reporting.summary import BITS_PER_NAT
from optim.lockfree.updater import LockFreeUpdater

OPTIMIZER: Final = {"name": "adamw", "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@dataclass(frozen=True)
class Job:
    """One engine and its data.

    Attributes:
        d_model, n_layer, n_head, seq: the model. batch: rows a step.
        mode: of the updates; "off" is lock-free mode whose gradients are received and dropped.
        ram_bytes: the budget for parameters, gradients and states.
        steps, warmup_steps: of the schedule, a cosine to a tenth.
        seed: of the initial values and of the data order.
        dir: for page files and the text.
    """

    name: str
    dir: str
    d_model: int
    n_layer: int
    n_head: int
    seq: int
    batch: int
    mode: str
    ram_bytes: int
    page: str
    max_staleness: int = 4
    exact_steps: int = 0
    limit_mb_per_s: float | None = None
    steps: int = 1000
    warmup_steps: int = 0
    lr: float = 3e-4
    seed: int = 1
    threads: int = 2

    def config(self) -> dict[str, Any]:
        """The engine's configuration."""
        return {
            "seed": self.seed,
            "memory": {"ram": self.ram_bytes, "page": self.page},
            "ssd": {"paths": [f"{self.dir}/pages-{self.name}"], "limit_mb_per_s": self.limit_mb_per_s},
            "update": {
                "mode": "exact" if self.mode == "exact" else "lock-free",
                "max_staleness": self.max_staleness,
                "exact_steps": self.exact_steps,
            },
            "optimizer": {**OPTIMIZER, "lr": self.lr},
        }

    def n_parameters(self) -> int:
        """Parameters of the model, without memory for them."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.model().parameters())

    def model(self) -> torch.nn.Module:
        """The model, initialised by the global generator."""
        return byte_gpt(self.d_model, self.n_layer, self.n_head, self.seq)


class Trainer:
    """The engine of a job, its data and its schedule."""

    def __init__(self, job: Job) -> None:
        self.job = job
        torch.manual_seed(job.seed)
        shutil.rmtree(f"{job.dir}/pages-{job.name}", ignore_errors=True)
        self.data = python_source_text(f"{job.dir}/text", seed=job.seed)
        config = job.config()
        section = OptimizerConfig.model_validate(config["optimizer"])
        with offload.deferred_init(config):
            model = job.model()
        if job.mode == "off":
            with updates_off():
                self.engine = offload.initialize(model, config, section)
        else:
            self.engine = offload.initialize(model, config, section)
        train = TrainConfig(
            steps=job.steps, batch=job.batch, seq=job.seq, schedule="cosine", warmup_steps=job.warmup_steps
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.engine.optimizer, learning_rate(train))
        # What the results say of staleness is read off the channels' clocks; there is no public way to it.
        updater = self.engine.debug.updater
        assert isinstance(updater, LockFreeUpdater) == (job.mode != "exact")
        channels = updater._channels if isinstance(updater, LockFreeUpdater) else {}
        self.clocks = [(sum(slot.numel for slot in unit.slots), channel.clock) for unit, channel in channels.items()]
        self.made = 0

    def run(self, n_steps: int) -> list[dict[str, float]]:
        """Train ``n_steps`` steps; what each of them took and moved."""
        return [self._step() for _ in range(n_steps)]

    def _step(self) -> dict[str, float]:
        engine, job = self.engine, self.job
        x, y = self.data.batch(self.made, job.batch, job.seq)
        before = engine.stats()
        started_s = time.perf_counter()
        loss = engine(x, y)
        missed = [(numel, clock.staleness) for numel, clock in self.clocks]
        loss.backward()
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        step_s = time.perf_counter() - started_s
        self.schedule.step()
        self.made += 1
        moved = engine.stats().since(before)
        return {
            "step_s": step_s,
            "loss": float(loss.detach()),
            "stale_mean": sum(n * s for n, s in missed) / max(1, sum(n for n, _ in missed)),
            "stale_max": max((s for _, s in missed), default=0),
            "bytes_read": moved.bytes_read,
            "bytes_written": moved.bytes_written,
            "wait_s": moved.wait_s,
            "update_s": moved.update_s,
            "deviations": moved.deviations,
        }

    def validate(self, n_batches: int, rows: int) -> list[float]:
        """Bits a byte of each validation batch, with every update made."""
        self.engine.drain()
        model = self.engine.model.eval()
        with torch.no_grad():
            bits = [
                float(model(x, y)) * BITS_PER_NAT
                for x, y in self.data.validation_batches(n_batches, rows, self.job.seq)
            ]
        model.train()
        return bits

    def close(self) -> None:
        """Close the engine and remove its page files."""
        self.engine.close()
        shutil.rmtree(f"{self.job.dir}/pages-{self.job.name}", ignore_errors=True)

    def summary(self) -> dict[str, Any]:
        """What it had in memory."""
        report = self.engine.memory_report()
        return {"peak_rss_bytes": common.status_bytes("VmHWM"), "memory": dataclasses.asdict(report)}


def start(job: Job) -> Pipe:
    """The job's process, seen from the measuring one."""
    return Pipe([sys.executable, "-m", "benchmarks.lockfree.child", json.dumps(dataclasses.asdict(job))])


def main() -> None:
    """Do as told."""
    job = Job(**json.loads(sys.argv[1]))
    Path(job.dir).mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(job.threads)
    trainer = Trainer(job)
    for line in sys.stdin:
        command, *numbers = line.split()
        answer: Any = None
        if command == "run":
            answer = trainer.run(int(numbers[0]))
        elif command == "drain":
            trainer.engine.drain()
        elif command == "validate":
            answer = trainer.validate(int(numbers[0]), int(numbers[1]))
        elif command == "stop":
            answer = trainer.summary()
        print(json.dumps(answer), flush=True)
        if command == "stop":
            break
    trainer.close()


if __name__ == "__main__":
    main()
