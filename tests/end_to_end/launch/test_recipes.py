"""The launch files of examples/hugging_face, at small size: a checkpoint, local text, and what is exported again."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forecast_runs import RATES
from launched_runs import threads_put_back

from offload import load_config
from offload.forecast.forecast import forecast
from offload.launch.train import launch

transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm").tqdm.monitor_interval = 0  # its thread would stay

EXAMPLES = Path(__file__).parents[3] / "examples" / "hugging_face"
TRAIN = {"steps": 4, "batch": 2, "seq": 16, "warmup_steps": 1, "evaluate_batches": 1, "log_every": 1, "threads": 1}


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder has checkpoints/model and text/, as the examples name them."""
    from tiny_checkpoint import make_checkpoint, make_text

    monkeypatch.chdir(tmp_path)
    transformers.utils.logging.disable_progress_bar()
    make_text(tmp_path / "text")
    with threads_put_back():
        yield make_checkpoint(tmp_path / "checkpoints" / "model")


def small(name: str, **arguments: Any) -> dict[str, Any]:
    """An example as it stands, but for its sizes."""
    raw = tomllib.loads((EXAMPLES / f"{name}.toml").read_text())
    raw["memory"]["ram"] = "4MiB"
    raw["train"] |= TRAIN
    raw["model"]["arguments"] |= arguments
    raw["optimizer"]["lr"] = 1e-2
    return raw


def losses(run: str) -> list[float]:
    """Of each step, in nats a token."""
    return [json.loads(line)["loss"] for line in Path(run, "log", "metrics.jsonl").read_text().splitlines()]


def test_a_full_fine_tune_has_the_losses_of_plain_pytorch(checkpoint: Path) -> None:
    raw = small("full_fine_tune")
    raw["train"]["schedule"] = "constant"
    assert launch(load_config(raw)) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    from offload.integrations.tokenized_text import load_tokens

    data = load_tokens(next(Path("runs/full_fine_tune").rglob("tokens.bin")).parent, seed=1, validation_share=0.02)
    expected = []
    for step in range(TRAIN["steps"]):
        tokens, following = data.batch(step, 2, 16)
        loss = F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1), following.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss))
    assert losses("runs/full_fine_tune") == expected


@pytest.mark.parametrize("name", ["lora", "lora_4bit"])
def test_lora_leaves_an_adapter_that_merges(name: str, checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    if name == "lora_4bit":
        pytest.importorskip("bitsandbytes")
    config = load_config(small(name, dtype="bfloat16"))
    planned = forecast(config, RATES)
    assert launch(config) == 0
    said = capfd.readouterr().out
    assert f", {planned.step.host_pages} planned" in said
    found = losses(f"runs/{name}")
    assert len(found) == TRAIN["steps"] and found[-1] < found[0]
    auto: Any = transformers.AutoModelForCausalLM
    base = auto.from_pretrained(checkpoint)
    model = peft.PeftModel.from_pretrained(base, Path("runs", name, "log", "adapter"))
    assert all(bool(p.any()) for key, p in model.named_parameters() if "lora_" in key)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"\n{n_parameters:,} parameters; " in said and planned.parameters == n_parameters
    merged = model.merge_and_unload()
    merged.save_pretrained("merged")
    tokens = torch.arange(8)[None]
    again = auto.from_pretrained("merged")(input_ids=tokens).logits
    assert torch.equal(again, merged(input_ids=tokens).logits)
    assert not torch.equal(again, auto.from_pretrained(checkpoint)(input_ids=tokens).logits)


def test_an_adapter_is_saved_as_peft_does(checkpoint: Path) -> None:
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file

    from offload.integrations.recipes import causal_lm, save_adapter

    lora = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "use_dora": True}
    model: Any = causal_lm(str(checkpoint), lora=lora)
    assert isinstance(model, peft.PeftModel)
    save_adapter(model, Path("one"))
    model.save_pretrained("other")
    one, other = (load_file(Path(folder, "adapter_model.safetensors")) for folder in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    files = [Path(folder, "adapter_config.json").read_text() for folder in ("one", "other")]
    assert files[0] == files[1] and str(checkpoint) in files[0]


def test_four_bits_without_an_adapter_are_refused() -> None:
    from offload.integrations.recipes import causal_lm

    with pytest.raises(ValueError, match="what is quantised is not trained; give lora"):
        causal_lm("nowhere", four_bit=True)


def test_a_checkpoint_that_is_not_there_is_one_clear_error(checkpoint: Path) -> None:
    from offload.integrations.recipes import causal_lm, text

    with pytest.raises(ValueError, match=r"none is no folder of a checkpoint, it has no config\.json"):
        causal_lm("none")
    with pytest.raises(ValueError, match=r"none is no folder of a checkpoint, it has no tokenizer_config\.json"):
        text(Path("tokens"), 1, ["text/*.txt"], "none")


def test_the_same_text_is_tokenised_once(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from offload.integrations.recipes import text

    def tokens() -> Any:
        return text(Path("tokens"), 1, ["text/*.txt"], str(checkpoint))

    first = tokens()
    assert "tokenising" in capfd.readouterr().out
    made = Path("tokens/tokens.bin").stat()
    assert (tokens().train == first.train).all() and Path("tokens/tokens.bin").stat() == made
    assert "tokenising" not in capfd.readouterr().out
    Path("text/more.txt").write_text("And then the fox sleeps.\n" * 20)
    assert len(tokens().train) > len(first.train)


def test_what_is_no_text_is_one_clear_error(checkpoint: Path) -> None:
    from offload.integrations.recipes import text

    with pytest.raises(ValueError, match=r"no file is named none/\*\.txt"):
        text(Path("tokens"), 1, ["none/*.txt"], str(checkpoint))
    Path("text/a.jsonl").write_text('{"text": "fine"}\n{"other": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: no object with 'text'"):
        text(Path("tokens"), 1, ["text/*.jsonl"], str(checkpoint))
    Path("foreign").mkdir()
    Path("foreign/tokens.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match="was not made here"):
        text(Path("foreign"), 1, ["text/*.txt"], str(checkpoint))
    assert Path("foreign/tokens.bin").read_bytes() == b"mine"


def test_parquet_rows_are_documents(checkpoint: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    from offload.integrations.recipes import text

    rows = ["The quick brown fox", "", "jumps over the lazy dog"] * 20
    parquet.write_table(pyarrow.table({"words": rows}), "text/rows.parquet")
    data = text(Path("tokens"), 1, ["text/*.parquet"], str(checkpoint), column="words", validation_share=0.1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    end = tokenizer.eos_token_id
    expected = [i for row in rows if row for i in [*tokenizer(row)["input_ids"], end]]
    assert [*data.train, *data.validation] == expected
