"""Parameter shapes of published models, as data: leaf module by leaf module, in the order of the forward pass.

From the papers and the released configurations. Tied weights are listed once. No model is built and no memory taken.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

#: The shapes of one leaf module's own parameters.
Leaf = tuple[tuple[int, ...], ...]


def gpt2(width: int, layers: int) -> list[Leaf]:
    """Radford et al. 2019; linear layers with a bias, the head tied to the embedding."""
    norm: Leaf = ((width,), (width,))
    attention: list[Leaf] = [((width, 3 * width), (3 * width,)), ((width, width), (width,))]
    mlp: list[Leaf] = [((width, 4 * width), (4 * width,)), ((4 * width, width), (width,))]
    return [((50257, width),), ((1024, width),), *layers * [norm, *attention, norm, *mlp], norm]


def llama(width: int, hidden: int, layers: int, kv_width: int) -> list[Leaf]:
    """Touvron et al. 2023; no biases, a head of its own."""
    attention: list[Leaf] = [((width, width),), ((kv_width, width),), ((kv_width, width),), ((width, width),)]
    mlp: list[Leaf] = [((hidden, width),), ((hidden, width),), ((width, hidden),)]
    norm: Leaf = ((width,),)
    return [((32000, width),), *layers * [norm, *attention, norm, *mlp], norm, ((32000, width),)]


def mixtral(width: int, hidden: int, layers: int, kv_width: int, experts: int) -> list[Leaf]:
    """Jiang et al. 2024; Llama with experts, each of three linear layers, and a router."""
    attention: list[Leaf] = [((width, width),), ((kv_width, width),), ((kv_width, width),), ((width, width),)]
    expert: list[Leaf] = [((hidden, width),), ((width, hidden),), ((hidden, width),)]
    norm: Leaf = ((width,),)
    layer = [norm, *attention, norm, ((experts, width),), *experts * expert]
    return [((32000, width),), *layers * layer, norm, ((32000, width),)]


def t5(width: int, hidden: int, layers: int, heads: int, head_width: int) -> list[Leaf]:
    """Raffel et al. 2020; encoder and decoder, position biases in the first layer of each, the head tied."""
    inner = heads * head_width
    norm: Leaf = ((width,),)
    attention: list[Leaf] = [norm, *3 * [((inner, width),)], ((width, inner),)]
    mlp: list[Leaf] = [norm, ((hidden, width),), ((width, hidden),)]
    biased: list[Leaf] = [*attention, ((32, heads),)]
    encoder = [*biased, *mlp, *(layers - 1) * [*attention, *mlp], norm]
    decoder = [*biased, *attention, *mlp, *(layers - 1) * [*attention, *attention, *mlp], norm]
    return [((32128, width),), *encoder, *decoder]


MODELS: dict[str, Callable[[], list[Leaf]]] = {
    "GPT-2 small": lambda: gpt2(768, 12),
    "GPT-2 medium": lambda: gpt2(1024, 24),
    "GPT-2 large": lambda: gpt2(1280, 36),
    "GPT-2 XL": lambda: gpt2(1600, 48),
    "T5-base": lambda: t5(768, 3072, 12, 12, 64),
    "T5-11B": lambda: t5(1024, 65536, 24, 128, 128),
    "Llama-7B": lambda: llama(4096, 11008, 32, 4096),
    "Llama-70B": lambda: llama(8192, 28672, 80, 1024),
    "Mixtral-8x7B": lambda: mixtral(4096, 14336, 32, 1024, 8),
}


def n_parameters(leaves: list[Leaf]) -> int:
    """Parameters in all."""
    return sum(prod(shape) for leaf in leaves for shape in leaf)
