"""A run over a frozen base in a checkpoint's file, committed after each step, to be killed at any instant.

    python origin_run.py FOLDER STEPS

resumes if it can, and prints ``STEP LOSS`` for each step and ``end DIGEST`` of all parameters.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from frozen_base import of_base, plain_and_file, prepared, settings, train


def main(folder: Path, steps: int) -> None:
    """Train to the end."""
    path = folder / "checkpoint" / "model.safetensors"
    if not path.exists():
        plain_and_file(path.parent)
    config = settings(folder) | {"commit": {"every_steps": 1, "keep": 2}}
    model, optimizer = prepared(config, path)
    with optimizer.engine as engine:
        engine.resume()
        while engine.steps < steps:
            (loss,) = train(model, optimizer, [engine.steps])
            engine.save_if_due()
            print(engine.steps, loss.item().hex(), flush=True)
        assert all(tensor.origin is not None and tensor.copy is None for tensor in of_base(optimizer))
        digest = hashlib.sha256()
        for value in model.state_dict().values():
            digest.update(value.float().numpy().tobytes())
        print("end", digest.hexdigest(), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
