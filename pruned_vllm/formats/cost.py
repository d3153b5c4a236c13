"""What a step of a model must read and compute, at least. Pure Python.

Decode is bound by memory: a step reads every weight once and the keys and values of every sequence in the batch.
Prefill is bound by arithmetic. Both counts hold what pruning cannot touch (lm_head, embedding rows, norms, routers,
shared experts), so a ratio of two models is what a perfect runtime would reach.

Of a layer's routed experts they count what tokens need on average if its router sends each to k different ones of E,
every choice as likely as any other: a step of T tokens reads a share 1 - (1 - k/E)^T of them, and a token passes k/E.
Trained routers prefer some experts, and tokens of one text resemble each other: a real batch reads fewer.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping

from pruned_vllm.formats.geometry import ModelGeometry

_ROUTED = re.compile(r"\.experts\.\d+\.")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def moved_bytes(
    geometry: ModelGeometry,
    tokens: int,
    kv_tokens: float,
    element_bytes: int,
    tensor_bytes: Mapping[str, int] | None = None,
    moved_states: int = 0,
) -> float:
    """Bytes that a step moves: layers, of routed experts those that some token is sent to, final norm, lm_head, an
    embedding row a token, and the KV cache.

    Args:
        tokens: of all sequences together.
        kv_tokens: tokens whose keys and values are read or written.
        element_bytes: of a weight and of the cache; 2 for bfloat16.
        tensor_bytes: of every tensor of a quantized model, by name, in place of `element_bytes` a weight. lm_head and
            embeddings are not quantized.
        moved_states: how often the states of linear attention, of a sequence in all layers, are read or written.
    """
    indices = range(len(geometry.layers))
    if tensor_bytes is None:
        layers = geometry.num_layer_parameters * element_bytes
        routed = {index: routed_weights(geometry, index) * element_bytes for index in indices}
    else:
        layers = sum(layer_bytes(tensor_bytes).values())
        routed = layer_bytes({name: size for name, size in tensor_bytes.items() if _ROUTED.search(name)})
    unread = sum(routed[index] * (1 - chosen_share(geometry, index)) ** tokens for index in indices)
    lm_head = geometry.vocab_size * geometry.hidden_size  # read whole where it is tied to the embeddings, too
    embedding_rows = tokens * geometry.hidden_size
    kv_cache = kv_tokens * geometry.kv_cache_bytes_per_token(element_bytes)
    states = moved_states * geometry.state_bytes_per_sequence(element_bytes)
    return layers - unread + (geometry.hidden_size + lm_head + embedding_rows) * element_bytes + kv_cache + states


def layer_bytes(tensor_bytes: Mapping[str, int]) -> Counter[int]:
    """Bytes of the tensors of each layer, by its number; of every tensor they are given by name."""
    found = Counter[int]()
    for name, size in tensor_bytes.items():
        if layer := _LAYER.match(name):
            found[int(layer[1])] += size
    return found


def sequence_flops(geometry: ModelGeometry, tokens: int, attended_pairs: float) -> float:
    """Floating-point operations of a step for one sequence: 2 per token and weight, of routed experts those that the
    token is sent to, causal attention, linear attention, and lm_head for the last position only, which is all that vLLM
    computes.

    Args:
        tokens: of the sequence that the step computes; 1 in decode.
        attended_pairs: of a token and one that it attends to.
    """
    heads, weights, states = 0, 0.0, 0
    for index, layer in enumerate(geometry.layers):
        shapes = geometry.layer_tensor_shapes(index).values()
        weights += sum(math.prod(shape) for shape in shapes if len(shape) == 2)
        weights -= routed_weights(geometry, index) * (1 - chosen_share(geometry, index))
        heads += layer.num_attention_heads
        if layer.linear_attention:
            states += geometry.gated_delta_net.flops_per_token
    numbers = 2 * geometry.head_dim  # of a head that q k^T and p v multiply
    if geometry.latent is not None:
        numbers = geometry.latent.qk_head_dim + geometry.latent.v_head_dim
    attention = 2 * heads * numbers * attended_pairs
    lm_head = 2 * geometry.vocab_size * geometry.hidden_size
    return (2 * weights + states) * tokens + attention + lm_head


def routed_weights(geometry: ModelGeometry, index: int) -> int:
    """Weights of all routed experts of a layer, three matrices each; 0 in a layer without experts."""
    return 3 * geometry.hidden_size * sum(geometry.layers[index].expert_intermediate_sizes)


def chosen_share(geometry: ModelGeometry, index: int) -> float:
    """The share of a layer's routed experts that one token is sent to; 1 in a layer without experts."""
    count = len(geometry.layers[index].expert_intermediate_sizes)
    return geometry.dense_experts.num_experts_per_tok / count if count else 1.0
