"""OLMoE with its own width for every expert. Its heads stay: q and k are normalised over all of them together."""

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.olmoe import OlmoeAttention

from pruned_vllm.errors import InputError
from pruned_vllm.geometry import ModelGeometry
from pruned_vllm.models.base import PrunedForCausalLM
from pruned_vllm.models.layer import PrunedDecoderLayer


class PrunedOlmoeDecoderLayer(PrunedDecoderLayer):
    def build_attention(
        self, vllm_config: VllmConfig, geometry: ModelGeometry, prefix: str, num_heads: int, num_kv_heads: int
    ) -> nn.Module:
        if geometry.layers[0].num_attention_heads != num_heads:
            raise InputError(
                f"{prefix}: OLMoE normalises q and k over all heads together, so none can be padded; choose a "
                f"--tensor-parallel-size that divides {geometry.layers[0].num_attention_heads} heads"
            )
        if getattr(vllm_config.model_config.hf_config, "clip_qkv", None) is not None:
            raise InputError(f"{prefix}: config.json has clip_qkv, which vLLM's OLMoE leaves out; it cannot be served")
        return OlmoeAttention(vllm_config=vllm_config, prefix=prefix)


class PrunedOlmoeForCausalLM(PrunedForCausalLM):
    decoder_layer_type = PrunedOlmoeDecoderLayer
