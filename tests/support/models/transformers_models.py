"""Models of transformers, small and random: their configurations, their inputs, and the list of those that must train
to plain PyTorch's bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCAB = 128
#: What most configurations call their sizes.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT: dict[str, Any] = SIZES | {"vocab_size": VOCAB}
#: What encoder-decoders of Bart's kind call them.
PAIRED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
}
IMAGES: dict[str, Any] = {"image_size": 32, "patch_size": 8}

Inputs = Callable[[torch.Generator], dict[str, Tensor]]


def tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(2, VOCAB, (2, 12), generator=generator)


def text(generator: torch.Generator) -> dict[str, Tensor]:
    ids = tokens(generator)
    return {"input_ids": ids, "labels": ids}


def images(generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator), "labels": torch.tensor([0, 1])}


def pairs(generator: torch.Generator) -> dict[str, Any]:
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    return {
        "input_ids": tokens(generator),
        "pixel_values": pixels,
        "attention_mask": torch.ones(2, 12, dtype=torch.long),
        "return_loss": True,
    }


def spectrum(generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 16, 40, generator=generator), "labels": tokens(generator)}


def sound(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "input_values": torch.randn(2, 2000, generator=generator),
        "labels": torch.randint(1, 30, (2, 3), generator=generator),
    }


#: Model class, configuration class, its arguments, and what the model eats.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], Inputs]] = {
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_positions": 32,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        text,
    ),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", TEXT, text),
    "Llama tied": ("LlamaForCausalLM", "LlamaConfig", TEXT | {"tie_word_embeddings": True}, text),
    "Mistral": (
        "MistralForCausalLM",
        "MistralConfig",
        TEXT | {"num_key_value_heads": 2, "sliding_window": 8},
        text,
    ),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", TEXT | {"num_key_value_heads": 2, "head_dim": 16}, text),
    "Gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        TEXT | {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8},
        text,
    ),
    "Gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        TEXT | {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "pad_token_id": 0},
        text,
    ),
    "ModernBERT": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        TEXT
        | {
            "max_position_embeddings": 32,
            "local_attention": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
            "cls_token_id": 1,
            "sep_token_id": 1,
        },
        text,
    ),
    "Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        TEXT
        | {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
        text,
    ),
    "OLMoE": ("OlmoeForCausalLM", "OlmoeConfig", TEXT | {"num_experts": 4, "num_experts_per_tok": 2}, text),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        text,
    ),
    "BERT": ("BertForMaskedLM", "BertConfig", TEXT | {"max_position_embeddings": 32}, text),
    "RoBERTa": ("RobertaForMaskedLM", "RobertaConfig", TEXT | {"max_position_embeddings": 34}, text),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", TEXT | {"num_local_experts": 4, "num_key_value_heads": 2}, text),
    "Mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        text,
    ),
    "ViT": ("ViTForImageClassification", "ViTConfig", SIZES | IMAGES, images),
    "CLIP": (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": TEXT | {"max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1},
            "vision_config": SIZES | IMAGES,
            "projection_dim": 32,
        },
        pairs,
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        PAIRED
        | {
            "num_mel_bins": 16,
            "max_source_positions": 20,
            "max_target_positions": 32,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        spectrum,
    ),
    "Wav2Vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        TEXT
        | {
            "vocab_size": 32,
            "conv_dim": (32, 32),
            "conv_kernel": (10, 3),
            "conv_stride": (5, 2),
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "mask_time_prob": 0.0,
            "layerdrop": 0.0,
        },
        sound,
    ),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "layerdrop": 0.0,
        },
        text,
    ),
    "Bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        text,
    ),
    "Falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        text,
    ),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TEXT | {"num_key_value_heads": 2, "tie_word_embeddings": True}, text),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", TEXT | {"head_dim": 16, "num_key_value_heads": 2}, text),
    "Phi": ("PhiForCausalLM", "PhiConfig", TEXT, text),
    "DeBERTa": (
        "DebertaForMaskedLM",
        "DebertaConfig",
        TEXT | {"max_position_embeddings": 32, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        text,
    ),
    "BART": (
        "BartForConditionalGeneration",
        "BartConfig",
        PAIRED | {"max_position_embeddings": 32, "forced_eos_token_id": 1},
        text,
    ),
    "DistilBERT": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": VOCAB, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32},
        text,
    ),
}

#: What must train to plain PyTorch's bits however it was made.
LIST = (
    "GPT-2",
    "Llama",
    "Llama tied",
    "Qwen2",
    "Qwen3",
    "Gemma2",
    "Gemma3",
    "Mistral",
    "Phi",
    "T5",
    "BART",
    "BERT",
    "ModernBERT",
    "ViT",
    "CLIP",
    "Whisper",
    "Wav2Vec2",
    "Mamba",
    "Mixtral",
    "Qwen3-MoE",
    "OLMoE",
)


def library() -> Any:
    """transformers, imported when a test runs: it takes seconds. Its progress bars have a thread that stays."""
    transformers: Any = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    return transformers


def built(name: str) -> nn.Module:
    """The model, always with the same weights."""
    model_class, config_class, arguments, _ = FAMILIES[name]
    torch.manual_seed(7)
    model: nn.Module = getattr(library(), model_class)(getattr(library(), config_class)(**copy.deepcopy(arguments)))
    return model
