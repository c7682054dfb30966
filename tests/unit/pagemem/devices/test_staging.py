"""Spans of a staging buffer: the first that is long enough, and back when nobody has views of them."""

from __future__ import annotations

import mmap

import pytest
import torch

from pagemem.devices.staging import ALIGN_BYTES, StagingBuffer
from pagemem.process.closing import close_all


def test_spans_are_the_first_that_are_long_enough_and_come_back_with_their_last_view() -> None:
    buffer = StagingBuffer(1024, None)
    first, second, third = buffer.take(100), buffer.take(256), buffer.take(512)
    assert first is not None and second is not None and third is not None
    begin = first.data_ptr()
    assert [span.data_ptr() - begin for span in (first, second, third)] == [0, 128, 384]
    assert begin % ALIGN_BYTES == 0 and [span.numel() for span in (first, second, third)] == [100, 256, 512]
    assert buffer.take(129) is None, "what is left is shorter"
    fourth = buffer.take(128)
    assert fourth is not None and fourth.data_ptr() - begin == 896
    alias = second.view(torch.float32).view(8, 8).t()
    del second
    assert buffer.take(256) is None
    del alias
    again = buffer.take(200)
    assert again is not None and again.data_ptr() - begin == 128
    del first, third, fourth, again
    whole = buffer.take(1024)
    assert whole is not None and whole.data_ptr() == begin
    del whole
    buffer.close()
    buffer.close()


def test_a_span_longer_than_the_buffer_is_never_there() -> None:
    buffer = StagingBuffer(64, None)
    assert buffer.take(65) is None
    buffer.close()


def test_it_is_pinned_once_at_the_size_it_has() -> None:
    log: list[str] = []

    def pin(address: int, n_bytes: int) -> object:
        assert address % mmap.PAGESIZE == 0
        log.append(f"pin {n_bytes}")
        return lambda: log.append("unpin")

    buffer = StagingBuffer(1000, pin)  # type: ignore[arg-type]
    span = buffer.take(1000)
    assert span is not None and log == ["pin 1000"]
    del span
    buffer.close()
    assert log == ["pin 1000", "unpin"]


def test_all_is_closed_and_the_first_error_kept() -> None:
    closed: list[int] = []

    def failing(number: int) -> None:
        closed.append(number)
        raise OSError(f"number {number}")

    with pytest.raises(OSError, match="number 1") as caught:
        close_all(lambda: closed.append(0), lambda: failing(1), lambda: failing(2), lambda: closed.append(3))
    assert closed == [0, 1, 2, 3]
    assert caught.value.__notes__ == ["closing failed further: OSError: number 2"]
    close_all()
