"""How the tensors of a checkpoint change on their way into layers that tensor parallelism has laid out anew."""

from collections.abc import Iterator

import torch

from pruned_vllm.common.padding import PAD, head_rows
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.serving.model_layout import ModelLayout
from pruned_vllm.serving.sharding import LayerLayout

# The dimension, and the index of what it holds afterwards (PAD: zeros). On the CPU, where files are read, whatever
# device vLLM is building the model under.
Change = tuple[int, torch.Tensor]

GATE, UP, DOWN = "w1", "w3", "w2"  # an expert's projections, as its module calls them


def layout_changes(layout: ModelLayout) -> dict[str, Change]:
    """The change of every tensor that stock layers would not shard as its layer's layout says, by full name."""
    geometry = layout.geometry
    changes: dict[str, Change] = {}
    shared: dict[LayerGeometry, dict[str, Change]] = {}  # equal layers change alike: one index in memory
    for number, (layer, layer_layout) in enumerate(zip(geometry.layers, layout.layers, strict=True)):
        if layer not in shared:
            shared[layer] = dict(_layer_changes(layer, layer_layout, geometry.head_dim))
            if layer.expert_intermediate_sizes and geometry.dense_experts.shared_intermediate_size:
                shared[layer] |= _shared_experts_changes(geometry, layout.ranks)
        changes |= {f"model.layers.{number}.{name}": change for name, change in shared[layer].items()}
    return changes


def _layer_changes(layer: LayerGeometry, layout: LayerLayout, head_dim: int) -> Iterator[tuple[str, Change]]:
    if layout.query_index != list(range(layer.num_attention_heads)):
        query_rows = head_rows(layout.query_index, head_dim)
        yield from _rows("self_attn.q_proj", query_rows)
        yield "self_attn.o_proj.weight", (1, query_rows)
    if layout.kv_replicas == 1 and layout.kv_index != list(range(layer.num_key_value_heads)):
        kv_rows = head_rows(layout.kv_index, head_dim)
        yield from _rows("self_attn.k_proj", kv_rows)
        yield from _rows("self_attn.v_proj", kv_rows)
    if layout.channel_index != list(range(layer.intermediate_size)):
        channels = torch.tensor(layout.channel_index, device="cpu")
        yield from _rows("mlp.gate_proj", channels)
        yield from _rows("mlp.up_proj", channels)
        yield "mlp.down_proj.weight", (1, channels)


def _shared_experts_changes(geometry: ModelGeometry, tensor_parallel_size: int) -> dict[str, Change]:
    width, module = geometry.dense_experts.shared_intermediate_size, geometry.family.experts_format.shared_module
    if width % tensor_parallel_size == 0:
        return {}
    channels = torch.full((-(-width // tensor_parallel_size) * tensor_parallel_size,), PAD, device="cpu")
    channels[:width] = torch.arange(width, device="cpu")
    rows = dict(_rows(f"{module}.gate_proj", channels)) | dict(_rows(f"{module}.up_proj", channels))
    return rows | {f"{module}.down_proj.weight": (1, channels)}


def module_names(geometry: ModelGeometry) -> dict[str, str]:
    """Where tensors go whose name in the checkpoint is not that of the module: routers and routed experts.

    An expert's projections become w1 (gate), w3 (up) and w2 (down) in every family, as Mixtral has them: vLLM's mapping
    of stacked weights takes every gate_proj for a part of a gate_up_proj.
    """
    names: dict[str, str] = {}
    for number, layer in enumerate(geometry.layers):
        prefix = f"model.layers.{number}"
        for expert in range(len(layer.expert_intermediate_sizes)):
            modules = geometry.family.experts_format.modules_of(expert)
            for module, projection in zip(modules, (GATE, UP, DOWN), strict=True):
                names[f"{prefix}.{module}.weight"] = f"{prefix}.mlp.experts.{expert}.{projection}.weight"
        if layer.expert_intermediate_sizes:
            names[f"{prefix}.{geometry.family.experts_format.router}.weight"] = f"{prefix}.mlp.gate.weight"
    return names


def _rows(projection: str, index: torch.Tensor) -> Iterator[tuple[str, Change]]:
    yield f"{projection}.weight", (0, index)
    yield f"{projection}.bias", (0, index)
