"""Byte quantities: reading them from text, printing them, and rounding."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemem.units import GiB, KiB, MiB, TiB, ceil_div, format_bytes, parse_bytes, round_up


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("4GiB", 4 * GiB),
        ("1.5 MB", 1_500_000),
        ("192 mib", 192 * MiB),
        ("64KiB", 64 * KiB),
        ("2tib", 2 * TiB),
        ("3 GB", 3 * 10**9),
        ("  7 b ", 7),
        ("4096", 4096),
        (4096, 4096),
        (0, 0),
        ("0", 0),
    ],
)
def test_sizes_are_read(text: str | int, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "4 gibi", "-1", "-4GiB", "1e9", "4 GiB please", "1.2.3", ".5GiB", "1,5GB"])
def test_what_is_not_a_size_is_refused_and_the_suffixes_are_named(text: str) -> None:
    with pytest.raises(ValueError, match="KiB, MiB, GiB, TiB") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        parse_bytes(-1)


def test_decimal_and_binary_suffixes_differ() -> None:
    assert parse_bytes("1GiB") - parse_bytes("1GB") == 73_741_824


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (192 * MiB, "192.0 MiB"),
        (1536 * MiB, "1.5 GiB"),
        (5 * TiB, "5.0 TiB"),
        (5000 * TiB, "5000.0 TiB"),
        (-3 * MiB, "-3.0 MiB"),
    ],
)
def test_sizes_are_printed(n_bytes: int, text: str) -> None:
    assert format_bytes(n_bytes) == text


@given(st.integers(0, 2**50))
def test_what_is_printed_reads_back_to_the_precision_shown(n_bytes: int) -> None:
    number, suffix = format_bytes(n_bytes).split()
    unit_bytes = parse_bytes(f"1{suffix}")
    assert float(number) <= 1024 or suffix == "TiB"
    assert abs(parse_bytes(f"{number}{suffix}") - n_bytes) <= 0.05 * unit_bytes + 1


@given(st.integers(0, 2**60), st.integers(1, 2**40))
def test_rounding_up_is_the_least_multiple_not_below(n: int, multiple: int) -> None:
    rounded = round_up(n, multiple)
    assert rounded % multiple == 0
    assert 0 <= rounded - n < multiple
    assert rounded == multiple * ceil_div(n, multiple)


def test_integer_division_stays_exact_where_floats_would_not() -> None:
    assert ceil_div(2**60 + 1, 2**10) == 2**50 + 1
    assert ceil_div(2**60, 2**10) == 2**50
