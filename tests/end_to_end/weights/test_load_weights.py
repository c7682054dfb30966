"""Checkpoints into models that are there: plain ones, paged ones, and those built on meta."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parity import adamw, compare
from safetensors.torch import save_file
from small_runs import assert_closed, assert_equal, batches, built, config, engine_of, train, train_plain
from tiny_models import GPT, ConvNet
from torch import Tensor, nn

import offload


def saved(model: nn.Module, folder: Path, dtype: torch.dtype | None = None, **more: Tensor) -> Path:
    folder.mkdir(parents=True)
    tensors = {
        name: value.to(dtype if value.is_floating_point() else None) for name, value in model.state_dict().items()
    }
    save_file(tensors | more, folder / "model.safetensors", {"format": "pt"})
    return folder


def other() -> GPT:
    """The same model with other weights."""
    torch.manual_seed(8)
    return GPT()


def on_meta() -> GPT:
    with torch.device("meta"):
        return GPT()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [other, on_meta])
def test_into_an_engine(make: Callable[[], GPT], dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(built(), tmp_path / "weights", dtype)
    plain = built().to(dtype).float()
    optimizer = adamw(plain.parameters())
    with engine_of(make(), tmp_path) as engine:
        before = engine.stats()
        offload.load_weights(engine.model, folder)
        after = engine.stats()
        assert (after.bytes_read, after.bytes_written) == (before.bytes_read, before.bytes_written)
        assert_equal(engine.model, plain)
        train(engine, 3)
        train_plain(plain, optimizer, 3)
        compare(plain, optimizer, engine.model, engine.optimizer, "in the end")
    assert_closed(engine)


def test_in_the_middle_of_training(tmp_path: Path) -> None:
    folder = saved(built(), tmp_path / "weights")
    plain = other()
    optimizer = adamw(plain.parameters())
    with engine_of(other(), tmp_path) as engine:
        train(engine, 2)
        train_plain(plain, optimizer, 2)
        offload.load_weights(engine.model, folder)
        plain.load_state_dict(built().state_dict())
        train(engine, 2)
        train_plain(plain, optimizer, 2)
        compare(plain, optimizer, engine.model, engine.optimizer, "in the end")
    assert_closed(engine)


@pytest.mark.parametrize("start", ["auto", "step"])
@pytest.mark.parametrize("at", [0, 2])
def test_between_backward_and_step(start: str, at: int, tmp_path: Path) -> None:
    """As in plain PyTorch, or an error: an update that was made early is never lost."""
    folder = saved(built(), tmp_path / "weights")
    plain = other()
    optimizer = adamw(plain.parameters())
    refused = False
    with engine_of(other(), tmp_path, start=start) as engine:
        for step, batch in enumerate(batches(4)):
            engine.backward(engine(*batch))
            plain(*batch).backward()
            if step == at:
                try:
                    offload.load_weights(engine.model, folder)
                    plain.load_state_dict(built().state_dict())
                except RuntimeError as error:
                    assert "its update of this step has been made already" in str(error)
                    refused = True
            engine.step()
            optimizer.step()
            optimizer.zero_grad()
        assert refused is (start == "auto" and at > 0)
        compare(plain, optimizer, engine.model, engine.optimizer, "in the end")
    assert_closed(engine)


def test_into_16_bits_with_masters(tmp_path: Path) -> None:
    folder = saved(built(), tmp_path / "weights")
    settings = config(tmp_path) | {"model": {"factory": "tiny_models:GPT", "dtype": "bf16"}}
    with offload.initialize(on_meta(), settings, adamw) as engine:
        offload.load_weights(engine.model, folder)
        assert_equal(engine.model, built().bfloat16())
        with offload.initialize(built().bfloat16(), config(tmp_path / "two"), adamw) as expected:
            train(engine, 3)
            train(expected, 3)
            assert_equal(engine.model, expected.model)
    assert_closed(engine)


def test_into_a_plain_model_buffers_included(tmp_path: Path) -> None:
    torch.manual_seed(7)
    source = ConvNet().train()
    source(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))
    folder = saved(source, tmp_path / "weights")
    model = ConvNet()
    model.first.weight.data = model.first.weight.data.to(memory_format=torch.channels_last)
    offload.load_weights(model, folder)
    assert_equal(model, source)
    with offload.initialize(ConvNet(), config(tmp_path), adamw) as engine:
        offload.load_weights(engine.model, folder)
        assert_equal(engine.model, source)


def test_what_does_not_fit_is_one_error_and_changes_nothing(tmp_path: Path) -> None:
    folder = saved(other(), tmp_path / "weights", more=torch.ones(2), **{"norm.weight": torch.ones(3)})
    with engine_of(built(), tmp_path) as engine:
        for strict in (True, False):
            with pytest.raises(
                ValueError, match=r"norm\.weight is \[3\] in the file and \[128\] in the model"
            ) as caught:
                offload.load_weights(engine.model, folder, strict=strict)
            assert ("surplus: more" in str(caught.value)) is strict and "\n" not in str(caught.value)
        assert_equal(engine.model, built())


def test_not_strict_leaves_what_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    given = {name: value for name, value in other().state_dict().items() if "proj" in name}
    save_file(given | {"more": torch.ones(2)}, folder / "model.safetensors")
    plain = built()
    plain.load_state_dict(given, strict=False)
    with engine_of(built(), tmp_path) as engine:
        offload.load_weights(engine.model, folder, strict=False)
        assert_equal(engine.model, plain)
    with engine_of(on_meta(), tmp_path / "two") as engine:
        offload.load_weights(engine.model, folder, strict=False)
        assert torch.equal(engine.model.get_parameter("blocks.0.proj.weight"), given["blocks.0.proj.weight"])
        with pytest.raises(RuntimeError, match="no values yet"):
            engine(*batches(1)[0])


def test_a_model_on_meta_is_to_be_prepared_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tok\.weight is on meta.*offload\.prepare first"):
        offload.load_weights(on_meta(), saved(built(), tmp_path / "weights"))


def test_memory_of_a_load_is_the_budget(tmp_path: Path) -> None:
    """160 MB of weights into 24 MiB of pages, each used once."""
    (tmp_path / "weights").mkdir()
    weights = {f"{number}.weight": torch.full((2048, 1024), float(number)) for number in range(20)}
    save_file(weights, tmp_path / "weights" / "model.safetensors")
    code = (
        "import sys, torch; sys.path[:0] = sys.argv[2].split(':')\n"
        "from pathlib import Path\n"
        "import offload\n"
        "from torch import nn\n"
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) >> 10\n"
        "folder, config = Path(sys.argv[1]), {'memory': {'ram': '24MiB', 'page': '256KiB'}}\n"
        "config['ssd'] = {'paths': [str(folder / 'pages')]}\n"
        "with torch.device('meta'):\n"
        "    model = nn.Sequential(*(nn.Linear(1024, 2048, bias=False) for _ in range(20)))\n"
        "before = peak()\n"
        "engine = offload.initialize(model.requires_grad_(False), config, lambda p: torch.optim.AdamW(p, fused=True))\n"
        "offload.load_weights(model, folder / 'weights')\n"
        "for number, layer in enumerate(model):\n"
        "    with offload.gathered(layer):\n"
        "        assert float(layer.weight[-1, -1]) == number\n"
        "print(peak() - before)\n"
        "engine.close()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), ":".join(path for path in sys.path if path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) <= 24 + 32


def test_a_model_on_meta_stays_so_when_it_is_refused(tmp_path: Path) -> None:
    model = on_meta()
    with pytest.raises(offload.BudgetError, match="set memory.ram to at least"):
        offload.initialize(model, config(tmp_path, ram=128 << 10), adamw)
    assert all(parameter.is_meta and type(parameter) is nn.Parameter for parameter in model.parameters())
