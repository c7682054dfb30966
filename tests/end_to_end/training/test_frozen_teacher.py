"""A frozen model in pages beside the one that is trained: a teacher, or a reference, without an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantised_models import TOKENS, adamw, base_of
from torch import Tensor, nn

import offload

pytest.importorskip("transformers")
LAYERS = 6
#: About a third of the teacher.
RAM = "320KiB"


def _config(tmp_path: Path, name: str) -> dict[str, Any]:
    return {"memory": {"ram": RAM, "page": "64KiB"}, "ssd": {"paths": [str(tmp_path / name)]}}


def _distilled(student: Any, teacher: Any) -> Tensor:
    """The student's distance from what the teacher says, who is asked without a graph."""
    with torch.no_grad():
        wanted = teacher(input_ids=TOKENS).logits.float()
    found = student(input_ids=TOKENS).logits.float()
    return F.kl_div(found.log_softmax(-1), wanted.softmax(-1), reduction="batchmean")


def _judged(student: Any, teacher: Any) -> Tensor:
    """The teacher's loss of what the student says: the backward pass goes through the teacher."""
    words = student(input_ids=TOKENS).logits.softmax(-1)
    embedded = words.to(teacher.dtype) @ teacher.get_input_embeddings().weight
    return teacher(inputs_embeds=embedded, labels=TOKENS).loss  # type: ignore[no-any-return]


def _trained(student: nn.Module, teacher: nn.Module, loss_of: Callable[..., Tensor], optimizer: Any) -> list[float]:
    found = []
    for _ in range(3):
        loss = loss_of(student, teacher)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def _student() -> nn.Module:
    return base_of("fp32").requires_grad_(True)


@pytest.mark.parametrize("loss_of", [_distilled, _judged])
@pytest.mark.parametrize("kind", ["bf16", "nf4"])
@pytest.mark.parametrize("student_in_pages", [False, True])
def test_a_teacher_in_pages(kind: str, loss_of: Callable[..., Tensor], student_in_pages: bool, tmp_path: Path) -> None:
    plain = _student()
    expected = _trained(plain, base_of(kind, LAYERS), loss_of, adamw(plain.parameters()))
    teacher, none = offload.prepare(base_of(kind, LAYERS), None, _config(tmp_path, "teacher"))
    student, optimizer = _student(), None
    if student_in_pages:
        student, optimizer = offload.prepare(student, adamw, _config(tmp_path, "student"))
    trainer: Any = optimizer or adamw(student.parameters())
    assert _trained(student, teacher, loss_of, trainer) == expected
    assert none.engine.memory_report().by_tag.keys() <= {"parameter"}  # no masters, states or gradients
    assert not none.state_dict()["state"]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for engine in (none.engine, getattr(optimizer, "engine", None)):
        if engine is not None:
            engine.close()


def test_a_teacher_generates_within_the_budget(tmp_path: Path) -> None:
    plain = base_of("bf16", LAYERS).eval()
    words: Any = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 4, "do_sample": False}
    teacher, none = offload.prepare(base_of("bf16", LAYERS), None, _config(tmp_path, "teacher"))
    teacher.eval()
    assert torch.equal(plain.generate(TOKENS, **words), teacher.generate(TOKENS, **words))
    before = none.engine.stats()
    assert torch.equal(plain.generate(TOKENS, **words), teacher.generate(TOKENS, **words))
    after = none.engine.stats()
    assert after.bytes_read > before.bytes_read and after.bytes_written == before.bytes_written
    none.engine.close()
