"""States as JSON and back: equal values of equal types, or refused with their place."""

from __future__ import annotations

import enum
import json
import math
from collections import Counter, OrderedDict, deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload.commits.plain_state import MAX_BYTES, TAG, UnknownState, decode, encode
from pagemem.folders.small_file import parse_json


def assert_alike(found: Any, expected: Any) -> None:
    """Equal, of the same types all the way down; NaN equals NaN, and -0.0 is not 0.0."""
    assert type(found) is type(expected), (found, expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected) and all(type(a) is type(b) for a, b in zip(found, expected, strict=True))
        for key, value in expected.items():
            assert_alike(found[key], value)
    elif isinstance(expected, (list, tuple, deque)):
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            assert_alike(mine, theirs)
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)
    elif isinstance(expected, (np.ndarray, np.generic)):
        assert found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()
    elif isinstance(expected, float):
        assert math.copysign(1, found) == math.copysign(1, expected) and (
            found == expected or (math.isnan(expected) and math.isnan(found))
        )
    else:
        assert found == expected


def there_and_back(state: Any) -> Any:
    """Through the text of a manifest."""
    return decode(parse_json(json.dumps(encode(state, "it"), allow_nan=False)))


NUMBERS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
)
KEYS = NUMBERS.filter(lambda key: key == key) | st.just(TAG) | st.tuples(st.integers(), st.text(max_size=3))
STATES = st.recursive(
    NUMBERS,
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(STATES)
def test_any_state_comes_back_as_it_was(state: Any) -> None:
    assert_alike(there_and_back(state), state)


@pytest.mark.parametrize(
    "state",
    [
        Counter({2: 1, 5: 3}),
        OrderedDict([("b", 1), ("a", 2)]),
        {1, 2},
        frozenset({"a"}),
        deque([1, 2], 5),
        deque([1]),
        torch.Size([2, 3]),
        1 + 2j,
        complex(math.inf, -0.0),
        bytearray(b"\x00\xff"),
        2**500,
        -0.0,
        math.nan,
        "\ud800 alone",
        {TAG: "tuple", "v": [1]},
        np.float32(3.5),
        np.int64(-1),
        np.bool_(True),
        np.float64(math.inf),
        np.arange(6.0).reshape(2, 3),
        np.zeros((0, 3)),
        np.array(2, dtype=np.uint8),
        torch.tensor(3.0),
        torch.zeros(0, 3),
        torch.ones(3, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.arange(4).view(2, 2).t(),
        {1: "a", "1": "b"},
        {True: 1, None: 2},
        list(range(1000)),
        [1.5] * 100,
    ],
    ids=str,
)
def test_types_that_json_does_not_know(state: Any) -> None:
    assert_alike(there_and_back({"at": [state]}), {"at": [state]})


class Level(enum.IntEnum):
    ONE = 1


Itself: list[Any] = []
Itself.append(Itself)
Pair = type("Pair", (tuple,), {})


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": [1, {"b": object()}]}, r"it\['a'\]\[1\]\['b'\] is a builtins.object, which is not committed"),
        (Itself, r"it\[0\]\[0\].* levels deep, or its state holds itself"),
        ({"e": Level.ONE}, r"it\['e'\] is a .*test_plain_state.Level"),
        ({"p": Pair((1, 2))}, r"it\['p'\] is a .*test_plain_state.Pair"),
        ({"f": len}, r"it\['f'\] is a builtins.builtin_function_or_method"),
        ({"t": torch.nn.Parameter(torch.zeros(2))}, r"it\['t'\] is a torch.nn.parameter.Parameter"),
        ({"t": torch.zeros(2, requires_grad=True)}, r"it\['t'\] is a tensor on cpu, .* requires_grad True"),
        ({"t": torch.zeros(2, device="meta")}, r"it\['t'\] is a tensor on meta"),
        ({"s": np.str_("x")}, r"it\['s'\] is a NumPy str_ of <U1"),
        ({"o": np.array([object()])}, r"it\['o'\] is a NumPy ndarray of object"),
        ({"b": bytes(MAX_BYTES + 1)}, rf"it\['b'\] takes the state above {MAX_BYTES} bytes"),
        ({(1, Level.ONE): 2}, r"it, key .*\[1\] is a .*test_plain_state.Level"),
        (1 << 9000, "it is a number of 9001 bits; at most 8192"),
    ],
)
def test_what_cannot_be_written_is_refused_with_its_place(state: Any, where: str) -> None:
    with pytest.raises(UnknownState, match=where) as raised:
        encode(state, "it")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "written",
    [
        {TAG: "object", "v": 1},
        {TAG: [], "v": 1},
        {TAG: "tuple"},
        {TAG: "tuple", "v": 3},
        {TAG: "dict", "v": [[1]]},
        {TAG: "dict", "v": [[[1], 2]]},
        {TAG: "float", "v": "x"},
        {TAG: "bytes", "v": "%%%"},
        {TAG: "ndarray", "dtype": "O", "shape": [1], "v": ""},
        {TAG: "ndarray", "dtype": "<f4", "shape": [10**12], "v": ""},
        {TAG: "ndarray", "dtype": "<f4", "shape": [-1], "v": ""},
        {TAG: "tensor", "dtype": "float32", "shape": [2], "v": "AAAA"},
        {TAG: "tensor", "dtype": "nn", "shape": [], "v": ""},
        {TAG: "complex", "v": [1]},
        {TAG: "set", "v": [[1]]},
        {TAG: "Counter", "v": "ab"},
    ],
    ids=str,
)
def test_what_was_not_written_by_it_is_refused(written: Any) -> None:
    with pytest.raises(ValueError, match="is no value"):
        decode({"deep": [written]})
