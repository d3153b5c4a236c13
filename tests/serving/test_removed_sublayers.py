"""What the plugin puts in place of a sublayer that is gone, in the `forward` of vLLM's own decoder layers.

A stock layer has to compute with it what it computes where the sublayer is masked. The table holds layers that the
plugin serves, and others: whether a family fits the mechanism shows here before anything else is built for it.
"""

import inspect
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.models.deepseek_v2 import DeepseekV2DecoderLayer
from vllm.model_executor.models.gemma3 import Gemma3DecoderLayer
from vllm.model_executor.models.glm4_moe import Glm4MoeDecoderLayer
from vllm.model_executor.models.gpt_oss import TransformerBlock
from vllm.model_executor.models.granite import GraniteDecoderLayer
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.mistral import MistralDecoderLayer
from vllm.model_executor.models.olmoe import OlmoeDecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.qwen3_next import Qwen3NextDecoderLayer
from vllm.platforms import current_platform

from pruned_vllm.serving.layer import Removed, remove_sublayer, with_own_inputs
from pruned_vllm.serving.norms import AddAndNorm

HIDDEN_SIZE, TOKENS = 32, 5
SCALE = nn.Parameter(torch.full((1, 1, HIDDEN_SIZE), 0.5), requires_grad=False)
BIAS = torch.linspace(-1, 1, HIDDEN_SIZE)


class Stock(NamedTuple):
    """A stock decoder layer: its norms, and what else its `forward` reads."""

    layer_type: type[nn.Module]
    attributes: dict = {}
    attention: str = "self_attn"
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    norm_type: type[nn.Module] = AddAndNorm


STOCK = {
    "llama": Stock(LlamaDecoderLayer),
    "mistral": Stock(MistralDecoderLayer, {"ada_rms_norm_t_cond": None}),
    "qwen3": Stock(Qwen3DecoderLayer),
    "olmoe": Stock(OlmoeDecoderLayer),
    "gemma3": Stock(
        Gemma3DecoderLayer,
        attention_norms=("input_layernorm", "post_attention_layernorm"),
        mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        norm_type=GemmaRMSNorm,
    ),
    "granite": Stock(GraniteDecoderLayer, {"residual_multiplier": 0.5}),
    "glm4_moe": Stock(Glm4MoeDecoderLayer),
    "gpt_oss": Stock(TransformerBlock, attention="attn"),
    "deepseek_v2": Stock(DeepseekV2DecoderLayer, {"use_mha": False, "use_sequence_parallel_moe": False}),
    "qwen3_next": Stock(
        Qwen3NextDecoderLayer,
        {
            "layer_type": "full_attention",
            "use_attn_reduce_scatter_for_moe": False,
            "layer_scale": True,
            "attn_layer_scale": SCALE,
            "ffn_layer_scale": SCALE,
        },
        norm_type=GemmaRMSNorm,
    ),
}


class Sublayer(nn.Module):
    """Attention or MLP: some function of the hidden states, or where it is masked its last bias alone."""

    def __init__(self, is_masked: bool, bias: torch.Tensor) -> None:
        super().__init__()
        self.is_masked, self.bias = is_masked, bias

    def forward(self, *args, **kwargs):
        hidden_states = next(value for value in (*args, *kwargs.values()) if value.is_floating_point())
        return self.bias.expand_as(hidden_states) if self.is_masked else torch.sin(3 * hidden_states) + self.bias


def make_layer(stock: Stock, masked: tuple[bool, bool], bias: torch.Tensor, is_pruned: bool) -> nn.Module:
    """A stock layer whose masked sublayers are there, or if `is_pruned` gone."""
    layer = stock.layer_type.__new__(stock.layer_type)
    nn.Module.__init__(layer)
    sublayers = ((stock.attention, stock.attention_norms), ("mlp", stock.mlp_norms))
    for (name, norms), is_masked in zip(sublayers, masked, strict=True):
        for norm in norms:
            setattr(layer, norm, stock.norm_type(HIDDEN_SIZE, eps=1e-5).requires_grad_(False))
        setattr(layer, name, Sublayer(is_masked, bias))
        if is_masked and is_pruned:
            removed = Removed("projection", HIDDEN_SIZE, has_bias=bool(bias.any()))
            for parameter in removed.parameters():
                parameter.data.copy_(bias)
            remove_sublayer(layer, name, norms, removed)
    for name, value in stock.attributes.items():
        setattr(layer, name, value)
    return layer


def run(layers: list[nn.Module], hidden_states: torch.Tensor) -> torch.Tensor:
    """The hidden states after the layers."""
    residual = None
    for layer in layers:
        arguments = {"positions": torch.arange(TOKENS), "hidden_states": hidden_states, "residual": residual}
        output = layer(*(arguments[name] for name in inspect.signature(layer.forward).parameters if name in arguments))
        hidden_states, residual = output if isinstance(output, tuple) else (output, None)
    return hidden_states if residual is None else hidden_states + residual


@pytest.fixture(scope="module", autouse=True)
def vllm_config():
    current_platform.import_kernels()
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_layer_takes_a_removed_sublayer_for_a_masked_one(name):
    """Two layers, of which any sublayers are gone: the second overwrites what the first hands on.

    The input belongs to the caller: EAGLE-3 keeps it as an auxiliary hidden state.
    """
    stock = STOCK[name]
    inputs = torch.randn(TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
    has_later_norms = len(stock.mlp_norms) > 1  # a bias that they norm is another one after pruning
    for masked, has_bias in product(product((False, True), repeat=4), {False, not has_later_norms}):
        bias = BIAS * has_bias
        halves = masked[:2], masked[2:]
        expected = run([make_layer(stock, half, bias, is_pruned=False) for half in halves], inputs.clone())
        pruned = [make_layer(stock, half, bias, is_pruned=True) for half in halves]
        pruned[0].register_forward_pre_hook(with_own_inputs, with_kwargs=True)
        mine = inputs.clone()
        torch.testing.assert_close(run(pruned, mine), expected, rtol=1e-5, atol=1e-5, msg=f"{name}, {masked}")
        assert torch.equal(mine, inputs), f"{name}, {masked}: the input is overwritten"
