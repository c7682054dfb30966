"""Tests that need a CUDA device; without one they are skipped."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is in this folder where torch cannot use CUDA."""
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="torch cannot use CUDA here")
        for item in items:
            if item.path.parent.name == "gpu":
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def cuda_is_up() -> None:
    """What CUDA opens and starts stays for the whole process: before the first test, so that no test is blamed for
    it."""
    if torch.cuda.is_available():
        one = torch.ones(8, 8, device="cuda", requires_grad=True)
        (one @ one).sum().backward()
        torch.cuda.synchronize()
