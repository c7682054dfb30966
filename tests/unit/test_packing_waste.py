"""How much of the memory that tensors take is not theirs, on the parameter shapes of real models in fp32.

The items are leaf modules (weight and bias together) in the order of the forward pass, joined by `pack_units`.

Two tensors a page set a limit that no placement can get below: tails, however short, need half a page each. So models
whose layers leave several short tails (GPT-2 without its largest size, T5) waste more than 3 % at 4 MiB pages; for them
the table below holds the largest page that does not, and the tests show that the next larger one must.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pagemem.allocator import Fragmentation, PageAllocator
from pagemem.packing import choose_page_bytes, pack_units, rounding_ratio
from pagemem.page import Placement, TensorId
from pagemem.tier import Tier
from pagemem.units import BLOCK_BYTES, GiB, KiB, MiB, ceil_div, round_up

LIMIT = 0.03


def gpt2(n_layers: int, d: int) -> list[int]:
    """Numbers of elements of each leaf module: embeddings; a layer's norm, attention in and out, norm, MLP; norm."""
    layer = [2 * d, d * 3 * d + 3 * d, d * d + d, 2 * d, d * 4 * d + 4 * d, 4 * d * d + d]
    return [50257 * d, 1024 * d, *layer * n_layers, 2 * d]


def llama_7b() -> list[int]:
    d, hidden, vocabulary = 4096, 11008, 32000
    layer = [d, *[d * d] * 4, d, *[d * hidden] * 3]
    return [vocabulary * d, *layer * 32, d, vocabulary * d]


def mixtral_8x7b() -> list[int]:
    d, hidden, vocabulary, n_experts = 4096, 14336, 32000, 8
    layer = [d, d * d, d * 1024, d * 1024, d * d, d, d * n_experts, *[d * hidden] * 3 * n_experts]
    return [vocabulary * d, *layer * 32, d, vocabulary * d]


def t5_large() -> list[int]:
    """Embedding shared by both sides; the first layer of each has the table of relative positions."""
    d, hidden, n_heads, n_buckets = 1024, 4096, 16, 32
    attention, mlp = [d, *[d * d] * 4], [d, d * hidden, hidden * d]
    encoder = [*attention, *mlp]
    decoder = [*attention, *attention, *mlp]
    relative = [n_buckets * n_heads]
    first = [*attention, *relative, *mlp, *encoder * 23, d]
    second = [*attention, *relative, *attention, *mlp, *decoder * 23, d]
    return [32128 * d, *first, *second]


MODELS = {
    "gpt2-124m": gpt2(12, 768),
    "gpt2-355m": gpt2(24, 1024),
    "gpt2-774m": gpt2(36, 1280),
    "gpt2-1.5b": gpt2(48, 1600),
    "llama-7b": llama_7b(),
    "t5-large": t5_large(),
    "mixtral-8x7b": mixtral_8x7b(),
}

#: Model -> largest page with less than 3 % waste: as `pack_units` joins neighbours, and across large items.
LARGEST_PAGE = {
    "gpt2-124m": (512 * KiB, 4 * MiB),
    "gpt2-355m": (512 * KiB, 512 * KiB),
    "gpt2-774m": (1 * MiB, 4 * MiB),
    "gpt2-1.5b": (4 * MiB, 4 * MiB),
    "llama-7b": (4 * MiB, 4 * MiB),
    "t5-large": (1 * MiB, 4 * MiB),
    "mixtral-8x7b": (4 * MiB, 4 * MiB),
}
CASES = [(model, across, pages[across]) for model, pages in LARGEST_PAGE.items() for across in (False, True)]


def units_of(model: str, page_bytes: int, across_large: bool) -> list[int]:
    sizes = [4 * numel for numel in MODELS[model]]
    packed = pack_units(sizes, page_bytes, across_large=across_large)
    assert sorted(item for unit in packed for item in unit) == list(range(len(sizes)))
    return [sum(sizes[item] for item in unit) for unit in packed]


def packed(units: Sequence[int], page_bytes: int) -> PageAllocator:
    """All units placed with shared tails."""
    frames = PageAllocator(Tier.SSD, page_bytes, sum(ceil_div(n_bytes, page_bytes) for n_bytes in units))
    for number, n_bytes in enumerate(units):
        assert isinstance(frames.allocate(TensorId(number), n_bytes), Placement)
    frames.validate()
    return frames


def described(model: str, page_bytes: int, waste: Fragmentation) -> str:
    return f"{model} at {page_bytes // KiB} KiB pages: {100 * waste.internal_ratio:.2f} % of {waste.asked_bytes} bytes"


def least_frames(units: Sequence[int], page_bytes: int) -> int:
    """Frames below which nothing fits, with two tails a page at most."""
    tails = [n_bytes % page_bytes for n_bytes in units if round_up(n_bytes, BLOCK_BYTES) % page_bytes]
    whole = sum(round_up(n_bytes, BLOCK_BYTES) // page_bytes for n_bytes in units)
    return whole + max(ceil_div(len(tails), 2), ceil_div(sum(tails), page_bytes))


@pytest.mark.parametrize(
    ("model", "n_parameters"),
    [
        ("gpt2-124m", 124_439_808),
        ("gpt2-355m", 354_823_168),
        ("gpt2-774m", 774_030_080),
        ("gpt2-1.5b", 1_557_611_200),
        ("llama-7b", 6_738_415_616),
        ("t5-large", 737_668_096),
        ("mixtral-8x7b", 46_702_792_704),
    ],
)
def test_the_shapes_are_those_of_the_models(model: str, n_parameters: int) -> None:
    assert sum(MODELS[model]) == n_parameters


@pytest.mark.parametrize(("model", "across_large", "page_bytes"), CASES)
def test_waste_is_below_three_percent(model: str, across_large: bool, page_bytes: int) -> None:
    waste = packed(units_of(model, page_bytes, across_large), page_bytes).fragmentation()
    assert waste.internal_ratio < LIMIT, described(model, page_bytes, waste)


@pytest.mark.parametrize(("model", "across_large", "page_bytes"), [case for case in CASES if case[2] < 4 * MiB])
def test_larger_pages_than_the_table_says_waste_more(model: str, across_large: bool, page_bytes: int) -> None:
    waste = packed(units_of(model, 2 * page_bytes, across_large), 2 * page_bytes).fragmentation()
    assert waste.internal_ratio >= LIMIT, f"the table can be raised: {described(model, 2 * page_bytes, waste)}"


@pytest.mark.parametrize("model", ["gpt2-124m", "gpt2-355m", "gpt2-774m", "t5-large"])
def test_no_placement_with_two_tails_a_page_wastes_less_than_three_percent_at_4_mib(model: str) -> None:
    units = units_of(model, 4 * MiB, across_large=False)
    least_bytes = least_frames(units, 4 * MiB) * 4 * MiB
    assert least_bytes / sum(units) - 1 >= LIMIT, f"{model}: {least_bytes} bytes would do for {sum(units)}"


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("page_bytes", [4 * MiB, 256 * KiB])
def test_pairing_is_near_the_least_that_two_tails_a_page_allow(model: str, page_bytes: int) -> None:
    units = units_of(model, page_bytes, across_large=False)
    used, least = packed(units, page_bytes).used_frames, least_frames(units, page_bytes)
    assert least <= used <= 1.01 * least + 1, f"{model}: {used} frames, {least} are the least"


@pytest.mark.parametrize("model", list(MODELS))
def test_the_page_chosen_for_flat_views_is_the_largest_that_wastes_little(model: str) -> None:
    units = units_of(model, 64 * KiB, across_large=False)
    page_bytes = choose_page_bytes(units, 64 * GiB)
    assert rounding_ratio(units, page_bytes) <= LIMIT
    assert page_bytes == 4 * MiB or rounding_ratio(units, 2 * page_bytes) > LIMIT
    flat = PageAllocator(Tier.HOST, page_bytes, sum(ceil_div(n_bytes, page_bytes) for n_bytes in units))
    for number, n_bytes in enumerate(units):
        assert isinstance(flat.allocate(TensorId(number), n_bytes, contiguous=True), Placement)
    assert flat.fragmentation().internal_ratio == pytest.approx(rounding_ratio(units, page_bytes))
