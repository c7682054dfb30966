"""Where memory has very many tenants, windows are looked for near the best ones: results are plain PyTorch's all the
same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pairwise import full_product
from parity import Parity, smallest_ram, state_bytes
from tiny_models import CASES

from pagemem import knobs
from pagemem.residency import tenants
from scheduler.lookahead import tenants as walk


@full_product(
    name=["gpt", "tied"], ram=["smallest", "half"], memory={"two tiers": {}, "three tiers": {"device": "1MiB"}}
)
def test_every_step_equals_plain_torch(
    name: str, ram: str, memory: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knobs, "MANY_TENANTS", 0)
    looked = {tenants: 0, walk: 0}
    for module in looked:
        near = module.window_near

        def counted(*arguments: Any, near: Any = near, module: Any = module) -> Any:
            looked[module] += 1
            return near(*arguments)

        monkeypatch.setattr(module, "window_near", counted)
    parity = Parity(CASES[name], tmp_path, state_bytes(CASES[name]) // 2, None)
    if ram == "smallest":
        parity.ram = smallest_ram(Parity(CASES[name], tmp_path / "smallest", 0, None, steps=2))
    parity.memory = memory
    stats = parity.run()
    assert stats.steps == parity.steps and stats.bytes_read > 0
    assert all(looked.values()), "both on demand and by plan"
