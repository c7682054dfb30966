"""A tiny language model of transformers with its tokenizer, as a folder, and text that it can learn."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SENTENCE = "The quick brown fox jumps over the lazy dog, and the dog does not care.\n"


def make_text(folder: Path, sentences: int = 300) -> Path:
    """A text file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fox.txt"
    path.write_text(SENTENCE * sentences)
    return path


def make_checkpoint(folder: Path, dtype: torch.dtype = torch.float32, hidden: int = 32) -> Path:
    """A Llama of two layers with random weights and a byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [SENTENCE],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=fast.eos_token_id,
    )
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder
