"""One table of legal moves: what it lets through, and what its error says."""

from __future__ import annotations

import enum

import pytest

from pagemem.errors import TransitionError
from pagemem.state_machine import StateMachine


class Light(enum.Enum):
    RED = "red"
    GREEN = "green"
    OUT = "out"


MOVES = StateMachine("light", {Light.RED: {Light.GREEN, Light.OUT}, Light.GREEN: {Light.RED}})
LEGAL = {(Light.RED, Light.GREEN), (Light.RED, Light.OUT), (Light.GREEN, Light.RED)}


def test_the_table_has_every_state_and_lets_exactly_its_moves_through() -> None:
    assert set(MOVES.moves) == set(Light)
    for here in Light:
        for there in Light:
            if (here, there) in LEGAL:
                assert MOVES.move(here, there) is there
            else:
                with pytest.raises(
                    TransitionError, match=f"^light: {here.value} -> {there.value} is not a legal move$"
                ):
                    MOVES.move(here, there)


def test_the_error_names_the_object_and_ends_with_its_history() -> None:
    with pytest.raises(TransitionError) as caught:
        MOVES.move(Light.OUT, Light.RED, "at the door", [Light.GREEN, Light.RED])
    assert str(caught.value) == ("light at the door: out -> red is not a legal move (history: green -> red -> out)")
