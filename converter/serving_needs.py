"""What serving a model needs: plugin or not, versions, tensor-parallel sizes, and what vLLM's options meet in it.

pruned_vllm/serving/OPTIONS.md has all options; here is what depends on the geometry.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

from packaging.requirements import Requirement

from converter.advice import head_dim_warning
from converter.quantize.schemes import SCHEMES
from pruned_vllm.formats.family import PRUNED_PREFIX
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry

LIBRARIES = ("vllm", "transformers")
LARGEST_SIZE = 64  # tensor-parallel sizes above are not listed


@dataclass(frozen=True)
class ServingNeeds:
    """What serving one model needs.

    Attributes:
        architecture: what config.json calls the model.
        needs_plugin: whether vLLM needs pruned-vllm for it.
        versions: of the libraries that this pruned-vllm supports, by name; empty where it is not installed.
        largest_tensor_parallel_size: there may be as many ranks as this.
        even_tensor_parallel_sizes: sizes that divide every layer, up to LARGEST_SIZE. With others the plugin pads
            layers with zeros while it loads them; stock classes and LoRA adapters need one of these.
        notes: sentences about options of vLLM.
    """

    architecture: str
    needs_plugin: bool
    versions: dict[str, str]
    largest_tensor_parallel_size: int
    even_tensor_parallel_sizes: tuple[int, ...]
    notes: tuple[str, ...]


def serving_needs(
    geometry: ModelGeometry, architecture: str, quantization: Mapping[str, Any] | None = None
) -> ServingNeeds:
    """What a model of this geometry needs that config.json calls `architecture`.

    Args:
        quantization: what `describe_quantization` says of its weights.
    """
    needs_plugin = architecture.startswith(PRUNED_PREFIX)
    heads = max(layer.num_attention_heads for layer in geometry.layers)
    sizes = range(1, min(max(heads, 1), LARGEST_SIZE) + 1)
    linear = geometry.linear_attention
    possible = [size for size in sizes if linear is None or linear.is_shared_by(size)]
    even = tuple(size for size in possible if all(_divides(size, layer, geometry) for layer in geometry.layers))
    largest = max(heads, 1) if linear is None else max(possible)
    any_size = needs_plugin and geometry.family.can_lose_heads  # else heads cannot be padded
    return ServingNeeds(
        architecture=architecture,
        needs_plugin=needs_plugin,
        versions=supported_versions(),
        largest_tensor_parallel_size=largest if any_size else max(even),
        even_tensor_parallel_sizes=even,
        notes=(*_quantization_notes(geometry, quantization), *_notes(geometry, needs_plugin)),
    )


def supported_versions() -> dict[str, str]:
    """The releases of vLLM and Transformers that this pruned-vllm asks for; empty where it is not installed."""
    try:
        wanted = [Requirement(line) for line in requires("pruned-vllm") or ()]
    except PackageNotFoundError:  # a copy on PYTHONPATH
        return {}
    return {requirement.name: str(requirement.specifier) for requirement in wanted if requirement.name in LIBRARIES}


def widths(geometry: ModelGeometry) -> list[int]:
    """The FFN width of every layer, or those of its experts; without sublayers and experts that are gone."""
    found = [
        width for layer in geometry.layers for width in (layer.intermediate_size, *layer.expert_intermediate_sizes)
    ]
    return [width for width in found if width]


def _divides(size: int, layer: LayerGeometry, geometry: ModelGeometry) -> bool:
    """Whether so many ranks share a layer out evenly, as stock classes do."""
    if not layer.shares_heads_evenly(size):
        return False
    # Experts of different widths are shared out channel by channel, without padding.
    return layer.intermediate_size % size == 0 and layer.expert_width % size == 0


def _quantization_notes(geometry: ModelGeometry, quantization: Mapping[str, Any] | None) -> Iterable[str]:
    if quantization is not None:
        if quantization["scheme"] in SCHEMES and (note := SCHEMES[quantization["scheme"]].note):
            yield note
        return
    has_biases = geometry.family.experts is not None and geometry.family.experts.bias  # vLLM's experts take none
    ragged = has_biases or any(layer.expert_intermediate_sizes and not layer.expert_width for layer in geometry.layers)
    if ragged:
        yield (
            "Experts of different widths are quantized by quantize-pruned, or while loading by --quantization "
            "fp8_per_channel, and they alone by int8_per_channel_weight_only and experts_int8; what else vLLM has is "
            "refused for them."
        )
    else:
        yield "Quantization by vLLM (--quantization) reaches every linear layer; they are vLLM's own."
    odd = [width for width in widths(geometry) if width % 16]
    if odd and not ragged:
        yield (
            f"Kernels for quantized weights want multiples of 16 at least; {len(odd)} of {len(widths(geometry))} "
            "widths are none (quantize-pruned pads them, and so does convert-pruned, see its --align)."
        )


def _notes(geometry: ModelGeometry, needs_plugin: bool) -> Iterable[str]:
    if needs_plugin:
        yield (
            "LoRA adapters need a tensor-parallel size that divides every layer; other "
            "sizes pad layers with zeros while they are loaded."
        )
    else:
        yield (
            "A size that does not divide the layers is served by the plugin: --hf-overrides "
            f'\'{{"architectures": ["{geometry.family.pruned_architecture}"]}}\'.'
        )
    if geometry.experts is not None and needs_plugin:
        yield "Expert and data parallelism are refused for models with experts."
    if len({layer.num_key_value_heads for layer in geometry.layers}) > 1:
        yield "KV connectors that cut the cache by one number of heads (LMCache among them) are refused."
    if not geometry.num_key_value_heads:
        yield "No layer has attention: prefix caching is off."
    if (warning := head_dim_warning(geometry)) is not None:
        yield f"{warning}."
