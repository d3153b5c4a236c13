"""The models of a sweep, as config.json of the dense one, and what the DDP paper printed about its own. Pure Python."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from bench.scale import QWEN3_MOE

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-06,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
MOE = {**QWEN3_MOE, "architectures": ["Qwen3MoeForCausalLM"], "max_position_embeddings": 4096}
HEAD_DIM = 64
GROUP = 4  # query heads of a KV head under GQA
SMALLEST_HIDDEN_SIZE = GROUP * HEAD_DIM  # and the step between sizes


def grid_shapes(hidden_size: int | None, num_hidden_layers: int | None) -> dict[str, dict]:
    """config.json by kind. Without sizes about half a billion parameters each, as bench.scale makes them."""
    dense, experts = hidden_size or 1536, hidden_size or 1024
    heads = {"head_dim": HEAD_DIM, "num_attention_heads": dense // HEAD_DIM}
    llama = LLAMA | heads | {"hidden_size": dense, "num_hidden_layers": num_hidden_layers or 16}
    llama["intermediate_size"] = -(-dense * 8 // 3 // 256) * 256
    moe = MOE | {
        "hidden_size": experts,
        "num_hidden_layers": num_hidden_layers or 8,
        "head_dim": HEAD_DIM,
        "num_attention_heads": experts // HEAD_DIM,
        "num_key_value_heads": experts // HEAD_DIM,
        "vocab_size": 32000,
        "intermediate_size": -(-experts * 8 // 3 // 256) * 256,
        "moe_intermediate_size": experts // 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
    }
    return {
        "MHA": llama | {"num_key_value_heads": dense // HEAD_DIM},
        "GQA": llama | {"num_key_value_heads": dense // HEAD_DIM // GROUP},
        "MoE": moe,
    }


class Printed(NamedTuple):
    """What the paper printed of a model: requests per second over those of the dense model, by sparsity in percent."""

    where: str
    device: str
    speedups: Mapping[int, float]


def _llama(hidden_size: int, num_hidden_layers: int, num_heads: int, intermediate_size: int) -> dict:
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers, "intermediate_size": intermediate_size}
    heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_heads, "head_dim": hidden_size // num_heads}
    return LLAMA | sizes | heads


PAPER = "DDP (arXiv 2603.08065v1)"
PAPER_SPARSITIES = (20, 40, 50, 60)
# Sizes are those of the models' config.json on the hub.
PAPER_SHAPES: dict[str, dict] = {
    "LLaMA-7B": _llama(4096, 32, 32, 11008),
    "LLaMA-13B": _llama(5120, 40, 40, 13824),
    "Qwen3-32B": {
        **LLAMA,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "intermediate_size": 25600,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
    },
    "Qwen3-30B-A3B": {**MOE, "num_hidden_layers": 48, "moe_intermediate_size": 768},
}
# Requests per second of 1,000 ShareGPT prompts under vLLM. The paper prints no speed of Qwen3-32B.
PRINTED = {
    "LLaMA-7B": Printed("Table 7", "RTX 5090", {20: 1.36, 50: 2.20}),
    "LLaMA-13B": Printed("Table 7", "B200", {20: 1.18, 50: 1.42}),
    "Qwen3-30B-A3B": Printed("Table 8", "B200", {20: 1.11, 40: 1.25, 60: 1.51}),
}
