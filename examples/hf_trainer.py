"""transformers' Trainer over pages: three lines more, the losses of the Trainer without them, and a checkpoint to go on
from whose optimizer states are never copied.

    python examples/hf_trainer.py --hidden 512 --ram 64MiB

Needs transformers and accelerate.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import offload
from offload.integrations.transformers import OffloadCallback

VOCABULARY = 256


def build_model(hidden: int) -> Any:
    """A small Llama with random weights; `offload.from_pretrained` takes those of a checkpoint."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=4,
        num_attention_heads=4,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def rows(n: int) -> list[dict[str, torch.Tensor]]:
    """Rows of 32 tokens, each the one before it plus a step that differs by row."""
    made = [torch.arange(32) * (1 + number % 7) % VOCABULARY for number in range(n)]
    return [{"input_ids": row, "labels": row} for row in made]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def train(model: Any, optimizer: Any, output: Path, steps: int, callbacks: list[Any], *, resume: bool = False) -> Any:
    """The losses of a run."""
    arguments = transformers.TrainingArguments(
        output_dir=str(output), max_steps=steps, per_device_train_batch_size=4, logging_steps=1, save_steps=2,
        save_only_model=True, save_total_limit=2, max_grad_norm=1.0, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(64),
        optimizers=(optimizer, transformers.get_constant_schedule(optimizer)),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--ram", default="16MiB", help="RAM for parameters, gradients and optimizer states")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        config = {"memory": {"ram": arguments.ram}, "ssd": {"paths": [f"{folder}/pages"]}}

        model, optimizer = offload.prepare(build_model(arguments.hidden), adamw, config)
        train(model, optimizer, Path(folder, "out"), arguments.steps // 2, [OffloadCallback()])
        optimizer.engine.close()

        # As another process would, after a crash: the model anew, and on from the last checkpoint.
        model, optimizer = offload.prepare(build_model(arguments.hidden), adamw, config)
        losses = train(model, optimizer, Path(folder, "out"), arguments.steps, [OffloadCallback()], resume=True)
        optimizer.engine.close()

        plain = build_model(arguments.hidden)
        expected = train(plain, adamw(plain.parameters()), Path(folder, "plain"), arguments.steps, [])
    print(f"losses: {losses}")
    print(f"equal to those of the Trainer without pages: {losses == expected}")


if __name__ == "__main__":
    main()
