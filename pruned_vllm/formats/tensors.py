"""The tensors of a layer in a checkpoint: their names and shapes. Pure Python."""

from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.formats.sizes import ModelSizes
from pruned_vllm.formats.wrappers import TEXT_PREFIXES

# Buffers that old checkpoints carry and every loader computes itself.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")

Shapes = dict[str, tuple[int, ...]]


def layer_tensor_shapes(model: ModelSizes, layer: LayerGeometry, index: int) -> Shapes:
    """Shapes of one layer's tensors by full name.

    A skipped sublayer has no norm and no weights. Where it ends in a bias (`o_proj`, `down_proj`), that stays:
    it was added to the hidden states whatever the masks removed. An expert without channels has no tensors, but its
    row in the router stays: a token that is sent there gets zeros from it, and its share from its other experts. Where
    experts have biases, that of its down projection stays, too, and is what the token gets; so does the constant of an
    expert that has one, under the same name.
    """
    if layer.linear_attention:
        attention = model.gated_delta_net.tensor_shapes(model.hidden_size)
    else:
        attention = _attention_shapes(model, layer)
    mlp = _experts_shapes(model, layer) if layer.expert_intermediate_sizes else _mlp_shapes(model, layer)
    if "attention" not in layer.skip:
        attention = _with_norms(model.family.attention_norms, attention, model.hidden_size)
    if "mlp" not in layer.skip:
        mlp = _with_norms(model.family.mlp_norms, mlp, model.hidden_size)
    shapes = attention | mlp
    return {f"model.layers.{index}.{name}": shape for name, shape in shapes.items()}


def canonical_name(name: str) -> str:
    """The name of a checkpoint's tensor as `layer_tensor_shapes` has it.

    As Transformers does, takes names without the prefix "model." (published embedding models have such) and with one
    too many, and those of the language model inside of a multimodal one.
    """
    for prefix, text_prefix in TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return text_prefix + name.removeprefix(prefix)
    if name.startswith(("layers.", "embed_tokens.", "norm.", "rotary_emb.")):
        return f"model.{name}"
    return name.removeprefix("model.") if name.startswith(("model.model.", "model.lm_head.")) else name


def _with_norms(norms: tuple[str, ...], sublayer: Shapes, hidden_size: int) -> Shapes:
    """A sublayer's tensors with its norms before and after them."""
    first, *later = ({f"{norm}.weight": (hidden_size,)} for norm in norms)
    shapes: Shapes = first | sublayer
    for norm in later:
        shapes |= norm
    return shapes


def _attention_shapes(model: ModelSizes, layer: LayerGeometry) -> Shapes:
    hidden = model.hidden_size
    if not layer.query_heads_per_kv_head:
        return {"self_attn.o_proj.bias": (hidden,)} if model.o_bias else {}
    if model.latent is not None:
        linears = model.latent.linear_shapes(hidden, layer.num_attention_heads)
        latent: Shapes = {f"{module}.weight": shape for module, shape in linears.items()}
        return latent | {f"{norm}.weight": (size,) for norm, size in model.latent.norm_sizes.items()}
    q = layer.num_attention_heads * model.head_dim
    kv = layer.num_key_value_heads * model.head_dim
    query_rows = layer.num_attention_heads * model.family.query_rows(model.head_dim)
    shapes = _linear("self_attn.q_proj", query_rows, hidden, model.qkv_bias)
    shapes |= _linear("self_attn.k_proj", kv, hidden, model.qkv_bias)
    shapes |= _linear("self_attn.v_proj", kv, hidden, model.qkv_bias)
    shapes |= _linear("self_attn.o_proj", hidden, q, model.o_bias)
    if model.qk_norm is not None:
        whole = model.qk_norm == "all_heads"
        shapes["self_attn.q_norm.weight"] = (q if whole else model.head_dim,)
        shapes["self_attn.k_norm.weight"] = (kv if whole else model.head_dim,)
    if model.family.sinks:
        shapes["self_attn.sinks"] = (layer.num_attention_heads,)
    return shapes


def _mlp_shapes(model: ModelSizes, layer: LayerGeometry) -> Shapes:
    width, hidden, bias = layer.intermediate_size, model.hidden_size, model.mlp_bias
    if not width:
        return {"mlp.down_proj.bias": (hidden,)} if bias else {}
    shapes = _linear("mlp.gate_proj", width, hidden, bias)
    shapes |= _linear("mlp.up_proj", width, hidden, bias)
    return shapes | _linear("mlp.down_proj", hidden, width, bias)


def _experts_shapes(model: ModelSizes, layer: LayerGeometry) -> Shapes:
    names, hidden = model.family.experts_format, model.hidden_size
    widths = layer.expert_intermediate_sizes
    shapes = _linear(names.router, len(widths), hidden, names.router_bias)
    if names.correction_bias is not None:
        shapes[f"{names.router}.{names.correction_bias}"] = (len(widths),)
    for expert, width in enumerate(widths):
        gate, up, down = names.modules_of(expert)
        if width:
            shapes |= _linear(gate, width, hidden, names.bias) | _linear(up, width, hidden, names.bias)
            shapes |= _linear(down, hidden, width, names.bias)
        elif names.bias or expert in layer.constant_experts:
            shapes[f"{down}.bias"] = (hidden,)
    if shared := layer.intermediate_size:
        shapes |= _linear(f"{names.shared_module}.gate_proj", shared, hidden)
        shapes |= _linear(f"{names.shared_module}.up_proj", shared, hidden)
        shapes |= _linear(f"{names.shared_module}.down_proj", hidden, shared)
    if names.shared_gate is not None:
        shapes |= _linear(names.shared_gate, 1, hidden)
    return shapes


def _linear(module: str, rows: int, columns: int, bias: bool = False) -> Shapes:
    shapes: Shapes = {f"{module}.weight": (rows, columns)}
    return shapes | {f"{module}.bias": (rows,)} if bias else shapes
