"""Storages are followed from the op that makes them to their end, each once, whatever views there are of it."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

from offload.profiling.live_storages import Holder, LiveStorages
from pagemem.tier import Tag

KIB = 1 << 10


@pytest.fixture
def held() -> Counter[Tag]:
    """Bytes held now, by tag."""
    return Counter()


@pytest.fixture
def live(held: Counter[Tag]) -> LiveStorages:
    """What keeps the count; it never holds less than nothing."""

    def changed(holder: Holder, more_bytes: int) -> None:
        held[holder.tag] += more_bytes
        assert held[holder.tag] >= 0

    return LiveStorages(changed)


def present(held: Counter[Tag]) -> dict[Tag, int]:
    """Without the tags that hold nothing."""
    return {tag: n_bytes for tag, n_bytes in held.items() if n_bytes}


def test_what_ops_make_is_followed_until_its_end(live: LiveStorages, held: Counter[Tag]) -> None:
    with live:
        made = torch.ones(256)
        assert present(held) == {Tag.TEMPORARY: KIB}
        other = made * 2
        assert present(held) == {Tag.TEMPORARY: 2 * KIB}
        del made
        assert present(held) == {Tag.TEMPORARY: KIB}
    del other  # Also once nobody watches ops any more.
    assert present(held) == {}


@pytest.mark.parametrize(
    "change", [lambda t: t.view(16, 16).t(), lambda t: t.add_(1), lambda t: t[3:7], lambda t: t.detach()]
)
def test_views_and_changes_in_place_are_nothing_new(
    change: Callable[[torch.Tensor], torch.Tensor], live: LiveStorages, held: Counter[Tag]
) -> None:
    before = torch.ones(256)
    with live:
        change(before)
        assert present(held) == {}
        made = torch.ones(256)
        view = change(made)
        assert present(held) == {Tag.TEMPORARY: KIB}
        del made
        assert present(held) == {Tag.TEMPORARY: KIB}, "a view keeps its storage"
        del view
        assert present(held) == {}


def test_a_view_holds_its_whole_storage(live: LiveStorages, held: Counter[Tag]) -> None:
    live.hold(torch.ones(512)[:1], Tag.PARAM, "a")
    assert present(held) == {}, "nobody held it"
    kept = torch.ones(512)[:1]
    live.hold(kept, Tag.PARAM, "a")
    assert present(held) == {Tag.PARAM: 2 * KIB}


def test_what_a_storage_is_held_for_can_change(live: LiveStorages, held: Counter[Tag]) -> None:
    with live:
        made = torch.ones(256)
    assert live.holder(made) == Holder(Tag.TEMPORARY, "", "cpu")
    live.hold(made, Tag.GRAD, "layer")
    live.hold(made, Tag.GRAD, "layer")
    assert present(held) == {Tag.GRAD: KIB} and live.holder(made[1:]) == Holder(Tag.GRAD, "layer", "cpu")
    assert live.holder(torch.ones(1)) is None
    del made
    assert present(held) == {}


def test_tensors_in_a_cycle_end_with_it(live: LiveStorages, held: Counter[Tag]) -> None:
    with live:
        cycle: list[object] = [torch.ones(256)]
        cycle.append(cycle)
    del cycle
    gc.collect()
    assert present(held) == {}


def test_without_bytes_and_without_a_storage(live: LiveStorages, held: Counter[Tag]) -> None:
    with live, torch.device("meta"):
        made = torch.empty(1 << 30) + 1
        assert present(held) == {Tag.TEMPORARY: 4 << 30}
    sparse = torch.eye(3).to_sparse()
    with live:
        again = sparse * 2
    live.hold(sparse, Tag.GRAD, "a")
    assert live.holder(sparse) is None and Tag.GRAD not in present(held)
    del made, again
    assert present(held) == {}


def test_ops_of_the_backward_pass_are_seen(live: LiveStorages, held: Counter[Tag]) -> None:
    layer = nn.Linear(16, 16, bias=False)
    with live:
        layer(torch.ones(4, 16)).sum().backward()
    assert layer.weight.grad is not None
    assert present(held) == {Tag.TEMPORARY: KIB} and live.holder(layer.weight.grad) is not None
    layer.weight.grad = None
    assert present(held) == {}
