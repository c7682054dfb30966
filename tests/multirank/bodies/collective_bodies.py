"""What ranks do in tests of collectives; each gives whether what it got is right."""

from __future__ import annotations

import sys
import threading

import torch
from rank_processes import give

from offload.parallel import rank_collectives
from offload.parallel.rank_collectives import RankCollectives
from offload.parallel.sharding import cut_ranges
from offload.parallel.world import World
from pagemem.ranks.collectives import ShardLayout

SIZES = (0, 1, 700, 1024, 5000, 70_001)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def world() -> World:
    """That of this process."""
    found = World.current()
    assert found is not None
    return found


def values(rank: int, numel: int, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
    """A rank's gradient of a unit."""
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    return torch.randn(numel, generator=generator).to(dtype)


def summed(n_ranks: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """The sum of all in rank order."""
    total = values(0, numel, dtype)
    for rank in range(1, n_ranks):
        total = total.add_(values(rank, numel, dtype))
    return total


def layouts(numel: int, dtype: torch.dtype, n_shards: int) -> list[ShardLayout]:
    """With the larger ranges elsewhere, with an empty one, and everybody's."""
    cuts = [cut_ranges(numel, n_shards, first) for first in range(n_shards)]
    uneven = ((0, numel), *((numel, numel) for _ in range(n_shards - 1)))
    return [ShardLayout(dtype, ranges) for ranges in dict.fromkeys([*cuts, uneven, ((0, numel),)])]


def all_collectives() -> None:
    """All of them, for meshes of every shape, over several sizes and dtypes."""
    rank_collectives.STAGING_BYTES = 1 << 15  # several chunks
    here, wrong = world(), []
    for n_shards in [n for n in range(1, here.n_ranks + 1) if here.n_ranks % n == 0]:
        collectives = here.collectives(n_shards)
        assert (collectives.shard_rank, collectives.n_shards) == (here.rank % n_shards, n_shards)
        for dtype in DTYPES:
            for numel in SIZES:
                for layout in layouts(numel, dtype, n_shards):
                    wrong += _wrong(collectives, layout)
        said = collectives.exchange((here.rank, -(2**62), 7))
        wrong += [] if said == [[rank, -(2**62), 7] for rank in range(here.n_ranks)] else ["exchange"]
        found = collectives.agree([here.rank / 3, float("inf")])
        wrong += [] if found == [[rank / 3, float("inf")] for rank in range(here.n_ranks)] else ["agree"]
    give(wrong)


def _wrong(collectives: RankCollectives, layout: ShardLayout) -> list[str]:
    numel, dtype, place = layout.numel, layout.dtype, layout.place(collectives.shard_rank)
    found = []
    whole = values(collectives.rank, numel, dtype)
    into = torch.empty_like(layout.part(whole, place))
    collectives.reduce_scatter(whole, into, layout)
    wanted = summed(collectives.n_ranks, numel, dtype)
    if not torch.equal(into, layout.part(wanted, place)):
        found.append(f"reduce_scatter {layout}")
    if len(layout.ranges) > 1:
        gathered = torch.full_like(whole, 9)
        collectives.gather(into, gathered, layout)
        filled = torch.full_like(whole, 9)
        layout.part(filled, place).copy_(into)
        collectives.fill(filled, layout)
        found += [] if torch.equal(gathered, wanted) else [f"gather {layout}"]
        found += [] if torch.equal(filled, wanted) else [f"fill {layout}"]
    return found


def agreeing_beside_a_gather() -> None:
    """The training thread agrees while the comm lane's gathers much."""
    here = world()
    collectives = here.collectives(here.n_ranks)
    layout = ShardLayout(torch.float32, cut_ranges(1 << 22, here.n_ranks))
    into = torch.empty(1 << 22)

    def gathers() -> None:
        for _ in range(5):
            collectives.gather(layout.part(into, here.rank).fill_(here.rank), into, layout)

    thread = threading.Thread(target=gathers)
    thread.start()
    agreed = [collectives.agree([number, here.rank]) for number in range(50)]
    thread.join()
    right = all(bool(layout.part(into, rank).eq(rank).all()) for rank in range(here.n_ranks))
    give(right and all(found == [[n, r] for r in range(here.n_ranks)] for n, found in enumerate(agreed)))


def waiting() -> None:
    """Rank 0 does what ``argv`` says, the others wait in a collective, and give what they raise."""
    here = world()
    collectives = here.collectives(here.n_ranks)
    collectives.agree([0.0])
    print(RUNNING, flush=True)
    if here.rank == 0:
        _act(sys.argv[1], collectives)
    layout = ShardLayout(torch.float32, cut_ranges(1 << 20, here.n_ranks))
    calls = {
        "agree": lambda: collectives.agree([1.0]),
        "exchange": lambda: collectives.exchange((1,)),
        "gather": lambda: collectives.gather(
            layout.part(torch.zeros(1 << 20), here.rank), torch.zeros(1 << 20), layout
        ),
        "reduce_scatter": lambda: collectives.reduce_scatter(
            torch.zeros(1 << 20), layout.part(torch.zeros(1 << 20), here.rank), layout
        ),
    }
    try:
        calls[sys.argv[2]]()
    except Exception as error:
        give(f"{type(error).__name__}: {error}")
        return
    give("nothing was raised")


RUNNING = "running"


def _act(what: str, collectives: RankCollectives) -> None:
    match what:
        case "stops":
            collectives.stop("the disk is full")
            give("")
            sys.exit(0)
        case "raises":
            raise ValueError("a bad batch")
        case "ends":
            give("")
            sys.exit(0)
        case "hangs":
            threading.Event().wait()
