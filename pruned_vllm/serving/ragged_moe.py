"""A mixture-of-experts block whose routed experts have widths of their own, stored and computed without padding.

The router, its top-k and the shared experts are vLLM's. The routed experts' weights are what `expert_weights.py` makes
of them, expert e in the rows from offsets[e] to offsets[e + 1]. One custom op computes them, so that torch.compile and
CUDA graphs see a single node. Where all experts of a layer have the same width, they are vLLM's own FusedMoE, unless
they are quantized and vLLM computes on a CPU, or have biases or an activation other than silu.

Experts may be quantized (`expert_scheme.py`). Their inputs are not, also where the scheme asks for that, but for large
batches of float8_e4m3fn on a GPU: the results are closer to the 16-bit model, and a line of the log says so.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.llama import LlamaMLP
from vllm.platforms import current_platform
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)

from pruned_vllm.kernels.ragged_moe_arguments import SILU, Activation, Biases, Scales
from pruned_vllm.serving.expert_scheme import ExpertScheme, expert_scheme, has_own_experts
from pruned_vllm.serving.expert_weights import (
    make_biases,
    make_parameters,
    parameter_name,
    place_experts,
    quantized,
    rank_scale,
    rank_weight,
    target_of,
)
from pruned_vllm.serving.layout_changes import DOWN, GATE, UP
from pruned_vllm.serving.model_layout import ModelLayout
from pruned_vllm.serving.moe_router import build_router, router_arguments
from pruned_vllm.serving.sharding import shard_experts

logger = init_logger("vllm.pruned_vllm")  # under vLLM's own logging configuration


class MoEBlock(nn.Module):
    """What stands in a decoder layer's `mlp`: router, routed experts, and shared experts where the family has them."""

    def __init__(self, vllm_config: VllmConfig, layout: ModelLayout, index: int, prefix: str) -> None:
        super().__init__()
        geometry, ranks = layout.geometry, layout.ranks
        layer, experts, hidden_size = geometry.layers[index], geometry.dense_experts, geometry.hidden_size
        scheme_arguments = vllm_config.model_config, geometry, layout.quantization, index
        self.ranks = ranks
        num_experts, top_k = len(layer.expert_intermediate_sizes), experts.num_experts_per_tok
        names = geometry.family.experts_format
        router_dtype = torch.float32 if names.float32_router else None
        self.gate = GateLinear(
            hidden_size,
            num_experts,
            bias=names.router_bias,
            out_dtype=router_dtype,
            params_dtype=router_dtype,
            prefix=f"{prefix}.gate",
        )
        routing: dict[str, Any] = {
            "renormalize": experts.norm_topk_prob,
            "scoring": names.scoring,
            "num_expert_group": experts.num_expert_group,
            "topk_group": experts.topk_group,
            "routed_scaling_factor": experts.routed_scaling_factor,
        }
        if names.correction_bias is not None:
            bias = nn.Parameter(torch.empty(num_experts, dtype=torch.float32), requires_grad=False)
            self.gate.register_parameter(names.correction_bias, bias)
            routing["correction_bias"] = bias
        self.is_stock = not has_own_experts(*scheme_arguments, ranks)
        if self.is_stock:
            self.experts = FusedMoEFactory(
                num_experts=num_experts,
                top_k=top_k,
                hidden_size=hidden_size,
                intermediate_size=layer.expert_width,
                quant_config=vllm_config.quant_config,
                reduce_results=False,
                prefix=f"{prefix}.experts",
                ckpt_names=(GATE, DOWN, UP),
                router_logits_dtype=router_dtype,
                **router_arguments(top_k, num_experts, **routing),
            )
        else:
            self.router = build_router(top_k, num_experts, **routing)
            self.experts = RaggedExperts(
                vllm_config,
                layer.expert_intermediate_sizes,
                hidden_size,
                prefix=f"{prefix}.experts",
                scheme=expert_scheme(*scheme_arguments),
                activation=Activation(names.activation),
                has_biases=names.bias,
                has_constants=bool(layer.constant_experts),
            )
        self.shared = None
        if (channels := layout.layers[index].channels) and names.shared_module is not None:
            self.shared = names.shared_module.removeprefix("mlp.")
            shared = LlamaMLP(
                hidden_size,
                channels * ranks,
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
        widths: FFN channels of each expert on all ranks together; 0 is an expert that outputs zeros, or its bias.
        prefix: the module's name, by which the custom op finds it.
        scheme: how they are quantized; None if they are not.
        activation: what a channel makes of its gate and up.
        has_biases: whether their projections have biases.
        has_constants: whether some experts without channels output a bias although the family has none.
    """

    gate_up: nn.Parameter
    down: nn.Parameter
    gate_up_scale: nn.Parameter
    down_scale: nn.Parameter
    offsets: torch.Tensor  # int32 [experts + 1]
    down_offsets: torch.Tensor  # int32 [experts + 1], in runs of scales

    def __init__(
        self,
        vllm_config: VllmConfig,
        widths: tuple[int, ...],
        hidden_size: int,
        prefix: str,
        scheme: ExpertScheme | None = None,
        activation: Activation = SILU,
        has_biases: bool = False,
        has_constants: bool = False,
    ) -> None:
        super().__init__()
        ranks = vllm_config.parallel_config.tensor_parallel_size
        rank = get_tensor_model_parallel_rank() if ranks > 1 else 0
        quantum = scheme.group_size or 1 if scheme is not None else 1
        channels = shard_experts(widths, ranks, quantum)[rank]
        self.scheme, self.hidden_size, self.widths = scheme, hidden_size, widths
        self.activation, self.has_biases = activation, has_biases or has_constants
        self.places = place_experts(channels, scheme)
        self.max_width = max(map(len, channels))
        parameters = make_parameters(self.places, hidden_size, scheme)
        if has_biases:
            parameters |= make_biases(self.places, hidden_size, rank)
        elif has_constants and rank == 0:  # other experts have no such bias in the checkpoint
            zeros = torch.zeros(len(widths), hidden_size, dtype=torch.float32)
            parameters["down_bias"] = nn.Parameter(zeros, requires_grad=False)
        for name, parameter in parameters.items():
            parameter.weight_loader = self.load_part  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)
        for name, ends in (
            ("offsets", [place.rows.stop for place in self.places]),
            ("down_offsets", [place.runs.stop for place in self.places]),
        ):
            self.register_buffer(name, torch.tensor([0, *ends], dtype=torch.int32), persistent=False)
        self.quantize_input = (
            scheme is not None and scheme.quantizes_input and scheme.number == "fp8" and not current_platform.is_cpu()
        )
        if scheme is not None:
            logger.info_once("Experts of different widths: %s%s", scheme, self._note())
        self.layer_name = prefix
        self.kernel: Callable | None = None  # on a CPU, for weights at these addresses
        self.addresses: list[int] = []
        context = vllm_config.compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"{prefix}: a layer of this name exists already")
        context[prefix] = self

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        """Takes this rank's channels of "{expert}.w1.weight" (gate), "w3" (up) and "w2" (down), and of their scales
        and biases.

        16-bit weights of experts that are to be quantized become int8 or float8 on the spot. A scale of down_proj is
        that of the whole row, whatever part of it the rank holds.
        """
        for name, tensor in weights:
            expert, projection, part = name.split(".")
            place = self.places[int(expert)]
            loaded = parameter_name(projection, part, self.has_biases)
            is_held = hasattr(self, loaded) if loaded == "down_bias" else bool(place.channels)
            if loaded is None or not is_held:
                continue
            values = {loaded: tensor}
            if part == "weight" and self.scheme is not None and self.scheme.is_online:
                numbers, scale = quantized(tensor, self.scheme)
                values = {loaded: numbers, f"{loaded}_scale": scale}
            for target, value in values.items():
                parameter = getattr(self, target)
                # vLLM puts a loader of its own in place of this one when it loads a model again.
                parameter.weight_loader(parameter, value, target, int(expert), projection)
                yield target

    def load_part(self, param: torch.Tensor, tensor: torch.Tensor, name: str, expert: int, projection: str) -> None:
        """Copies this rank's part of a projection of an expert, of its scale or bias, into the parameter `name`."""
        place, scheme = self.places[expert], self.scheme
        if name.endswith("_bias"):
            value = tensor if projection == DOWN else tensor[place.channels.start : place.channels.stop]
        elif scheme is not None and name.endswith("_scale"):
            outputs = self.hidden_size if projection == DOWN else self.widths[expert]
            value = rank_scale(tensor, place, projection, scheme.group_size, outputs)
        else:
            num_bits = scheme.num_bits if scheme is not None and tensor.dtype == torch.int32 else None
            value = rank_weight(tensor, place, projection, num_bits, self.hidden_size)
        target_of(name, param, place, projection).copy_(value)

    def forward(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden_size], top-k [tokens, k] -> this rank's part of the output [tokens, hidden_size]."""
        return torch.ops.vllm.pruned_ragged_moe(x, topk_weights, topk_ids, _encode_layer_name(self.layer_name))

    def compute(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """What the custom op does."""
        if not self.max_width and not hasattr(self, "down_bias"):
            return torch.zeros_like(x)
        if not x.is_cpu:
            from pruned_vllm.kernels.ragged_moe_triton import ragged_moe

            return ragged_moe(x, topk_weights=topk_weights, topk_ids=topk_ids, **self._arguments(x))
        addresses = [parameter.data_ptr() for parameter in self._parameters.values() if parameter is not None]
        if self.kernel is None or addresses != self.addresses:  # vLLM may load weights again, to another place
            from pruned_vllm.kernels.ragged_moe_cpu import RaggedMoe

            self.kernel, self.addresses = RaggedMoe(**self._arguments(x)), addresses
        return self.kernel(x, topk_weights, topk_ids)

    def _arguments(self, x: torch.Tensor) -> dict[str, Any]:
        """Those of `ragged_moe` that are the layer's: weights and what belongs to them."""
        scales, biases = None, None
        if self.has_biases:
            biases = Biases(getattr(self, "gate_up_bias", None), getattr(self, "down_bias", None))
        if not self.max_width:
            gate_up, down = x.new_empty(2, 0, self.hidden_size), x.new_empty(0, self.hidden_size)
        else:
            gate_up, down = self.gate_up, self.down
            if self.scheme is not None:
                scales = Scales(
                    self.gate_up_scale, self.down_scale, self.down_offsets, self.scheme.group_size, self.quantize_input
                )
        return {
            "gate_up": gate_up, "down": down, "offsets": self.offsets, "max_width": self.max_width, "scales": scales,
            "activation": self.activation, "biases": biases
        }  # fmt: skip

    def _note(self) -> str:
        """What a reader of the log may not expect."""
        if self.scheme is None or not self.scheme.quantizes_input or self.quantize_input:
            return ""
        return "; their inputs stay as they are, although the scheme quantizes them too"


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
