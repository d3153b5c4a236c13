"""Adapters that do not fit are named by module; `test_features.py` has them in an engine."""

import pytest
import torch
from helpers.tiny import tiny_model
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights

from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.serving.lora import check_adapter


def adapter(**sizes: tuple[int, int]) -> LoRAModel:
    """An adapter of rank 4 for modules of [outputs, inputs]; "__" in a name stands for "."."""
    loras = {}
    for key, (outputs, inputs) in sizes.items():
        name = key.replace("__", ".")
        loras[name] = LoRALayerWeights(name, 4, 8, torch.zeros(4, inputs), torch.zeros(outputs, 4))
    return LoRAModel(1, 4, loras)


def geometry(model_type: str) -> ModelGeometry:
    model = tiny_model(model_type, 6, 6, 24)
    return ModelGeometry.from_config(model.config.to_dict() | {"architectures": [type(model).__name__]})


def test_experts_and_renamed_routers_are_not_left_out_without_a_word():
    """vLLM skips what it has no layer for: experts of different widths, and what it calls otherwise."""
    targets = {"model.layers.0.self_attn.q_proj"}
    lora = adapter(
        model__layers__0__self_attn__q_proj=(192, 96),
        model__layers__0__block_sparse_moe__gate=(4, 96),
        model__layers__0__block_sparse_moe__experts__1__w1=(24, 96),
    )
    with pytest.raises(ValueError, match="does not fit the pruned model in 2 modules") as error:
        check_adapter(lora, geometry("mixtral"), targets)
    assert "block_sparse_moe.gate: vLLM applies no adapter to this module" in str(error.value)
    assert "block_sparse_moe.experts.1.w1: vLLM applies no adapter to this module" in str(error.value)


def test_names_without_prefix_and_those_of_vllm_pass():
    """Pooling models are trained without "model."; vLLM warms up with adapters of its fused layers."""
    targets = {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.qkv_proj"}
    lora = adapter(layers__0__self_attn__q_proj=(192, 96), model__layers__0__self_attn__qkv_proj=(1, 1))
    check_adapter(lora, geometry("llama"), targets)
    with pytest.raises(ValueError, match=r"q_proj: the adapter is for \[191, 96\], the pruned model has \[192, 96\]"):
        check_adapter(adapter(layers__0__self_attn__q_proj=(191, 96)), geometry("llama"), targets)
