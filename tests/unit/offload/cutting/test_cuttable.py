"""Arithmetic of slices: they cover all rows, begin where sums may be continued, and are as few as it takes."""

from __future__ import annotations

from itertools import accumulate

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from offload.budget.cuts import cuts_of, split, standins
from offload.cutting.cuttable import ROW_BLOCK, fewest_slices, row_blocks, slice_rows
from offload.parameters.grouping import groups_of
from offload.parameters.inner_tensors import owner_of


@given(st.integers(1, 100_000), st.integers(1, 400), st.data())
def test_slices_cover_all_rows_and_begin_at_blocks(n_rows: int, block: int, data: st.DataObject) -> None:
    most = n_rows // block
    n_slices = data.draw(st.integers(1, max(1, min(most, 50))))
    rows = slice_rows(n_rows, block, n_slices)
    assert sum(rows) == n_rows and len(rows) == n_slices
    assert all(begin % block == 0 for begin in accumulate(rows[:-1]))
    assert most < 2 or min(rows) >= block
    assert max(rows) - min(rows) < 2 * block


@given(st.integers(1, 100_000), st.integers(1, 400), st.integers(1, 100_000))
def test_no_fewer_slices_would_fit(n_rows: int, block: int, limit: int) -> None:
    rows, most = fewest_slices(n_rows, block, lambda n: n <= limit), n_rows // block
    if most < 2:
        assert rows == (n_rows,)
    elif max(rows) <= limit:
        assert len(rows) == 2 or max(slice_rows(n_rows, block, len(rows) - 1)) > limit
    else:
        assert len(rows) == most and max(rows) < 2 * block


class _Model(nn.Module):
    """A tied embedding and output layer with a bias, a layer that computes by itself, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(1000, 8)
        self.head = nn.Linear(8, 1000)
        self.head.weight = self.tok.weight
        self.own = type("Own", (nn.Linear,), {"forward": lambda self, x: x @ self.weight.t()})(8, 1000)
        self.attention = nn.MultiheadAttention(8, 2)
        self.scale = nn.Parameter(torch.ones(1000, 8))


def test_only_parameters_whose_uses_are_known_can_be_cut() -> None:
    model = _Model()
    assert row_blocks(model.named_modules()) == {id(model.tok.weight): ROW_BLOCK}
    model.tok.weight = nn.Parameter(torch.ones(1000, 8))
    assert set(row_blocks(model.named_modules())) == {id(model.tok.weight), id(model.head.weight)}


def test_what_does_not_fit_is_cut_the_largest_first_and_the_rest_stays_together() -> None:
    layer = nn.Linear(64, 1000)
    (group,) = groups_of([("layer", layer)], set())
    blocks = row_blocks([("layer", layer)])

    def cut(limit: int) -> dict[int, tuple[int, ...]]:
        return cuts_of(group, blocks, lambda numel, dtype: numel <= limit)

    assert cut(64 * 1000 + 1024) == {}
    assert cut(64 * 1000 + 1023) == {id(layer.weight): (576, 424)}
    assert cut(400 * 64) == {id(layer.weight): (384, 384, 232)}
    assert cut(1) == {id(layer.weight): (192, 192, 192, 192, 232)}
    groups = split(group, cut(400 * 64), standins)
    assert [[name for name, _ in part] for part in groups] == [
        ["layer.weight[0:384]"], ["layer.weight[384:768]"], ["layer.weight[768:1000]"], ["layer.bias"],
    ]  # fmt: skip
    assert {owner_of(part) for [(_, part), *_] in groups[:3]} == {layer.weight}
    assert [tuple(part.shape) for [(_, part), *_] in groups[:3]] == [(384, 64), (384, 64), (232, 64)]
