"""What a step must read and compute, and what a pruned model could gain at best. Pure Python.

Decode is bound by memory: a step reads every weight once and the keys and values of every sequence in the batch.
Prefill is bound by arithmetic. The ideal speedup of a case is the dense model's cost over the pruned model's; it
counts what pruning cannot touch (lm_head, embedding rows, norms, routers, shared experts), so it is what a perfect
runtime would reach.

Of routed experts it counts what tokens need on average if a router sends each to k different ones of E, every choice as
likely as any other: a step of T tokens reads a share 1 - (1 - k/E)^T of them, and a token passes a share k/E. Trained
routers prefer some experts, and tokens of one text resemble each other: a real batch reads fewer.

    case = Case.parse("decode:8:32:64")
    ideal_speedup(dense_geometry, pruned_geometry, case, element_bytes=2)
"""

import math
from dataclasses import dataclass

from pruned_vllm.formats.geometry import ModelGeometry


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        kind: "decode" (from the first output token to the last) or "prefill" (the prompt, up to its one token).
        batch_size: sequences that run together.
        input_len, output_len: tokens per sequence.
    """

    kind: str
    batch_size: int
    input_len: int
    output_len: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Reads "decode:BATCH:INPUT:OUTPUT" or "prefill:BATCH:INPUT". Raises ValueError with what is wrong."""
        kind, *numbers = text.split(":")
        if len(numbers) != {"decode": 3, "prefill": 2}.get(kind) or not all(map(str.isdecimal, numbers)):
            raise ValueError(f"{text!r} is neither decode:BATCH:INPUT:OUTPUT nor prefill:BATCH:INPUT")
        batch_size, input_len, output_len = map(int, numbers if kind == "decode" else [*numbers, "1"])
        case = cls(kind, batch_size, input_len, output_len)
        if min(case.batch_size, case.input_len) < 1:
            raise ValueError(f"{text!r}: BATCH and INPUT must be at least 1")
        if kind == "decode" and case.output_len < 2:
            raise ValueError(f"{text!r}: OUTPUT must be at least 2, the first token belongs to the prefill")
        return case

    @property
    def name(self) -> str:
        sizes = f"{self.kind}:{self.batch_size}:{self.input_len}"
        return f"{sizes}:{self.output_len}" if self.kind == "decode" else sizes

    @property
    def num_steps(self) -> int:
        """Steps of the timed part."""
        return self.output_len - 1 if self.kind == "decode" else 1

    @property
    def mean_context(self) -> float:
        """Tokens that the average decode step attends to: step k of them to the input and k generated tokens."""
        return self.input_len + self.output_len / 2

    @property
    def num_timed_tokens(self) -> int:
        """Tokens of the batch in the timed part: generated ones in decode, those of the prompts in prefill."""
        return self.batch_size * (self.num_steps if self.kind == "decode" else self.input_len)


def ideal_speedup(dense: ModelGeometry, pruned: ModelGeometry, case: Case, element_bytes: int) -> float:
    """Cost of the dense model over that of the pruned one; `element_bytes` is 2 for bfloat16."""
    if case.kind == "decode":
        return step_bytes(dense, case, element_bytes) / step_bytes(pruned, case, element_bytes)
    return step_flops(dense, case) / step_flops(pruned, case)


def step_bytes(geometry: ModelGeometry, case: Case, element_bytes: int) -> float:
    """Bytes that the average step of the timed part moves: layers, of routed experts those that some token is sent to,
    final norm, lm_head, an embedding row a token, and the KV cache: in decode what a step reads of every sequence, in
    prefill what it writes."""
    decode = case.kind == "decode"
    tokens = case.batch_size * (1 if decode else case.input_len)
    unread = routed_weights(geometry) * (1 - chosen_share(geometry)) ** tokens
    layers = geometry.num_layer_parameters - unread
    lm_head = geometry.vocab_size * geometry.hidden_size  # read whole where it is tied to the embeddings, too
    embedding_rows = tokens * geometry.hidden_size
    kv_tokens = case.batch_size * (case.mean_context if decode else case.input_len)
    kv_cache = kv_tokens * geometry.kv_cache_bytes_per_token(element_bytes)
    return (layers + geometry.hidden_size + lm_head + embedding_rows) * element_bytes + kv_cache


def step_flops(geometry: ModelGeometry, case: Case) -> float:
    """Floating-point operations of the average step of the timed part: 2 per token and weight, of routed experts those
    that the token is sent to, causal attention, and lm_head for the last position of each sequence only, which is all
    that vLLM computes."""
    heads, weights = 0, -routed_weights(geometry) * (1 - chosen_share(geometry))
    for index, layer in enumerate(geometry.layers):
        shapes = geometry.layer_tensor_shapes(index).values()
        weights += sum(math.prod(shape) for shape in shapes if len(shape) == 2)
        heads += layer.num_attention_heads
    if case.kind == "decode":
        tokens, attended_pairs = 1, case.mean_context
    else:
        tokens, attended_pairs = case.input_len, case.input_len * (case.input_len + 1) // 2
    attention = 2 * 2 * heads * geometry.head_dim * attended_pairs  # q k^T and p v
    lm_head = 2 * geometry.vocab_size * geometry.hidden_size
    return case.batch_size * (2 * weights * tokens + attention + lm_head)


def routed_weights(geometry: ModelGeometry) -> int:
    """Weights of all routed experts, three matrices each; 0 in a model without experts."""
    return 3 * geometry.hidden_size * sum(sum(layer.expert_intermediate_sizes) for layer in geometry.layers)


def chosen_share(geometry: ModelGeometry) -> float:
    """The share of a layer's routed experts that one token is sent to; 1 in a model without experts."""
    experts = geometry.experts
    return experts.num_experts_per_tok / experts.num_experts if experts else 1.0
