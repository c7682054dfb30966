"""What pages waste on the disk when they hold the states of published models: real sizes, no memory.

A unit is a leaf module, or small neighbours up to one page; a page holds the left-overs of at most two tensors. So the
waste depends on the page: with 1 MiB and more the left-overs of small models do not fill theirs (table in
docs/pages.md).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cross_references import check_frames
from model_shapes import MODELS, Leaf, n_parameters
from small_runs import PAGE_BYTES as SMALL_PAGE_BYTES
from small_runs import RAM_BYTES, assert_closed, built, engine_of, train
from torch import nn

from offload.budget.need import Sizes
from offload.config_loading import load_config
from offload.parameters.grouping import units_of
from optim.layout import cut, lay_out
from pagemem.frames.allocator import PageAllocator
from pagemem.frames.page import TensorId
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.tier import Tag, Tier
from pagemem.units import KiB, MiB, ceil_div, format_bytes

ALLOWED = 0.03
#: Bytes a parameter: p, m and v in fp32; p in bf16 with master, m and v in fp32.
BYTES_EACH = {"fp32": 12, "bf16": 14}
PAGES = (256 * KiB, MiB, 4 * MiB)
#: A configuration that leaves all sizes to the engine; budgets are given apart.
AUTOMATIC = load_config({"memory": {"ram": "1GiB"}, "ssd": {"paths": ["nowhere"]}})
DOCS = Path(__file__).parents[4] / "docs" / "pages.md"


def units(leaves: list[Leaf], page_bytes: int) -> list[int]:
    """Elements of each unit, of fp32 parameters as they are built."""
    groups = [[("", nn.Parameter(torch.empty(shape, device="meta"))) for shape in leaf] for leaf in leaves]
    return [lay_out([(name, p.shape) for name, p in unit]).numel for unit in units_of(groups, page_bytes)]


def tensor_bytes(leaves: list[Leaf], dtype: str, page_bytes: int, ram_bytes: int) -> list[int]:
    """Sizes of all tensors in the order in which they come to the disk: parameters forward, states backward."""
    numels = units(leaves, page_bytes)
    found = [numel * (2 if dtype == "bf16" else 4) for numel in numels]
    for numel in reversed(numels):
        for part in cut(numel, Sizes.of(AUTOMATIC, ram_bytes).slice_numel):
            found += [part.numel * 4] * (dtype == "bf16") + [part.numel * 8]
    return [PagedTensor.sized(TensorId(0), "", Tag.PARAM, n_bytes, page_bytes).n_bytes for n_bytes in found]


def ram_bytes_of(name: str, dtype: str) -> int:
    """A budget of a quarter of the states."""
    return n_parameters(MODELS[name]()) * BYTES_EACH[dtype] // 4


def waste(name: str, dtype: str, page_bytes: int) -> float:
    """Unused bytes of the pages for each byte of the states."""
    sizes = tensor_bytes(MODELS[name](), dtype, page_bytes, ram_bytes_of(name, dtype))
    # Those of whole pages, nearly all of the largest models', waste nothing and share with nobody.
    odd = [n_bytes for n_bytes in sizes if n_bytes % page_bytes]
    frames = PageAllocator(Tier.SSD, page_bytes, sum(ceil_div(n_bytes, page_bytes) for n_bytes in odd))
    for number, n_bytes in enumerate(odd):
        frames.allocate(TensorId(number), n_bytes)
    check_frames(frames)
    return (frames.used_frames * page_bytes - sum(odd)) / sum(sizes)


@pytest.mark.parametrize("dtype", BYTES_EACH)
@pytest.mark.parametrize("name", MODELS)
def test_pages_of_256_kib_waste_little_of_any_model(name: str, dtype: str) -> None:
    assert waste(name, dtype, 256 * KiB) < ALLOWED


@pytest.mark.parametrize("dtype", BYTES_EACH)
@pytest.mark.parametrize("name", MODELS)
def test_automatic_pages_waste_little_of_any_model(name: str, dtype: str) -> None:
    assert waste(name, dtype, Sizes.of(AUTOMATIC, ram_bytes_of(name, dtype)).page_bytes) < ALLOWED


def test_the_documented_waste_is_the_one_measured() -> None:
    rows = re.findall(r"^\| ((?:GPT|T5|Llama|Mixtral)\S*(?: \w+)?) \| (.*) \|$", DOCS.read_text(), re.MULTILINE)
    documented = {name: cells.split(" | ") for name, cells in rows}
    assert documented == {name: [shown(name, page_bytes) for page_bytes in [*PAGES, None]] for name in MODELS}


def shown(name: str, page_bytes: int | None) -> str:
    """A cell of the table: the larger waste of the two formats in per cent, on automatic pages with their sizes."""
    if page_bytes is not None:
        return f"{100 * max(waste(name, dtype, page_bytes) for dtype in BYTES_EACH):.1f}"
    automatic = {dtype: Sizes.of(AUTOMATIC, ram_bytes_of(name, dtype)).page_bytes for dtype in BYTES_EACH}
    worst = max(BYTES_EACH, key=lambda dtype: waste(name, dtype, automatic[dtype]))
    return f"{100 * waste(name, worst, automatic[worst]):.1f} at {format_bytes(automatic[worst])}"


def test_the_sizes_are_those_of_an_engine(tmp_path: Path) -> None:
    model = built()
    leaves = [tuple(tuple(p.shape) for p in module.parameters(recurse=False)) for module in model.modules()]
    expected = tensor_bytes([leaf for leaf in leaves if leaf], "fp32", SMALL_PAGE_BYTES, RAM_BYTES)
    engine = engine_of(model, tmp_path)
    train(engine, 1)
    tensors = [tensor for tensor in engine.debug.mover.tensors.values() if tensor.tag is not Tag.GRAD]
    assert sorted(tensor.n_bytes for tensor in tensors) == sorted(expected)
    assert_closed(engine)
