"""Which rank prints the error that ends all."""

from __future__ import annotations

import pytest

from offload.config import ConfigError
from offload.launch.ranks import is_said_elsewhere
from pagemem.errors import RankError

RAISED = "rank 1 (process 7 on host) raised ConfigError: no more text"
DIED = "rank {} (process 7 on host) has died, or its connection: it was closed"


@pytest.mark.parametrize(
    ("rank", "error", "why", "elsewhere"),
    [
        (1, ConfigError("no more text"), RAISED, False),
        (0, RankError(RAISED), RAISED, True),
        (0, ConfigError("no more text"), RAISED, True),  # all have the same error; the first one prints it
        (0, ConfigError("another"), RAISED, False),
        (2, RankError(RAISED), RAISED, False),  # on another machine, whose first rank prints it, too
        (3, RankError(RAISED), RAISED, True),
        (0, RankError(DIED.format(1)), DIED.format(1), False),
        (1, RankError(DIED.format(3)), DIED.format(3), True),
        (1, RankError(DIED.format(0)), DIED.format(0), False),
        (0, KeyboardInterrupt(), RAISED, False),
    ],
)
def test_of_two_machines_with_two_ranks_each(
    rank: int, error: BaseException, why: str, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank % 2), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    assert is_said_elsewhere(error, why) == elsewhere
