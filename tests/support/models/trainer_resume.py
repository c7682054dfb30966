"""Trains a tiny Llama by transformers' Trainer with checkpoints, evaluation and generation on the way, and goes on from
one: plainly and by the engine, in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.utils.serialization.config
import transformers

import offload
from offload.integrations.transformers import OffloadCallback

CONFIG = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    attention_dropout=0.1,
)  # fmt: skip
ROWS = [{key: (torch.arange(8) * (number + 3)) % 64 for key in ("input_ids", "labels")} for number in range(24)]


class Generates(transformers.TrainerCallback):  # type: ignore[misc]
    """Generates in mid-training."""

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        if state.global_step == 3:
            model.eval()
            made = model.generate(torch.arange(4)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
            assert made.shape == (1, 8)
            model.train()


#: The checkpoint with the largest loss stays beside the last one while training, and alone after it.
WORST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}


def arguments_of(out: Path, steps: int, *, commits: bool, keep: int) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        save_total_limit=keep,
        **(WORST if keep == 1 else {}),
        save_only_model=commits,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )


def is_mapped(name: str) -> bool:
    """Whether a file of that name is mapped into this process."""
    return any(line.endswith(f"/{name}") for line in Path("/proc/self/maps").read_text().splitlines())


def trained(
    out: Path,
    pages: Path | None,
    steps: int,
    *,
    commits: bool,
    resume: bool = False,
    stop: int | None = None,
    keep: int = 2,
) -> tuple[Any, Any]:
    """Weights in the end, and losses, of a run of the Trainer to ``steps``; with ``stop`` by two Trainers, the first
    of which ends there. Files that it resumes from are mapped."""
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(CONFIG)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    if pages is not None:
        settings = {"memory": {"ram": "2MiB"}, "ssd": {"paths": [str(pages)]}}
        model, optimizer = offload.prepare(model, lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True), settings)
    loaded: list[bool] = []
    if pages is not None:
        loads = optimizer.load_state_dict
        optimizer.load_state_dict = lambda states: (loaded.append(is_mapped("optimizer.pt")), loads(states))
    for last in (steps,) if stop is None else (stop, steps):
        trainer = transformers.Trainer(
            model=model,
            args=arguments_of(out, last, commits=commits, keep=keep),
            train_dataset=ROWS,
            eval_dataset=ROWS[:4],
            optimizers=(optimizer, transformers.get_constant_schedule_with_warmup(optimizer, 5)),
            callbacks=[Generates(), *([OffloadCallback()] if commits else [])],
        )
        with torch.utils.serialization.config.patch("load.mmap", resume):
            trainer.train(resume_from_checkpoint=resume or None)
        assert any(loaded) is (resume and not commits), loaded
        resume = True
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    if pages is not None:
        optimizer.engine.close()
    keys = ("loss", "grad_norm", "eval_loss")
    return weights, [{key: entry[key] for key in keys if key in entry} for entry in trainer.state.log_history[:-1]]


folder = Path(sys.argv[1])
expected, expected_log = trained(folder / "plain", None, 6, commits=False)
for commits in (True, False):
    out, pages = folder / f"out {commits}", folder / f"pages {commits}"
    trained(out, pages, 4, commits=commits)
    assert (out / "checkpoint-4" / "optimizer.pt").exists() is not commits
    # Without commits the Trainer's own files have everything, so another folder does.
    found, log = trained(out, pages if commits else folder / "other", 6, commits=commits, resume=True)
    assert log == expected_log, (commits, log, expected_log)
    assert all(torch.equal(value, found[name]) for name, value in expected.items()), commits
found, log = trained(folder / "out twice", folder / "pages twice", 6, commits=True, stop=4)
assert log == expected_log, (log, expected_log)
assert all(torch.equal(value, found[name]) for name, value in expected.items())
trained(folder / "out best", folder / "pages best", 6, commits=True, keep=1)
kept = [int(path.name.rpartition("-")[2]) for path in (folder / "out best").glob("checkpoint-*")]
assert kept == [2], kept
_, log = trained(folder / "out best", folder / "pages best", 6, commits=True, keep=1, resume=True)
assert log == expected_log, (log, expected_log)
try:
    trained(folder / "out anew", folder / "pages twice", 6, commits=True)
except offload.CommitError as error:
    assert "holds commits, and this run did not go on from one" in str(error), error
    assert not list((folder / "out anew").glob("checkpoint-*")), "it is to be said when training begins"
else:
    raise AssertionError("a folder with another training's commits was taken")
try:
    trained(folder / "out False", folder / "third", 6, commits=True, resume=True)
except offload.CommitError as error:
    assert "was it saved with OffloadCallback?" in str(error), error
else:
    raise AssertionError("a checkpoint without a commit was taken")
print("equal")
