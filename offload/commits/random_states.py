"""States of Python's, NumPy's and torch's random generators as JSON, and back."""

from __future__ import annotations

import base64
import binascii
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_states(device: torch.device) -> dict[str, Any]:
    """States of Python's, NumPy's and torch's global generators, as JSON has it."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "torch": _text_of(torch.get_rng_state()),
        **({"cuda": _text_of(torch.cuda.get_rng_state(device))} if device.type == "cuda" else {}),
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Put the global generators where `random_states` found them; the device's only if it was of that kind then."""
    torch.set_rng_state(state_tensor(states["torch"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(state_tensor(states["cuda"]), device)
    np.random.set_state(numpy_state(states["numpy"]))
    random.setstate(python_state(states["python"]))


def _text_of(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def state_tensor(text: str) -> torch.Tensor:
    """Bytes in base64 as torch's generators have them.

    Raises:
        ValueError: it is no base64.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())


def numpy_state(saved: Any) -> Any:
    """What `numpy.random.set_state` takes."""
    name, keys, position, has_gauss, gauss = saved
    if name != "MT19937" or len(keys) != 624 or position > 624:
        raise ValueError(f"{name[:20]!r} with {len(keys)} numbers at {position}; it is 'MT19937' with 624")
    return name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss


def python_state(saved: Any) -> Any:
    """What `random.setstate` takes."""
    version, internal, gauss_next = saved
    return version, tuple(internal), gauss_next
