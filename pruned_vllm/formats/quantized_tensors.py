"""The tensors of a checkpoint, quantized or not, with the shapes and dtypes that they may have. Pure Python.

    for module, choices in expected_tensors(geometry, quantization).items(): ...

A linear layer [outputs, inputs] is stored so, where it is quantized (the last column only where there are zero points):

    plain   weight [out, in]; weight_scale [1], [out, 1], [out, groups] or blocks    weight_zero_point like the scale
    packed  weight_packed int32 [out, in / 8]; weight_scale; weight_shape int64 [2]  weight_zero_point [out / 8, groups]
    gptq    qweight int32 [in / 8, out], scales [groups, out], qzeros int32 [groups, out / 8], g_idx [in]
    awq     qweight int32 [in, out / 8], scales [groups, out]                        qzeros int32 [groups, out / 8]

with 32 / bits in place of 8. Every division rounds up. Where inputs have stored scales there is input_scale [1] too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.quantization import (
    COMPRESSED_TENSORS,
    JOINED,
    PACKED_BITS,
    Quantization,
    Scheme,
    UnknownScheme,
    WeightScheme,
)
from pruned_vllm.formats.tensors import Shapes

FLOATS = ("F32", "BF16", "F16", "F64")  # in the words of safetensors
SCALARS: tuple[tuple[int, ...], ...] = ((1,), ())  # both are written for one number
_CACHE_SCALES = ("k_scale", "v_scale")
_CACHE_SCALES_OF_OLD = ("q_scale", "kv_scale", "k_zero_point", "v_zero_point", "q_zero_point")


@dataclass(frozen=True)
class Stored:
    """What a tensor in a file may be.

    Attributes:
        shapes: any of them.
        dtypes: any of them, in the words of safetensors.
        is_required: whether the checkpoint is damaged without it.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...] = FLOATS
    is_required: bool = True


Parts = dict[str, Stored]  # of one module, by the last part of their names
Choices = tuple[Parts, ...] | None  # the ways in which a module may be stored; None: only vLLM can judge


def expected_tensors(geometry: ModelGeometry, quantization: Quantization | None) -> dict[str, Choices]:
    """How each module that has tensors may be stored, by its name."""
    expected: dict[str, Choices] = {}
    for module, shapes in _modules(geometry).items():
        plain = {part: Stored((shape,)) for part, shape in shapes.items()}
        scheme = None
        if quantization is not None and len(shapes.get("weight", ())) == 2:
            scheme = linear_scheme(geometry, quantization, module)
        if isinstance(scheme, UnknownScheme):
            expected[module] = None
        elif scheme is None:
            expected[module] = (plain,)
        else:
            bias = {part: stored for part, stored in plain.items() if part != "weight"}
            quantized = linear_tensors(scheme, *shapes["weight"]) | bias
            both = quantization is not None and quantization.by_tensors
            expected[module] = (quantized, plain) if both else (quantized,)
    if geometry.tie_word_embeddings:  # vLLM skips it then
        embedding = Stored(((geometry.vocab_size, geometry.hidden_size),), is_required=False)
        expected["lm_head"] = ({"weight": embedding},)
    if quantization is not None:
        _add_cache_scales(expected, geometry, quantization)
    return expected


def linear_scheme(geometry: ModelGeometry, quantization: Quantization, module: str) -> Scheme | None:
    """How the weight of a module [outputs, inputs] is stored, or None for plain.

    Routers and the gates of shared experts are plain in every checkpoint that vLLM can serve. vLLM knows the
    embedding by the name of its class alone.
    """
    if module == "model.embed_tokens":
        return quantization.scheme_of("", "VocabParallelEmbedding")
    if module == "lm_head":
        scheme = quantization.scheme_of("lm_head", "ParallelLMHead")
        return quantization.every_layer if scheme is None and quantization.by_tensors else scheme
    return None if _is_router(geometry, module) else quantization.scheme_of(module)


def linear_tensors(scheme: WeightScheme, outputs: int, inputs: int) -> Parts:
    """The tensors of a quantized linear layer, without its bias."""
    if scheme.layout in ("gptq", "awq"):
        return _gptq_tensors(scheme, outputs, inputs)
    groups = _groups(scheme, inputs)
    scales = _scale_shapes(scheme, outputs, inputs)
    parts = {scheme.scale_name: Stored(scales)}
    if scheme.layout == "packed":
        parts["weight_packed"] = Stored(((outputs, _ceil(inputs, scheme.pack_factor)),), ("I32",))
        parts["weight_shape"] = Stored(((2,),), ("I64", "I32"))
        if not scheme.symmetric:
            parts["weight_zero_point"] = Stored(((_ceil(outputs, scheme.pack_factor), groups),), ("I32",))
    else:
        dtype = "I8" if scheme.number == "int" else "F8_E4M3"
        parts["weight"] = Stored(((outputs, inputs),), (dtype,))
        if not scheme.symmetric:
            parts["weight_zero_point"] = Stored(scales, (dtype,))
    if scheme.inputs == "static":
        parts["input_scale"] = Stored(SCALARS)
        if not scheme.inputs_symmetric:
            parts["input_zero_point"] = Stored(SCALARS, ("I8",))
    return parts


def disagreements(geometry: ModelGeometry, quantization: Quantization) -> list[str]:
    """A sentence for all projections that vLLM computes together and the checkpoint stores in different ways."""
    problems = []
    for modules in joined_modules(geometry):
        schemes = {str(quantization.scheme_of(module) or "plain"): module for module in reversed(modules)}
        if len(schemes) > 1:
            found = "; ".join(f"{module} has {scheme}" for scheme, module in schemes.items())
            problems.append(f"vLLM computes {modules[0]} and {len(modules) - 1} more together, but {found}")
    return problems


def joined_modules(geometry: ModelGeometry) -> Iterator[list[str]]:
    """The projections that vLLM computes together: q, k and v; gate and up; all experts of a layer."""
    for index, layer in enumerate(geometry.layers):
        prefix = f"model.layers.{index}"
        if layer.num_key_value_heads and (geometry.latent is None or geometry.latent.q_lora_rank is not None):
            joined = "qkv_proj" if geometry.latent is None else "fused_qkv_a_proj"
            yield [f"{prefix}.self_attn.{name}" for name in JOINED[joined]]
        if layer.expert_intermediate_sizes:
            yield expert_modules(geometry, index)
            if layer.intermediate_size:
                shared = geometry.family.experts_format.shared_module
                yield [f"{prefix}.{shared}.{name}" for name in JOINED["gate_up_proj"]]
        elif layer.intermediate_size:
            yield [f"{prefix}.mlp.{name}" for name in JOINED["gate_up_proj"]]


def expert_modules(geometry: ModelGeometry, index: int) -> list[str]:
    """The projections of the routed experts of a layer, less experts without channels."""
    widths = enumerate(geometry.layers[index].expert_intermediate_sizes)
    experts = [geometry.family.experts_format.modules_of(expert) for expert, width in widths if width]
    return [f"model.layers.{index}.{module}" for modules in experts for module in modules]


def _modules(geometry: ModelGeometry) -> dict[str, Shapes]:
    """The shapes of a checkpoint that is not quantized, by module and the last part of the name."""
    modules: dict[str, Shapes] = {}
    for name, shape in geometry.tensor_shapes().items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = shape
    return modules


def _is_router(geometry: ModelGeometry, module: str) -> bool:
    names = geometry.family.experts
    return names is not None and module.endswith(tuple(_router_suffixes(names.router, names.shared_gate)))


@cache
def _router_suffixes(*modules: str | None) -> tuple[str, ...]:
    return tuple(f".{module}" for module in modules if module is not None)


def _scale_shapes(scheme: WeightScheme, outputs: int, inputs: int) -> tuple[tuple[int, ...], ...]:
    if scheme.strategy == "tensor":
        return SCALARS
    if scheme.strategy == "block" and scheme.block_size is not None:
        rows, columns = scheme.block_size
        return ((_ceil(outputs, rows), _ceil(inputs, columns)),)
    return ((outputs, _groups(scheme, inputs)),)


def _gptq_tensors(scheme: WeightScheme, outputs: int, inputs: int) -> Parts:
    groups, factor = _groups(scheme, inputs), PACKED_BITS // scheme.num_bits
    packed = (_ceil(inputs, factor), outputs) if scheme.layout == "gptq" else (inputs, _ceil(outputs, factor))
    parts = {"qweight": Stored((packed,), ("I32",)), "scales": Stored(((groups, outputs),))}
    if scheme.layout == "gptq" or not scheme.symmetric:
        parts["qzeros"] = Stored(((groups, _ceil(outputs, factor)),), ("I32",))
    if scheme.layout == "gptq":
        parts["g_idx"] = Stored(((inputs,),), ("I32",), is_required=False)
        parts["bias"] = Stored(((outputs,),), is_required=False)  # zeros that AutoGPTQ writes everywhere
    return parts


def _add_cache_scales(expected: dict[str, Choices], geometry: ModelGeometry, quantization: Quantization) -> None:
    """Scales of the KV cache, under all names that vLLM takes."""
    for index, layer in enumerate(geometry.layers):
        if not layer.num_key_value_heads:
            continue
        prefix, is_required = f"model.layers.{index}.self_attn", quantization.kv_cache_strategy is not None
        parts = {part: Stored(SCALARS, is_required=is_required) for part in _CACHE_SCALES}
        parts |= {part: Stored(SCALARS, (*FLOATS, "I8", "F8_E4M3"), is_required=False) for part in _CACHE_SCALES_OF_OLD}
        expected[prefix] = tuple(choice | parts for choice in expected.get(prefix) or ({},))  # beside sinks
        for letter in "kv" if geometry.latent is None else "":
            module = f"{prefix}.{letter}_proj"
            if (choices := expected[module]) is not None and quantization.method != COMPRESSED_TENSORS:
                scale = {f"{letter}_scale": Stored(SCALARS, is_required=False)}
                expected[module] = tuple(choice | scale for choice in choices)


def _groups(scheme: WeightScheme, inputs: int) -> int:
    return 1 if scheme.group_size is None else _ceil(inputs, scheme.group_size)


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
