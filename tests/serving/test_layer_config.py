"""What stock models and layers are built from: copies of vLLM's configuration that say the sizes of one layer."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.quantization import resolve_quantization_config
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, resolve_quant_method
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.serving.base import PARTITION, _without_layers
from pruned_vllm.serving.layer_config import layer_config
from pruned_vllm.serving.model_layout import ModelLayout

CONFIG = {
    "model_type": "llama",
    "architectures": ["PrunedLlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 96,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 32,
    "attention_bias": True,
    "allow_global_per_layer_attribute_access": True,
    "query_heads_per_kv_head": None,
    "per_layer_config": {
        "0": {"num_attention_heads": 3, "num_key_value_heads": 2, "query_heads_per_kv_head": [2, 1]},
        "1": {"skip": ["attention"], "intermediate_size": 7},
        "2": {"skip": ["mlp"], "num_attention_heads": 5, "num_key_value_heads": 5},
    },
}
LINEAR = LinearBase.__new__(LinearBase)
nn.Module.__init__(LINEAR)


class Stored(QuantizationConfig):
    """Of a checkpoint that is not quantized, on which --quantization-config may quantize."""

    def get_quant_method(self, layer, prefix):
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    get_name = get_supported_act_dtypes = get_min_capability = get_config_filenames = from_config = None


def model(quant_config: QuantizationConfig | None = None) -> SimpleNamespace:
    config = AutoConfig.for_model(**CONFIG)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config, hf_text_config=config), quant_config=quant_config
    )


@pytest.mark.parametrize(
    ("ranks", "index", "sizes"),
    [
        (1, 0, (4, 2, 100)),  # as the attention op sees them
        (1, 1, (1, 1, 7)),
        (1, 2, (5, 5, 1)),
        (2, 0, (4, 2, 100)),
        (2, 1, (2, 2, 8)),
        (2, 2, (6, 6, 2)),
    ],
)
def test_a_layers_sizes(ranks, index, sizes):
    """Padding included; of what is exchanged one head or channel on each rank."""
    vllm_config = model()
    before = copy.deepcopy(vllm_config.model_config.hf_config.to_dict())
    layout = ModelLayout.from_geometry(ModelGeometry.from_config(CONFIG), ranks)
    config = layer_config(vllm_config, layout, index, []).model_config.hf_config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == sizes
    assert (config.head_dim, config.qkv_bias, config.attention_bias, config.mlp_bias) == (32, True, True, False)
    assert not config.is_heterogeneous and config.vocab_size == 256
    assert vllm_config.model_config.hf_config.to_dict() == before


@pytest.fixture
def bfloat16():
    vllm_config = VllmConfig()
    vllm_config.model_config = SimpleNamespace(dtype=torch.bfloat16)
    with set_current_vllm_config(vllm_config):
        yield


@pytest.mark.usefixtures("bfloat16")
def test_what_is_exchanged_is_not_quantized():
    online = OnlineQuantizationConfig(resolve_quantization_config("fp8_per_channel", {}))
    stored = Stored()
    stored.online_quantization_config = online
    layout = ModelLayout.from_geometry(ModelGeometry.from_config(CONFIG), 1)
    for quant_config in (online, stored):
        own = layer_config(model(quant_config), layout, 1, ["model.layers.1.self_attn"]).quant_config
        assert isinstance(own, type(quant_config))
        for name, is_exchanged in {
            "self_attn.qkv_proj": True,
            "self_attn.o_proj": True,
            "mlp.down_proj": False,
        }.items():
            method = resolve_quant_method(own, LINEAR, f"model.layers.1.{name}")
            assert isinstance(method, UnquantizedLinearMethod) == is_exchanged, name
        assert resolve_quant_method(own, nn.Module(), "model.layers.1.self_attn.attn") is None
        assert not isinstance(resolve_quant_method(quant_config, LINEAR, "model.layers.1.self_attn.o_proj"),
                              UnquantizedLinearMethod)  # fmt: skip
    assert layer_config(model(online), layout, 0, []).quant_config is online


def test_a_model_is_built_without_layers_whatever_the_borders_of_pipeline_stages(monkeypatch):
    monkeypatch.setenv(PARTITION, "2,1")
    config = AutoConfig.for_model(**CONFIG)
    with pytest.raises(RuntimeError), _without_layers(config, vocab_size=64):
        assert config.vocab_size == 64 and get_pp_indices(config.num_hidden_layers, 1, 2) == (0, 0)
        raise RuntimeError
    assert config.vocab_size == 256 and get_pp_indices(config.num_hidden_layers, 1, 2) == (2, 3)
