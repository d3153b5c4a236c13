"""A mixture-of-experts block whose routed experts have widths of their own, stored and computed without padding.

The router, its top-k and the shared experts are vLLM's. The routed experts' rows lie one expert after the other:
gate and up [2, rows, hidden_size], down [rows, hidden_size] (transposed), expert e from offsets[e] to offsets[e + 1].
One custom op computes them, so that torch.compile and CUDA graphs see a single node. Where all experts of a layer have
the same width, they are vLLM's own FusedMoE.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.llama import LlamaMLP
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)

from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.serving.layout_changes import DOWN, GATE, UP
from pruned_vllm.serving.sharding import has_ragged_experts, shard_experts


class MoEBlock(nn.Module):
    """What stands in a decoder layer's `mlp`: router, routed experts, and shared experts where the family has them."""

    def __init__(self, vllm_config: VllmConfig, geometry: ModelGeometry, layer: LayerGeometry, prefix: str) -> None:
        super().__init__()
        ranks = vllm_config.parallel_config.tensor_parallel_size
        experts, hidden_size = geometry.dense_experts, geometry.hidden_size
        self.ranks = ranks
        self.gate = GateLinear(hidden_size, experts.num_experts, prefix=f"{prefix}.gate")
        top_k = experts.num_experts_per_tok
        self.is_stock = not has_ragged_experts(layer, ranks)
        if self.is_stock:
            self.experts = FusedMoEFactory(
                num_experts=experts.num_experts,
                top_k=top_k,
                hidden_size=hidden_size,
                intermediate_size=layer.expert_width,
                renormalize=experts.norm_topk_prob,
                quant_config=vllm_config.quant_config,
                reduce_results=False,
                prefix=f"{prefix}.experts",
                ckpt_names=(GATE, DOWN, UP),
            )
        else:
            self.router = create_fused_moe_router(
                top_k=top_k, global_num_experts=experts.num_experts, renormalize=experts.norm_topk_prob
            )
            self.experts = RaggedExperts(
                vllm_config, layer.expert_intermediate_sizes, hidden_size, prefix=f"{prefix}.experts"
            )
        self.shared = None
        names = geometry.family.experts_format
        if experts.shared_intermediate_size and names.shared_module is not None:
            self.shared = names.shared_module.removeprefix("mlp.")
            shared = LlamaMLP(
                hidden_size,
                -(-experts.shared_intermediate_size // ranks) * ranks,
                "silu",
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.{self.shared}",
                reduce_results=False,
            )
            self.add_module(self.shared, shared)
        self.shared_gate = None
        if names.shared_gate is not None:
            self.shared_gate = names.shared_gate.removeprefix("mlp.")
            gate = ReplicatedLinear(hidden_size, 1, bias=False, prefix=f"{prefix}.{self.shared_gate}")
            self.add_module(self.shared_gate, gate)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden_size] -> the same."""
        router_logits, _ = self.gate(hidden_states)
        if self.is_stock:
            output = self.experts(hidden_states, router_logits)
        else:
            topk_weights, topk_ids = self.router.select_experts(hidden_states, router_logits)
            output = self.experts(hidden_states, topk_weights, topk_ids)
        if self.shared is not None:
            shared = getattr(self, self.shared)(hidden_states)
            if self.shared_gate is not None:
                weight, _ = getattr(self, self.shared_gate)(hidden_states)
                shared = torch.sigmoid(weight) * shared
            output = output + shared
        return tensor_model_parallel_all_reduce(output) if self.ranks > 1 else output


class RaggedExperts(nn.Module):
    """The routed experts of one rank, which holds a run of each expert's channels.

    Args:
        widths: FFN channels of each expert on all ranks together; 0 is an expert that outputs zeros.
        prefix: the module's name, by which the custom op finds it.
    """

    offsets: torch.Tensor  # int32 [experts + 1]

    def __init__(self, vllm_config: VllmConfig, widths: tuple[int, ...], hidden_size: int, prefix: str) -> None:
        super().__init__()
        ranks = vllm_config.parallel_config.tensor_parallel_size
        self.channels = shard_experts(widths, ranks)[get_tensor_model_parallel_rank() if ranks > 1 else 0]
        local_widths = [len(channels) for channels in self.channels]
        self.max_width = max(local_widths)
        self.starts = [0, *accumulate(local_widths)]
        rows = self.starts[-1]
        # Without a channel there is nothing to load, and vLLM wants every parameter loaded.
        make: Callable[[torch.Tensor], Any] = (
            partial(nn.Parameter, requires_grad=False) if rows else lambda weight: None
        )
        self.gate_up, self.down = make(torch.empty(2, rows, hidden_size)), make(torch.empty(rows, hidden_size))
        self.register_buffer("offsets", torch.tensor(self.starts, dtype=torch.int32), persistent=False)
        self.layer_name = prefix
        context = vllm_config.compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"{prefix}: a layer of this name exists already")
        context[prefix] = self

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        """Takes this rank's channels of "{expert}.w1.weight" (gate), "w3" (up) and "w2" (down)."""
        for name, tensor in weights:
            expert, projection, _ = name.split(".")
            channels = self.channels[int(expert)]
            if not channels:
                continue
            rows = slice(self.starts[int(expert)], self.starts[int(expert) + 1])
            if projection == DOWN:
                self.down.data[rows].copy_(tensor[:, channels.start : channels.stop].T)
                yield "down"
            else:
                self.gate_up.data[(GATE, UP).index(projection), rows].copy_(tensor[channels.start : channels.stop])
                yield "gate_up"

    def forward(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden_size], top-k [tokens, k] -> this rank's part of the output [tokens, hidden_size]."""
        return torch.ops.vllm.pruned_ragged_moe(x, topk_weights, topk_ids, _encode_layer_name(self.layer_name))

    def compute(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """What the custom op does."""
        if not self.max_width:
            return torch.zeros_like(x)
        if x.is_cpu:
            from pruned_vllm.kernels.ragged_moe_cpu import ragged_moe
        else:
            from pruned_vllm.kernels.ragged_moe_triton import ragged_moe
        return ragged_moe(x, self.gate_up, self.down, self.offsets, topk_weights, topk_ids, self.max_width)


# vLLM's own type for names of layers: torch.compile makes them inputs of the graph, where a string would be a constant
# in it and no two layers would share one.
def _ragged_moe(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: LayerNameType
) -> torch.Tensor:
    layer = get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]
    return layer.compute(x, topk_weights, topk_ids)


def _ragged_moe_fake(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: LayerNameType
) -> torch.Tensor:
    return torch.empty_like(x)


direct_register_custom_op("pruned_ragged_moe", _ragged_moe, fake_impl=_ragged_moe_fake)
