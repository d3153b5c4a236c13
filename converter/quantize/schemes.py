"""The schemes of quantize-pruned: how weights are stored, and which sizes the kernels of vLLM want. Pure Python.

Each is a preset of compressed-tensors, the library that vLLM and llm-compressor share, whose name `preset` is.

What kernels want was read in vLLM 0.32, model_executor/kernels/linear:

- CUTLASS multiplies FP8 in tiles of 16 (scaled_mm/cutlass.py). Other sizes are padded at every call.
- int8 on CPUs with AMX wants 32 inputs (layers/utils.py, check_cpu_sgl_kernel); CUTLASS 16; oneDNN takes any size.
- Marlin wants 64 outputs and 128 inputs, or the other way round (layers/quantization/utils/marlin_utils.py,
  marlin_padded_nk). Other sizes are padded at every call. Weights are packed in int32, so inputs must fill those.
- The CPU's kernel for 4 bits refuses other inputs and outputs than multiples of 32 (mixed_precision/cpu.py).
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.quantization import Quantization, WeightScheme

GROUP_SIZES = (128, 64, 32)  # what Marlin has kernels for


@dataclass(frozen=True)
class Scheme:
    """A way to store weights.

    Attributes:
        name: the value of --scheme.
        summary: of weights and activations, for people.
        preset: the name in compressed-tensors.
        format: how compressed-tensors calls the files.
        num_bits: of a weight, without its scale.
        kind: of a weight, "int" or "float".
        dtype: of what is stored, in the words of safetensors.
        has_groups: whether a scale may be for a group of inputs; else it is for an output.
        good_multiple: FFN widths are padded to multiples of this, which kernels are made for.
        needed_inputs, needed_outputs: kernels refuse layers whose sizes are no multiples of these.
        note: what its user should know; "" where there is nothing.
    """

    name: str
    summary: str
    preset: str
    format: str
    num_bits: int
    kind: str
    dtype: str
    has_groups: bool
    good_multiple: int
    needed_inputs: int = 1
    needed_outputs: int = 1
    note: str = ""

    @property
    def is_packed(self) -> bool:
        """Whether several weights share an int32."""
        return self.dtype == "I32"

    @property
    def pack_factor(self) -> int:
        """Weights that share a stored number."""
        return 32 // self.num_bits if self.is_packed else 1


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            name="fp8-dynamic",
            summary="FP8 (e4m3) weights with a scale for each output; activations FP8, scaled token by token",
            preset="FP8_DYNAMIC",
            format="float-quantized",
            num_bits=8,
            kind="float",
            dtype="F8_E4M3",
            has_groups=False,
            good_multiple=16,
        ),
        Scheme(
            name="w8a8-int8",
            summary="int8 weights with a scale for each output; activations int8, scaled token by token",
            preset="W8A8",
            format="int-quantized",
            num_bits=8,
            kind="int",
            dtype="I8",
            has_groups=False,
            good_multiple=32,
        ),
        Scheme(
            name="w8a16",
            summary="int8 weights with a scale for each output, packed; activations stay as they are",
            preset="W8A16",
            format="pack-quantized",
            num_bits=8,
            kind="int",
            dtype="I32",
            has_groups=False,
            good_multiple=64,
            needed_inputs=4,
            note="vLLM's own layers run w8a16 on GPUs only; on CPUs take w8a8-int8 or fp8-dynamic.",
        ),
        Scheme(
            name="w4a16",
            summary="int4 weights with a scale for each group of inputs, packed; activations stay as they are",
            preset="W4A16",
            format="pack-quantized",
            num_bits=4,
            kind="int",
            dtype="I32",
            has_groups=True,
            good_multiple=64,
            needed_inputs=32,
            needed_outputs=32,
            note="On CPUs w4a16 needs AVX-512; on GPUs it needs groups of 32, 64 or 128 inputs, or of all.",
        ),
    )
}


@dataclass(frozen=True)
class Wanted:
    """What the user asked for.

    Attributes:
        group_size: inputs that share a scale; 0 is a scale for each output; None: the scheme's default.
        ranks: the tensor-parallel size that the result is for.
        ignore: names of modules that stay as they are, or regular expressions behind "re:", as compressed-tensors
            matches them: from the beginning of the name.
    """

    scheme: Scheme
    group_size: int | None = None
    ranks: int = 1
    ignore: tuple[str, ...] = ()


def require_library() -> None:
    """Call it before long work that ends with quantizing. Raises InputError."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise InputError(
            "quantizing needs the package compressed-tensors, which is not installed (vLLM brings it): pip install "
            "'compressed-tensors>=0.17', or pruned-vllm[quantize]"
        )


def scheme_text() -> str:
    """The schemes with their summaries, for --help."""
    return "; ".join(f"{scheme.name}: {scheme.summary}" for scheme in SCHEMES.values())


def describe_quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of a config.json: {"scheme", "format", "num_bits", "group_size"}; None where it has no `quantization_config`.

    `scheme` is one of SCHEMES, else what the file calls the method. Values that are not what one expects, and those of
    layers that are not all quantized in one way, are null: config.json may come from anywhere.
    """
    stored = config.get("quantization_config")
    if not isinstance(stored, Mapping):
        return None
    weights, method, form = _only_scheme(config), stored.get("quant_method"), stored.get("format")
    named = method if isinstance(method, str) and method.isprintable() and len(method) < 50 else None
    found = [scheme for scheme in SCHEMES.values() if weights is not None and _is_of(weights, scheme)]
    return {
        "scheme": found[0].name if found else named,
        "format": form if form in [scheme.format for scheme in SCHEMES.values()] else None,
        "num_bits": None if weights is None else weights.num_bits,
        "group_size": None if weights is None else weights.group_size,
    }


def _only_scheme(config: Mapping[str, Any]) -> WeightScheme | None:
    """How all quantized layers are stored; None where they differ, or nobody can tell."""
    try:
        quantization = Quantization.from_config(config)
    except InputError:
        return None
    if quantization is None:
        return None
    schemes = {scheme for _, scheme in quantization.targets} | {quantization.every_layer} - {None}
    scheme = schemes.pop() if len(schemes) == 1 else None
    return scheme if isinstance(scheme, WeightScheme) else None


def _is_of(weights: WeightScheme, scheme: Scheme) -> bool:
    """Whether quantize-pruned stores weights like that."""
    layout, inputs = ("packed", "none") if scheme.is_packed else ("plain", "dynamic")
    expected = (layout, scheme.kind, scheme.num_bits, inputs, True)
    return expected == (weights.layout, weights.number, weights.num_bits, weights.inputs, weights.symmetric)
