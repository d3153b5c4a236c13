"""How the tensors of a checkpoint change on their way into layers that tensor parallelism has laid out anew."""

from collections.abc import Iterator

import torch

from pruned_vllm.geometry import LayerGeometry, ModelGeometry
from pruned_vllm.sharding import LayerLayout, shard_layer
from pruned_vllm.tensors import head_rows

# The dimension, and the index of what it holds afterwards (PAD: zeros). On the CPU, where files are read, whatever
# device vLLM is building the model under.
Change = tuple[int, torch.Tensor]


def layout_changes(geometry: ModelGeometry, tensor_parallel_size: int) -> dict[str, Change]:
    """The change of every tensor that stock layers would not shard as its layer's layout says, by full name."""
    changes: dict[str, Change] = {}
    shared: dict[LayerGeometry, dict[str, Change]] = {}  # equal layers change alike: one index in memory
    for number, layer in enumerate(geometry.layers):
        if layer not in shared:
            shared[layer] = dict(_layer_changes(layer, shard_layer(layer, tensor_parallel_size), geometry.head_dim))
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


def _rows(projection: str, index: torch.Tensor) -> Iterator[tuple[str, Change]]:
    yield f"{projection}.weight", (0, index)
    yield f"{projection}.bias", (0, index)
