"""Trains a tiny Llama by transformers' Trainer as it comes, plainly and by the engine, and compares: a process of its
own.

The Trainer clips, reads the norm of gradients in every step, accumulates, and makes a step with fewer batches at the
end of an epoch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import offload

ROWS = [
    {"input_ids": (torch.arange(8) * (number + 3)) % 64, "labels": (torch.arange(8) * (number + 3)) % 64}
    for number in range(10)
]
CONFIG = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
)


def fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def trained(folder: Path, start: str | None, max_grad_norm: float) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights in the end, and the norms that the Trainer logged."""
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(CONFIG)
    if start is None:
        optimizer: Any = fused(model.parameters())
    else:
        settings = {
            "memory": {"ram": "4MiB"},
            "ssd": {"paths": [str(folder / f"{start} {max_grad_norm}")]},
            "update": {"start": start},
        }
        model, optimizer = offload.prepare(model, fused, settings)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "out"),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        max_grad_norm=max_grad_norm,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        seed=1,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=ROWS,
        optimizers=(optimizer, transformers.get_constant_schedule(optimizer)),
    )
    trainer.train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    if start is not None:
        optimizer.engine.close()
    return weights, [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


for largest in (0.1, 0.0):
    expected, expected_norms = trained(Path(sys.argv[1]), None, largest)
    assert len(expected_norms) == 6
    for chosen in ("auto", "step"):
        found, norms = trained(Path(sys.argv[1]), chosen, largest)
        assert norms == expected_norms, (chosen, largest, norms, expected_norms)
        assert all(torch.equal(value, found[name]) for name, value in expected.items()), (chosen, largest)
print("equal")
