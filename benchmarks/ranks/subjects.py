"""The measured ranks: processes that step together, the engine's or FSDP2's, each blocked on its pipe meanwhile."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from benchmarks import common
from benchmarks.common import GPT, SIZES, batch, fused_adamw, plain_step
from benchmarks.ranks.slow_link import SlowLink
from benchmarks.subjects import Pipe

ENGINE, FSDP2, FSDP2_KEPT, ALONE = "engine", "fsdp2", "fsdp2, not resharded", "engine, one rank"
KINDS: Final = (ENGINE, FSDP2, FSDP2_KEPT, ALONE)


class EngineRank:
    """The engine, with a user's configuration: budget, folder and degree."""

    def __init__(self, a: argparse.Namespace) -> None:
        import offload

        n = common.n_parameters(*SIZES[a.size], a.seq)
        config = {
            "memory": {"ram": int(a.ram_share * 12 * n)}, "ssd": {"paths": [f"{a.dir}/{a.kind}"]},
            "parallel": {"degree": a.degree},
        }  # fmt: skip
        with offload.deferred_init(config):
            model = GPT(*SIZES[a.size], a.seq)
        self.model, self.optimizer = offload.prepare(model, fused_adamw, config)
        self._engine: Any = self.optimizer.engine  # type: ignore[attr-defined]

    def counters(self) -> dict[str, float]:
        """The engine's counters, bytes sent to other ranks, seconds of collectives."""
        store = self._engine.debug.store
        comm, sent = store.comm, getattr(store.collectives, "sent_bytes", 0)
        moved = {} if comm is None else {"comm_s": comm.busy_s, "sent_bytes": sent}
        return {**dataclasses.asdict(self._engine.stats()), **moved}

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()


class Fsdp2Rank:
    """torch's `fully_shard`, a group for each block and the rest.

    Args:
        reshard: whether parameters are let go of after the forward pass, and gathered again in the backward pass.
    """

    def __init__(self, a: argparse.Namespace, *, reshard: bool) -> None:
        from torch.distributed.fsdp import fully_shard

        torch.distributed.init_process_group("gloo")
        self.model = GPT(*SIZES[a.size], a.seq)
        for block in self.model.blocks:
            fully_shard(block, reshard_after_forward=reshard)
        fully_shard(self.model, reshard_after_forward=reshard)
        self.optimizer = fused_adamw(self.model.parameters())

    def counters(self) -> dict[str, float]:
        """Nothing of its own."""
        return {}

    def close(self) -> None:
        """End the process group."""
        torch.distributed.destroy_process_group()


def _answers(a: argparse.Namespace) -> None:
    torch.set_num_threads(a.threads)
    torch.manual_seed(1)
    rank, n_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    subject = EngineRank(a) if a.kind in (ENGINE, ALONE) else Fsdp2Rank(a, reshard=a.kind == FSDP2)
    for number, line in enumerate(sys.stdin):
        if line == "stop\n":
            break
        x, y = batch(number * n_ranks + rank, a.batch, a.seq)
        before, cpu_s = subject.counters(), time.process_time()
        started_s = time.perf_counter()
        loss = plain_step(subject.model, subject.optimizer, None, x, y)
        step_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
        after = subject.counters()
        moved = {key: after[key] - before[key] for key in after}
        print(json.dumps({"step_s": step_s, "cpu_s": cpu_s, "loss": loss, **moved}), flush=True)
    print(json.dumps({"peak_rss_bytes": common.status_bytes("VmHWM")}), flush=True)
    subject.close()


class RankGroup:
    """Ranks of one kind, seen from the measuring process.

    Args:
        options: of this module's command line.
        link: between two ranks, each at one end; None: the machine's own loopback.
    """

    def __init__(self, kind: str, n_ranks: int, options: Sequence[object], link: SlowLink | None = None) -> None:
        # Ranks at the ends of a link do not reach this process: there rank 0 has the store.
        self._store = None if link else TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        command = [sys.executable, "-m", "benchmarks.ranks.subjects", kind, *map(str, options)]
        shared = {**os.environ, "WORLD_SIZE": str(n_ranks)}
        if link is not None:
            shared |= {**link.environment, "MASTER_PORT": str(_free_port())}
        elif self._store is not None:
            port = str(self._store.port)
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        self._pipes = []
        for rank in range(n_ranks):
            if n_ranks == 1:
                self._pipes.append(Pipe(command, dict(os.environ)))
            else:
                prefix = [] if link is None else link.within(rank)
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                self._pipes.append(Pipe([*prefix, *command], {**shared, **own}))

    def step(self) -> dict[str, Any]:
        """Have all make a step; returns what the slowest took, the sums of what they moved, and their mean loss."""
        for pipe in self._pipes:
            pipe.say("step")
        found = [pipe.answer() for pipe in self._pipes]
        summed = {key: sum(step[key] for step in found) for key in found[0]}
        return {
            **summed, "step_s": max(step["step_s"] for step in found), "loss": summed["loss"] / len(found),
            "wait_s": max(step.get("wait_s", 0.0) for step in found),
        }  # fmt: skip

    def end(self) -> dict[str, Any]:
        """Stop all; returns the most memory that one of them had."""
        for pipe in self._pipes:
            pipe.say("stop")
        peaks_bytes = [pipe.answer()["peak_rss_bytes"] for pipe in self._pipes]
        for pipe in self._pipes:
            pipe.wait()
        return {"peak_rss_bytes": max(peaks_bytes)}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def main() -> None:
    """A process of `RankGroup`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--size", choices=SIZES, default="27m")
    parser.add_argument("--ram-share", type=float, default=1.6)
    parser.add_argument("--degree", default="all")
    common.batch_arguments(parser)
    parser.add_argument("--dir")
    _answers(parser.parse_args())


if __name__ == "__main__":
    main()
