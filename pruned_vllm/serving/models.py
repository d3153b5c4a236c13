"""The served classes: one table from architecture to the attention that its decoder layers are built with.

vLLM finds a class here by the name of its architecture, `PrunedLlamaForCausalLM` and so on; everything but the
attention is common to all families (`layer.py`, `base.py`).
"""

from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.serving.attention import (
    AttentionBuilder,
    build_llama_attention,
    build_mistral_attention,
    build_olmoe_attention,
    build_qwen3_attention,
)
from pruned_vllm.serving.base import PrunedForCausalLM

ATTENTION_BUILDERS: dict[str, AttentionBuilder] = {
    "llama": build_llama_attention,
    "mistral": build_mistral_attention,
    "qwen2": build_llama_attention,
    "qwen3": build_qwen3_attention,
    "mixtral": build_llama_attention,
    "qwen2_moe": build_llama_attention,
    "qwen3_moe": build_qwen3_attention,
    "olmoe": build_olmoe_attention,
    "deepseek": build_llama_attention,
}

for _model_type, _builder in ATTENTION_BUILDERS.items():
    _family = FAMILIES[_model_type]
    _members = {"build_attention": staticmethod(_builder), "__module__": __name__}
    globals()[_family.pruned_architecture] = type(_family.pruned_architecture, (PrunedForCausalLM,), _members)
