"""Which linear layers of a checkpoint are quantized, and how: `quantization_config` of config.json. Pure Python.

    quantization = Quantization.from_config(config)          # None where nothing is quantized
    quantization.scheme_of("model.layers.0.mlp.up_proj")     # a WeightScheme; None where the layer is plain

Formats that are understood: compressed-tensors (what llm-compressor and `quantize-pruned` write), and the native ones
of fp8, GPTQ and AWQ. Of others, and of schemes inside of compressed-tensors that are not in `WeightScheme`, an
`UnknownScheme` says so: their tensors only vLLM can judge.

Layers are looked up as vLLM 0.32 does it (compressed_tensors/utils.py): first by name, then by the name of the class.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pruned_vllm.common.errors import InputError

COMPRESSED_TENSORS = "compressed-tensors"
PACKED_BITS = 32  # of the integers that hold several weights

Inputs = Literal["none", "dynamic", "static"]
Strategy = Literal["tensor", "channel", "group", "block"]

# Layers of vLLM, and those of the checkpoint that they join. A name in `ignore` or `targets` may be either's.
JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_JOINED_BY = {name: joined for joined, names in JOINED.items() for name in names}
_PLAIN_FORMATS = ("int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True)
class WeightScheme:
    """How the weight of a linear layer is stored.

    Attributes:
        layout: "plain" is one number an element (compressed-tensors, fp8). "packed" is several in an int32 along the
            inputs (compressed-tensors' pack-quantized). "gptq" and "awq" are those projects' own.
        number: "int", or "float" for float8_e4m3fn.
        num_bits: of a weight.
        strategy: what shares a scale: the whole tensor, a row (an output), `group_size` inputs of a row, or a block.
        block_size: rows and columns of a block.
        symmetric: whether there are no zero points.
        inputs: whether the layer's inputs are quantized too, by a scale of their own ("dynamic") or one that is
            stored ("static").
        inputs_symmetric: whether static inputs have no zero point.
        scale_name: what the scale is called in a plain layout.
    """

    layout: Literal["plain", "packed", "gptq", "awq"]
    number: Literal["int", "float"]
    num_bits: int
    strategy: Strategy
    group_size: int | None = None
    block_size: tuple[int, int] | None = None
    symmetric: bool = True
    inputs: Inputs = "none"
    inputs_symmetric: bool = True
    scale_name: str = "weight_scale"

    def __post_init__(self) -> None:
        sizes = {"group": (self.group_size,), "block": self.block_size or (None,)}.get(self.strategy, ())
        if not all(type(size) is int and 0 < size < 2**31 for size in sizes):
            raise InputError(
                f"quantization_config of config.json has groups or blocks of the sizes {list(sizes)!r:.80}; they must "
                "be positive whole numbers"
            )
        if not isinstance(self.symmetric, bool) or not isinstance(self.inputs_symmetric, bool):
            raise InputError("quantization_config of config.json says neither true nor false whether it is symmetric")
        if type(self.num_bits) is not int:
            raise InputError(f"quantization_config of config.json has weights of {self.num_bits!r:.80} bits")

    @property
    def pack_factor(self) -> int:
        """Weights in one stored number."""
        return 1 if self.layout == "plain" else PACKED_BITS // self.num_bits

    def __str__(self) -> str:
        number = "float8_e4m3fn" if self.number == "float" else f"int{self.num_bits}"
        scales = {
            "tensor": "a scale for each tensor",
            "channel": "a scale for each output",
            "group": f"a scale for each {self.group_size} inputs",
            "block": f"a scale for each block of {' x '.join(map(str, self.block_size or ()))}",
        }
        inputs = {"none": "", "dynamic": ", inputs quantized by token", "static": ", inputs with stored scales"}
        asymmetric = "" if self.symmetric else ", zero points"
        layout = "" if self.layout == "plain" else f", {self.layout}"
        return f"{number} weights, {scales[self.strategy]}{asymmetric}{inputs[self.inputs]}{layout}"


@dataclass(frozen=True)
class UnknownScheme:
    """A way of storing weights that is not known here; `name` tells it."""

    name: str

    def __str__(self) -> str:
        return self.name


Scheme = WeightScheme | UnknownScheme


@dataclass(frozen=True)
class Quantization:
    """What `quantization_config` says.

    Attributes:
        method: `quant_method`.
        targets: names, patterns ("re:...") or names of classes, each with its scheme; the first that fits counts.
        ignore: names and patterns of layers that stay plain.
        every_layer: the scheme of all layers that `ignore` does not name, where there are no targets.
        by_tensors: whether a layer is quantized where its tensors say so, and config.json need not (GPTQ, AWQ).
        kv_cache_strategy: "tensor" or "attn_head" where the checkpoint has scales of the KV cache; None where it need
            not.
    """

    method: str
    targets: tuple[tuple[str, Scheme], ...] = ()
    ignore: tuple[str, ...] = ()
    every_layer: Scheme | None = None
    by_tensors: bool = False
    kv_cache_strategy: str | None = None
    _cache: dict[tuple[str, str], Scheme | None] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Quantization | None":
        """Reads a config.json; None where it has no `quantization_config`.

        Raises:
            InputError: it is not what its method prescribes.
        """
        stored = config.get("quantization_config")
        if stored is None:
            return None
        method = stored.get("quant_method") if isinstance(stored, Mapping) else None
        if not isinstance(method, str):
            raise InputError("quantization_config of config.json has no quant_method, so nobody can read the weights")
        reader = {COMPRESSED_TENSORS: _read_compressed_tensors, "fp8": _read_fp8, "gptq": _read_gptq, "awq": _read_awq}
        if method not in reader:
            return cls(method, every_layer=UnknownScheme(method))
        try:
            return reader[method](stored)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"quantization_config of config.json is not valid for {method}: {error!r}") from None

    def scheme_of(self, module: str, class_name: str = "Linear") -> Scheme | None:
        """How a layer's weight is stored; None where it is plain.

        Args:
            module: the layer's name in the checkpoint.
            class_name: its class, by which `targets` may name it.
        """
        key = (module, class_name)
        if key not in self._cache:
            self._cache[key] = self._look_up(*key)
        return self._cache[key]

    def _look_up(self, module: str, class_name: str) -> Scheme | None:
        names = _names(module)
        if any(is_named(pattern, names) for pattern in self.ignore):
            return None
        for pattern, scheme in self.targets:
            if is_named(pattern, names):
                return scheme
        for pattern, scheme in self.targets:
            if _is_class(pattern, class_name):
                return scheme
        return self.every_layer if class_name == "Linear" else None


def _names(module: str) -> tuple[str, ...]:
    """A layer's name, and that of the layer that stock classes join it to."""
    parent, _, name = module.rpartition(".")
    return (f"{parent}.{_JOINED_BY[name]}", module) if name in _JOINED_BY else (module,)


def is_named(pattern: str, names: tuple[str, ...]) -> bool:
    """Whether an entry of `ignore` or `targets` fits one of a layer's names: equal, or, behind "re:", a regular
    expression that fits from the beginning. Raises re.error."""
    if pattern.startswith("re:"):
        return any(re.match(pattern[3:], name) for name in names)
    return pattern in names


def _is_class(pattern: str, class_name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], class_name) is not None
    return pattern.lower() in class_name.lower()


def _patterns(key: str, values: Any) -> tuple[str, ...]:
    """Names, and regular expressions behind "re:". Raises InputError for anything else."""
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise InputError(f"{key} of quantization_config must be a list of names, not {values!r:.80}")
    for value in values:
        try:
            re.compile(value.removeprefix("re:") if value.startswith("re:") else "")
        except re.error as error:
            raise InputError(
                f"{key} of quantization_config: {value!r:.80} has no regular expression: {error}"
            ) from None
    return tuple(values)


def _read_compressed_tensors(stored: Mapping[str, Any]) -> Quantization:
    targets: dict[str, Scheme] = {}  # of a name that is there twice the last counts, as in vLLM
    for name, group in (stored.get("config_groups") or {}).items():
        if not isinstance(group, Mapping):
            raise InputError(f"config_groups[{name!r}] of quantization_config is no mapping; vLLM reads no presets")
        names = _patterns("targets", group["targets"])
        if len(names) == 1 and names[0].endswith("Attention"):
            continue  # the KV cache, which kv_cache_scheme describes too
        scheme = _compressed_tensors_scheme(group, group.get("format") or stored.get("format"))
        targets |= dict.fromkeys(names, scheme)
    if stored.get("transform_config"):
        targets = dict.fromkeys(targets, UnknownScheme("weights with transforms"))
    cache = stored.get("kv_cache_scheme")
    return Quantization(
        COMPRESSED_TENSORS,
        targets=tuple(targets.items()),
        ignore=_patterns("ignore", stored.get("ignore") or ()),
        kv_cache_strategy=None if cache is None or cache.get("dynamic") else _strategy(cache),
    )


def _compressed_tensors_scheme(group: Mapping[str, Any], layout: str | None) -> Scheme:
    """The scheme of a config group; `layout` is its format."""
    weights, inputs = group["weights"], group.get("input_activations")
    number, num_bits = str(weights.get("type", "int")).lower(), weights.get("num_bits", 8)
    strategy = _strategy(weights)
    packed = layout == "pack-quantized" and number == "int" and num_bits in (2, 4, 8)
    plain = layout in _PLAIN_FORMATS and number in ("int", "float") and num_bits == 8
    reordered = weights.get("actorder") in (True, "group", "dynamic")
    if (
        not (packed or plain)
        or strategy not in ("tensor", "channel", "group", "block")
        or reordered
        or group.get("output_activations")
        or weights.get("dynamic")
        or weights.get("scale_dtype") not in (None, "torch.float32", "torch.bfloat16", "torch.float16")
    ):
        ordered = ", columns in the order of activations" if reordered else ""
        return UnknownScheme(f"{layout}: {number}{num_bits} weights, strategy {strategy}{ordered}")
    return WeightScheme(
        layout="packed" if packed else "plain",
        number="float" if number == "float" else "int",
        num_bits=num_bits,
        strategy=strategy,
        group_size=weights["group_size"] if strategy == "group" else None,
        block_size=_block_size(weights["block_structure"]) if strategy == "block" else None,
        symmetric=weights.get("symmetric", True),
        inputs="none" if not inputs else "dynamic" if inputs.get("dynamic") else "static",
        inputs_symmetric=(inputs or {}).get("symmetric", True),
    )


def _strategy(arguments: Mapping[str, Any]) -> Any:
    """The strategy, which follows from the group size where it is not said."""
    if arguments.get("strategy") is not None:
        return str(arguments["strategy"]).lower()
    size = arguments.get("group_size")
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _block_size(size: Any) -> tuple[int, int]:
    """Rows and columns, from [128, 128] or "128x128"."""
    rows, columns = size.split("x") if isinstance(size, str) else size
    return int(rows), int(columns)


def _read_fp8(stored: Mapping[str, Any]) -> Quantization:
    block = stored.get("weight_block_size")
    scheme = WeightScheme(
        layout="plain",
        number="float",
        num_bits=8,
        strategy="tensor" if block is None else "block",
        block_size=None if block is None else _block_size(block),
        inputs="static" if stored.get("activation_scheme") == "static" else "dynamic",
        scale_name="weight_scale" if block is None else "weight_scale_inv",
    )
    ignore = stored.get("ignored_layers") or stored.get("modules_to_not_convert") or ()
    return Quantization("fp8", ignore=_patterns("ignored_layers", ignore), every_layer=scheme)


def _read_gptq(stored: Mapping[str, Any]) -> Quantization:
    if stored.get("dynamic"):
        return Quantization("gptq", every_layer=UnknownScheme("gptq with rules for single layers"))
    size, bits = stored["group_size"], stored["bits"]
    if bits not in (2, 4, 8):  # 3 bits lie across the borders of the integers
        return Quantization("gptq", every_layer=UnknownScheme(f"gptq with {bits} bits"))
    return _packed_by_group("gptq", bits, size, symmetric=stored["sym"])


def _read_awq(stored: Mapping[str, Any]) -> Quantization:
    size = stored.get("group_size", stored.get("q_group_size"))
    bits = stored.get("bits", stored.get("w_bit"))
    if bits != 4 or type(size) is not int:
        return Quantization("awq", every_layer=UnknownScheme(f"awq with {bits} bits and groups of {size}"))
    return _packed_by_group("awq", bits, size, symmetric=not stored.get("zero_point", True))


def _packed_by_group(layout: Literal["gptq", "awq"], num_bits: int, size: int, symmetric: bool) -> Quantization:
    """What both formats say: a group of -1 is all inputs."""
    scheme = WeightScheme(
        layout=layout,
        number="int",
        num_bits=num_bits,
        strategy="channel" if size == -1 else "group",
        group_size=None if size == -1 else size,
        symmetric=symmetric,
    )
    return Quantization(layout, every_layer=scheme, by_tensors=True)
