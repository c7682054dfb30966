"""What ranks do in tests of engines between processes."""

from __future__ import annotations

import hashlib
import sys

import torch
from rank_processes import give
from tied_model import ADAMW, loss_of, steps_of, tied_model

import offload
from offload.parallel.rank_collectives import RankCollectives
from offload.parallel.world import World


def digest(model: torch.nn.Module) -> str:
    """Of all parameters; on all ranks."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().clone().numpy().tobytes())
    return found.hexdigest()


def trains() -> None:
    """Train as ``argv`` says: the folder, memory.ram, the degree, ranks in a shard; gives a digest of the model."""
    folder, ram, degree, shard = sys.argv[1:5]
    world = World.current()
    assert world is not None
    config = {
        "memory": {"ram": ram}, "ssd": {"paths": [folder]}, "parallel": {"degree": degree, "shard": int(shard)},
    }  # fmt: skip
    with offload.Engine(tied_model(), config, ADAMW) as engine:
        for step in steps_of(5, world.n_ranks):
            engine.backward(loss_of(engine.model, step[world.rank]))
            assert engine.step()
        give(digest(engine.model))


def prepared() -> None:
    """Train in a loop of one's own, whose losses nobody divides."""
    world = World.current()
    assert world is not None
    config = {"memory": {"ram": "2MiB"}, "ssd": {"paths": [sys.argv[1]]}}
    model, optimizer = offload.prepare(tied_model(), ADAMW, config)
    for step in steps_of(4, world.n_ranks):
        loss_of(model, step[world.rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
    give(digest(model))
    optimizer.engine.close()


def goes_on() -> None:
    """Go on from the last commit to so many steps of four micro-batches each, with a commit after each step; gives a
    digest. ``argv``: the folder, the degree, the number of steps."""
    folder, degree, n_steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    world = World.current()
    rank, n_ranks = (0, 1) if world is None else (world.rank, world.n_ranks)
    own = 4 // n_ranks
    config = {
        "memory": {"ram": "1MiB"}, "ssd": {"paths": [folder]}, "update": {"accumulation": own},
        "parallel": {"degree": degree},
    }  # fmt: skip
    with offload.Engine(tied_model(), config, ADAMW) as engine:
        found = engine.resume()
        for step in steps_of(n_steps, 4)[0 if found is None else found.step :]:
            for batch in step[rank * own : (rank + 1) * own]:
                engine.backward(loss_of(engine.model, batch))
            assert engine.step()
            engine.save(wait=engine.steps % 2 == 0)
            print(f"step {engine.steps}", flush=True)
        give(digest(engine.model))


def counts() -> None:
    """Train as ``argv`` says, see `trains`; gives bytes sent in all of four steps, votes and parameters of the model in
    bytes, the bytes of parameters and states that this rank keeps, and a page for each unit."""
    folder, ram, degree, shard = sys.argv[1:5]
    world = World.current()
    assert world is not None
    config = {
        "memory": {"ram": ram}, "ssd": {"paths": [folder]}, "parallel": {"degree": degree, "shard": int(shard)},
    }  # fmt: skip
    with offload.Engine(tied_model(), config, ADAMW) as engine:
        store, marks = engine.debug.store, []
        assert store.comm is not None
        assert isinstance(store.collectives, RankCollectives)
        for number, step in enumerate(steps_of(12, world.n_ranks)):
            engine.backward(loss_of(engine.model, step[world.rank]))
            assert engine.step()
            if number in (7, 11):
                store.comm.drain()
                marks.append((store.collectives.sent_bytes, store.comm._n_made))
        (sent, n_made), (sent_later, n_made_later) = marks
        vote_bytes = 5 * 8 * (world.n_ranks - 1) * (n_made_later - n_made)
        units = engine.debug.units
        kept = [unit.parameters for unit in units]
        kept += [part.states for unit in units for part in unit.slices if part.states is not None]
        give(
            {
                "sent": sent_later - sent - vote_bytes,
                "votes": vote_bytes,
                "model": sum(unit.numel for unit in units) * 4,
                "kept": sum(tensor.n_bytes for tensor in kept),
                "page_a_unit": store.page_bytes * len(units),
            }
        )
