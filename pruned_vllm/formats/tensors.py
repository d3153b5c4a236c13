"""The tensors of a checkpoint: their names and shapes for a geometry. Pure Python."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruned_vllm.formats.geometry import ModelGeometry

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(geometry: "ModelGeometry") -> Shapes:
    """Shapes of all tensors of the checkpoint, by name, in the order of the forward pass."""
    shapes: Shapes = {"model.embed_tokens.weight": (geometry.vocab_size, geometry.hidden_size)}
    for index in range(len(geometry.layers)):
        shapes |= layer_tensor_shapes(geometry, index)
    shapes["model.norm.weight"] = (geometry.hidden_size,)
    if not geometry.tie_word_embeddings:
        shapes["lm_head.weight"] = (geometry.vocab_size, geometry.hidden_size)
    return shapes


def layer_tensor_shapes(geometry: "ModelGeometry", index: int) -> Shapes:
    """Shapes of one layer's tensors by full name.

    A skipped sublayer has no norm and no weights. Where it ends in a bias (`o_proj`, `down_proj`), that stays:
    it was added to the hidden states whatever the masks removed. An expert without channels has no tensors, but its
    row in the router stays: a token that is sent there gets zeros from it, and its share from its other experts.
    """
    shapes = _attention_shapes(geometry, index)
    if geometry.layers[index].expert_intermediate_sizes:
        shapes |= _experts_shapes(geometry, index)
    else:
        shapes |= _mlp_shapes(geometry, index)
    return {f"model.layers.{index}.{name}": shape for name, shape in shapes.items()}


def _attention_shapes(geometry: "ModelGeometry", index: int) -> Shapes:
    layer, hidden = geometry.layers[index], geometry.hidden_size
    if not layer.query_heads_per_kv_head:
        return {"self_attn.o_proj.bias": (hidden,)} if geometry.o_bias else {}
    q = layer.num_attention_heads * geometry.head_dim
    kv = layer.num_key_value_heads * geometry.head_dim
    shapes: Shapes = {"input_layernorm.weight": (hidden,)}
    shapes |= _linear("self_attn.q_proj", q, hidden, geometry.qkv_bias)
    shapes |= _linear("self_attn.k_proj", kv, hidden, geometry.qkv_bias)
    shapes |= _linear("self_attn.v_proj", kv, hidden, geometry.qkv_bias)
    shapes |= _linear("self_attn.o_proj", hidden, q, geometry.o_bias)
    if geometry.family.qk_norm is not None:
        whole = geometry.family.qk_norm == "all_heads"
        shapes["self_attn.q_norm.weight"] = (q if whole else geometry.head_dim,)
        shapes["self_attn.k_norm.weight"] = (kv if whole else geometry.head_dim,)
    return shapes


def _mlp_shapes(geometry: "ModelGeometry", index: int) -> Shapes:
    width, hidden, bias = geometry.layers[index].intermediate_size, geometry.hidden_size, geometry.mlp_bias
    if not width:
        return {"mlp.down_proj.bias": (hidden,)} if bias else {}
    shapes: Shapes = {"post_attention_layernorm.weight": (hidden,)}
    shapes |= _linear("mlp.gate_proj", width, hidden, bias)
    shapes |= _linear("mlp.up_proj", width, hidden, bias)
    return shapes | _linear("mlp.down_proj", hidden, width, bias)


def _experts_shapes(geometry: "ModelGeometry", index: int) -> Shapes:
    names, hidden = geometry.family.experts, geometry.hidden_size
    widths = geometry.layers[index].expert_intermediate_sizes
    shapes: Shapes = {"post_attention_layernorm.weight": (hidden,)}
    shapes |= _linear(names.router, len(widths), hidden)
    for expert, width in enumerate(widths):
        if width:
            gate, up, down = names.modules_of(expert)
            shapes |= _linear(gate, width, hidden) | _linear(up, width, hidden) | _linear(down, hidden, width)
    if shared := geometry.experts.shared_intermediate_size:
        shapes |= _linear(f"{names.shared_module}.gate_proj", shared, hidden)
        shapes |= _linear(f"{names.shared_module}.up_proj", shared, hidden)
        shapes |= _linear(f"{names.shared_module}.down_proj", hidden, shared)
    if names.shared_gate is not None:
        shapes |= _linear(names.shared_gate, 1, hidden)
    return shapes


def _linear(module: str, rows: int, columns: int, bias: bool = False) -> Shapes:
    shapes: Shapes = {f"{module}.weight": (rows, columns)}
    return shapes | {f"{module}.bias": (rows,)} if bias else shapes
