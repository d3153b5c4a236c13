"""Which of llama.cpp's architectures a model is written for, and the sizes that its layers get there.

What llama.cpp cannot say is filled up with zeros, which changes no output: query groups become even, a sublayer that is
gone becomes one head or a few channels of zeros. Its "deci" knows layers without attention and without an MLP, but, as
tried with the llama.cpp of llama-cpp-python 0.3.36, it refuses a first layer without attention, silently drops the
attention of a layer without an MLP, and aborts where the last layer has nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from converter.shapes import with_even_groups
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry

CHANNELS_OF_ZEROS = 32  # in place of an MLP; the block of most of llama.cpp's quantizations


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's.

    Attributes:
        name: in the file's metadata.
        layers_may_differ: whether it reads the sizes of each layer.
        rotates_neighbours: whether RoPE turns elements 2i and 2i + 1 of a head, not i and i + head_dim / 2.
        fuses_qkv: whether q, k and v are one tensor.
        rope_factors: whether it reads factors for the frequencies of RoPE, as Llama 3 has them.
    """

    name: str
    layers_may_differ: bool = False
    rotates_neighbours: bool = False
    fuses_qkv: bool = False
    rope_factors: bool = False


LLAMA = Architecture("llama", rotates_neighbours=True, rope_factors=True)
DECI = Architecture("deci", layers_may_differ=True, rotates_neighbours=True, rope_factors=True)
QWEN2 = Architecture("qwen2")
QWEN3 = Architecture("qwen3")
OPENELM = Architecture("openelm", layers_may_differ=True, fuses_qkv=True)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Layout:
    """How a model is written.

    Attributes:
        geometry: what is written: the model's with padding, every layer complete.
        notes: sentences about what llama.cpp does otherwise.
    """

    architecture: Architecture
    geometry: ModelGeometry
    notes: tuple[str, ...] = ()


def make_layout(geometry: ModelGeometry) -> Layout:
    """Chooses. Raises InputError for a model that llama.cpp cannot be told."""
    family = geometry.family
    if family.model_type not in FAMILIES:
        why = "what llama.cpp reads of this family is not known here"
        if geometry.experts is not None:
            why = (
                "llama.cpp holds all experts of a layer in one tensor of one width, so pruned ones would be padded to "
                "what they were"
            )
        raise InputError(f"{family.architecture} cannot be exported: {why}. Families that can: {', '.join(FAMILIES)}")
    if family.model_type == "qwen3" and geometry.qkv_bias:
        raise InputError(f"{family.architecture} with attention_bias cannot be exported: llama.cpp's has no such bias")
    layers = [_complete(layer) for layer in geometry.layers]
    architecture, notes = _choose(geometry, layers), []
    if not architecture.layers_may_differ and len(set(layers)) > 1:
        widest = _widest(layers)
        layers = [widest] * len(layers)
        notes.append(
            f"llama.cpp reads the sizes of each layer for {family.architecture} with tied embeddings only, so every "
            f"layer has those of the largest, the rest zeros: {_added(geometry, layers)} more parameters."
        )
    elif (added := _added(geometry, layers)) != "0":
        notes.append(f"Zeros in place of what llama.cpp cannot leave out: {added} parameters.")
    return Layout(architecture, geometry.with_layers(tuple(layers)), tuple(notes))


def _choose(geometry: ModelGeometry, layers: Sequence[LayerGeometry]) -> Architecture:
    are_equal, model_type = len(set(layers)) == 1, geometry.family.model_type
    if model_type == "qwen3":
        return QWEN3 if are_equal or not geometry.tie_word_embeddings else OPENELM
    if model_type == "qwen2":  # older releases want heads that fill the hidden size
        fills = layers[0].num_attention_heads * geometry.head_dim == geometry.hidden_size
        return QWEN2 if are_equal and fills else DECI
    return LLAMA if are_equal else DECI


def _complete(layer: LayerGeometry) -> LayerGeometry:
    """The layer with even groups, and with something in place of what is gone."""
    layer = with_even_groups(layer)
    if not layer.query_heads_per_kv_head:
        layer = replace(layer, query_heads_per_kv_head=(1,))
    return layer if layer.intermediate_size else replace(layer, intermediate_size=CHANNELS_OF_ZEROS)


def _widest(layers: Sequence[LayerGeometry]) -> LayerGeometry:
    """The smallest shape that all layers fit into."""
    kv_heads = max(layer.num_key_value_heads for layer in layers)
    group = max(layer.widest_group for layer in layers)
    return LayerGeometry((group,) * kv_heads, max(layer.intermediate_size for layer in layers))


def _added(geometry: ModelGeometry, layers: Sequence[LayerGeometry]) -> str:
    return f"{geometry.with_layers(tuple(layers)).num_parameters - geometry.num_parameters:,}"
