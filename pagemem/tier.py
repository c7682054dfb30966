"""The kinds of memory, and what bytes in them are held for."""

from __future__ import annotations

import enum
from typing import Final


class Tier(enum.Enum):
    """A kind of memory, fastest first."""

    # Members are single: enum's own hash, of the name, is a Python call.
    __hash__ = object.__hash__

    DEVICE = "device"
    HOST = "host"
    SSD = "ssd"


class Tag(enum.Enum):
    """What bytes of a budget are held for. Every reservation and every paged tensor has exactly one."""

    # Members are single: enum's own hash, of the name, is a Python call.
    __hash__ = object.__hash__

    PARAM = "parameter"
    GRAD = "gradient"
    MASTER = "master"
    MOMENT = "moment"
    ACTIVATION = "activation"
    STAGING = "staging"
    TEMPORARY = "temporary"


#: Content that ends with the step: no commit has it.
TRANSIENT: Final = frozenset({Tag.GRAD, Tag.ACTIVATION})
