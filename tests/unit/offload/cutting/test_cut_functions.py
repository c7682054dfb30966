"""``linear`` and ``embedding`` in slices give the bits of the whole, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairwise import each_value
from torch import Tensor

from offload.cutting.cut_embedding import cut_embedding
from offload.cutting.cut_linear import cut_linear
from offload.cutting.cuttable import slice_rows


def call(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Nothing is paged here."""
    return func(*args, **kwargs)


def cut(weight: Tensor, n_slices: int, block: int = 192) -> list[Tensor]:
    """Leaves with the rows of a weight."""
    rows = slice_rows(weight.shape[0], block, n_slices)
    return [part.clone().requires_grad_(weight.requires_grad) for part in torch.split(weight.detach(), list(rows))]


def gradients(slices: list[Tensor]) -> Tensor:
    """All of them, as one."""
    found = [part.grad for part in slices]
    assert all(gradient is not None for gradient in found)
    return torch.cat(found)  # type: ignore[arg-type]


@each_value(
    lead=[(), (1,), (7,), (3, 5), (2, 3, 4), (64,)],
    rows=[384, 1000, 1537, 5000],
    features=[8, 33, 128],
    n_slices=[2, 3, 5],
    bias=[False, True],
    frozen=["nothing", "weight", "input"],
)
def test_a_linear_layer_in_slices_has_the_bits_of_the_whole(
    lead: tuple[int, ...], rows: int, features: int, n_slices: int, bias: bool, frozen: str
) -> None:
    torch.manual_seed(3)
    x = torch.randn(*lead, features, requires_grad=frozen != "input")
    weight = torch.randn(rows, features, requires_grad=frozen != "weight")
    offset = torch.randn(rows, requires_grad=True) if bias else None
    outer = torch.randn(*lead, rows) / 100
    slices = cut(weight, min(n_slices, rows // 192))
    x2 = x.detach().clone().requires_grad_(x.requires_grad)
    offset2 = None if offset is None else offset.detach().clone().requires_grad_()

    expected, found = F.linear(x, weight, offset), cut_linear(x2, slices, offset2, call)
    # One row is multiplied by another kernel (gemv), whose sums are others.
    same = torch.equal if len(lead) and torch.Size(lead).numel() > 1 else close
    assert same(found, expected)
    for result in (expected, found):
        if result.requires_grad:
            result.backward(outer)
    if x.grad is not None:
        assert x2.grad is not None and same(x2.grad, x.grad)
    if weight.grad is not None:
        assert same(gradients(slices), weight.grad)
    if offset is not None and offset2 is not None:
        assert offset.grad is not None and offset2.grad is not None and same(offset2.grad, offset.grad)
    with torch.no_grad():
        assert same(cut_linear(x, slices, offset, call), F.linear(x, weight, offset))


def close(one: Tensor, other: Tensor) -> bool:
    """Within 1e-6 of the largest value."""
    return bool((one - other).abs().max() <= 1e-6 * other.abs().max())


@pytest.mark.parametrize("block", [1, 64, 100])
def test_slices_that_begin_elsewhere_differ_by_rounding_alone(block: int) -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(9, 40, requires_grad=True), torch.randn(500, 40, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    slices = cut(weight, 500 // block, block)
    F.linear(x, weight).square().mean().backward()
    cut_linear(x2, slices, None, call).square().mean().backward()
    assert x.grad is not None and x2.grad is not None and weight.grad is not None
    assert close(x2.grad, x.grad) and close(gradients(slices), weight.grad)


def test_inputs_that_are_not_contiguous_get_the_bias_as_torch_adds_it() -> None:
    torch.manual_seed(3)
    x, weight, bias = torch.randn(6, 5, 40).transpose(0, 1), torch.randn(600, 40), torch.randn(600)
    assert torch.equal(cut_linear(x, cut(weight, 3), bias, call), F.linear(x, weight, bias))


def test_two_backward_passes_add_up() -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(9, 40, requires_grad=True), torch.randn(500, 40, requires_grad=True)
    slices, x2 = cut(weight, 2), x.detach().clone().requires_grad_()
    expected, found = F.linear(x, weight).sum(), cut_linear(x2, slices, None, call).sum()
    for _ in range(2):
        expected.backward(retain_graph=True)
        found.backward(retain_graph=True)
    assert x2.grad is not None and x.grad is not None and weight.grad is not None
    assert torch.equal(x2.grad, x.grad) and torch.equal(gradients(slices), weight.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(9, 40), torch.randn(1000, 40)
    wide = x.to(dtype).double().requires_grad_()
    narrow = x.to(dtype).requires_grad_()
    outer = torch.randn(9, 1000).to(dtype)
    F.linear(wide, weight.to(dtype).double()).backward(outer.double())
    cut_linear(narrow, cut(weight.to(dtype), 5), None, call).backward(outer)
    assert wide.grad is not None and narrow.grad is not None
    error = (narrow.grad.double() - wide.grad).abs().max() / wide.grad.abs().max()
    assert error <= torch.finfo(dtype).eps


def test_autocast_computes_in_its_dtype() -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(9, 40), torch.randn(400, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cut_linear(x, cut(weight, 2), None, call), F.linear(x, weight))


def test_an_input_of_another_width_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"an input of shape \(2, 7\) and a weight of \(400, 8\)"):
        cut_linear(torch.zeros(2, 7), cut(torch.zeros(400, 8), 2), None, call)


@each_value(
    shape=[(), (1,), (50,), (3, 20), (0,)],
    rows=[384, 1000],
    n_slices=[2, 5],
    padding=[None, 0, 399, -1],
    by_frequency=[False, True],
)
def test_an_embedding_in_slices_has_the_bits_of_the_whole(
    shape: tuple[int, ...], rows: int, n_slices: int, padding: int | None, by_frequency: bool
) -> None:
    torch.manual_seed(3)
    padding = None if padding is None else min(padding, rows - 1)  # counted from the end if negative
    indices = torch.randint(rows, shape)
    if indices.numel() > 10:
        indices.view(-1)[:10] = indices.view(-1)[0]  # one row again and again
        indices.view(-1)[10] = 0 if padding is None else padding % rows
    weight = torch.randn(rows, 24, requires_grad=True)
    slices, outer = cut(weight, min(n_slices, rows // 192)), torch.randn(*shape, 24)
    expected = F.embedding(indices, weight, padding, scale_grad_by_freq=by_frequency)
    found = cut_embedding(indices, slices, call, padding_idx=padding, by_frequency=by_frequency)
    assert torch.equal(found, expected)
    expected.backward(outer)
    found.backward(outer)
    assert weight.grad is not None and torch.equal(gradients(slices), weight.grad)
    with torch.no_grad():
        assert torch.equal(cut_embedding(indices, slices, call), expected)


def test_an_index_out_of_range_is_refused() -> None:
    for wrong in (-1, 400):
        with pytest.raises(IndexError, match="the embedding has 400 rows"):
            cut_embedding(torch.tensor([3, wrong]), cut(torch.zeros(400, 8), 2), call)
