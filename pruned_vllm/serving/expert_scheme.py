"""How the routed experts of a layer are quantized where they have different widths, or a refusal with a sentence.

vLLM's own expert layers cannot hold such experts, so its quantization methods do not reach them. What `RaggedExperts`
takes is listed in `_of_checkpoint` and `_ONLINE`; everything else is refused, so that nothing stays in 16 bits without
a word. Layers that the configuration ignores stay plain, as in vLLM.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.quantization import COMPRESSED_TENSORS, Quantization, Scheme, WeightScheme
from pruned_vllm.formats.quantized_tensors import expert_modules
from pruned_vllm.serving.sharding import has_ragged_experts

if TYPE_CHECKING:  # this file is imported while the plugin registers, before vLLM may be set up
    from vllm.config import ModelConfig

Number = Literal["int8", "fp8", "int4"]

# Names of --quantization that quantize while weights are loaded, or say that --quantization-config does.
_EXPERTS_INT8 = "experts_int8"
_ONLINE: dict[str, Number] = {"fp8_per_channel_static": "fp8", "int8_per_channel_static": "int8"}
_TAKEN = (
    "such experts can have int8 or float8_e4m3fn weights, or symmetric int4 ones, from a compressed-tensors checkpoint "
    "with plain or dynamically quantized inputs (quantize-pruned writes such), or by --quantization fp8_per_channel, "
    "int8_per_channel_weight_only or experts_int8; --quantization online --quantization-config "
    '\'{"linear": {"weight": "fp8_per_channel_static"}}\' quantizes the other layers alone'
)


@dataclass(frozen=True)
class ExpertScheme:
    """How the weights of a layer's experts are held.

    Attributes:
        number: what a weight is.
        group_size: inputs that share a scale; None for one scale for each output.
        is_online: whether the checkpoint has 16-bit weights that are quantized while they are loaded.
        quantizes_input: whether the scheme asks for quantized inputs too.
    """

    number: Number
    group_size: int | None = None
    is_online: bool = False
    quantizes_input: bool = False

    @property
    def num_bits(self) -> int:
        """Of a weight."""
        return 4 if self.number == "int4" else 8

    def __str__(self) -> str:
        scales = "output" if self.group_size is None else f"{self.group_size} inputs"
        return f"{self.number}, a scale for each {scales}{', while loading' if self.is_online else ''}"


def expert_scheme(
    model: "ModelConfig", geometry: ModelGeometry, quantization: Quantization | None, index: int
) -> ExpertScheme | None:
    """How the routed experts of layer `index` are quantized; None where they are plain.

    Args:
        quantization: of the checkpoint.

    Raises:
        InputError: they would be quantized in a way that experts of different widths cannot be.
    """
    if model.quantization is None:
        return None
    if model.quantization == _EXPERTS_INT8:
        return ExpertScheme("int8", is_online=True)
    online = _online(model, f"model.layers.{index}.mlp.experts", is_stored=quantization is not None)
    if quantization is None:
        if not _is_online(model):
            raise InputError(
                f"--quantization {model.quantization} does not reach experts of different widths; {_TAKEN}"
            )
        return online
    stored = _of_checkpoint(geometry, quantization, index)
    if stored is not None and online is not None:
        raise InputError(
            f"layer {index}: its experts are quantized in the checkpoint; --quantization-config would quantize them "
            "again, which vLLM does not do: leave moe, and targets that are experts, out of it"
        )
    return stored or online


def expert_problems(
    model: "ModelConfig", geometry: ModelGeometry, quantization: Quantization | None, ranks: int
) -> list[str]:
    """A sentence for each reason why experts of different widths cannot be quantized as asked."""
    problems: dict[str, None] = {}
    for index in range(len(geometry.layers)):
        if _needs_own_experts(geometry, index, ranks):
            try:
                scheme = expert_scheme(model, geometry, quantization, index)
            except InputError as error:
                problems[str(error)] = None
            else:
                problems |= dict.fromkeys(_device_problems(scheme))
    return list(problems)


def _device_problems(scheme: ExpertScheme | None) -> list[str]:
    from vllm.platforms import current_platform

    from pruned_vllm.kernels.ragged_moe_arguments import FP8_CAPABILITY

    if scheme is None or scheme.number != "fp8" or not current_platform.is_cuda():
        return []
    if current_platform.has_device_capability(FP8_CAPABILITY):
        return []
    return [
        f"experts in float8_e4m3fn need a GPU of compute capability {'.'.join(map(str, FP8_CAPABILITY))}, which this "
        "one has not; quantize them to int8 or int4 (quantize-pruned, or --quantization experts_int8)"
    ]


def has_own_experts(
    model: "ModelConfig", geometry: ModelGeometry, quantization: Quantization | None, index: int, ranks: int
) -> bool:
    """Whether `RaggedExperts` computes the experts of layer `index`, and not vLLM's own expert layer.

    On a CPU it does so for quantized experts of one width, too: vLLM's layer has kernels for those on few CPUs (with
    AMX), ours on all.
    """
    from vllm.platforms import current_platform

    if not geometry.layers[index].expert_intermediate_sizes:
        return False
    if _needs_own_experts(geometry, index, ranks):
        return True
    if not current_platform.is_cpu():
        return False
    try:
        return expert_scheme(model, geometry, quantization, index) is not None
    except InputError:
        return False  # vLLM's own layer says what it thinks of it


def _needs_own_experts(geometry: ModelGeometry, index: int, ranks: int) -> bool:
    """Whether a layer has experts that vLLM's own layer does not hold: of different widths, or with biases or another
    activation than silu, which it takes from the files of single families, and for some ways of storing weights."""
    layer, names = geometry.layers[index], geometry.family.experts
    is_general = names is not None and (names.bias or names.activation != "silu")
    return has_ragged_experts(layer, ranks) or (is_general and bool(layer.expert_intermediate_sizes))


def _is_online(model: "ModelConfig") -> bool:
    from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES

    return model.quantization in ONLINE_QUANT_SHORTHAND_NAMES


def _online(model: "ModelConfig", prefix: str, is_stored: bool) -> ExpertScheme | None:
    """What --quantization-config, or the name that stands for one, does to the experts; vLLM resolves it itself.

    Args:
        is_stored: whether the name is that of the checkpoint's own quantization.
    """
    from vllm.config.quantization import QUANT_KEY_NAMES, resolve_quantization_config
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

    arguments = model.quantization_config
    if arguments is None and not is_stored:  # vLLM resolves some names, such as mxfp8, only later
        arguments = resolve_quantization_config(model.quantization, {})
    if arguments is None or (arguments.linear is None and arguments.moe is None and arguments.targets is None):
        return None
    resolved = OnlineQuantizationConfig(arguments).resolve_quant_method_cls(RoutedExperts, prefix)
    if resolved is None:
        return None
    names: dict[Any, str] = {key: name for name, key in QUANT_KEY_NAMES.items()}
    name = names.get(resolved[3].weight, f"--quantization {model.quantization}")
    if name not in _ONLINE:
        raise InputError(f"{name} does not reach experts of different widths; {_TAKEN}")
    return ExpertScheme(_ONLINE[name], is_online=True, quantizes_input=_ONLINE[name] == "fp8")


def _of_checkpoint(geometry: ModelGeometry, quantization: Quantization, index: int) -> ExpertScheme | None:
    schemes = {quantization.scheme_of(module) for module in expert_modules(geometry, index)}
    if schemes <= {None}:
        return None
    if len(schemes) > 1:  # `disagreements` in formats/quantized_tensors.py says which
        raise InputError(f"layer {index}: its experts are stored in {len(schemes)} different ways")
    (scheme,) = schemes
    reason = _reason_against(quantization, scheme, geometry.hidden_size)
    if reason or not isinstance(scheme, WeightScheme):
        raise InputError(
            f"quantization_config stores experts as {quantization.method}, {scheme}, which does not reach experts of "
            f"different widths: {reason}; {_TAKEN}"
        )
    number: Number = "fp8" if scheme.number == "float" else "int4" if scheme.num_bits == 4 else "int8"
    return ExpertScheme(number, scheme.group_size, quantizes_input=scheme.inputs == "dynamic")


def _reason_against(quantization: Quantization, scheme: Scheme | None, hidden_size: int) -> str:
    """ "" where RaggedExperts takes weights that are stored so."""
    if not isinstance(scheme, WeightScheme) or quantization.method != COMPRESSED_TENSORS:
        return "the kernel has no such weights"
    if scheme.num_bits not in (4, 8):
        return f"the kernel has no weights of {scheme.num_bits} bits"
    if not scheme.symmetric:
        return "the kernel has no zero points"
    if scheme.inputs == "static":
        return "the kernel has no stored scales of inputs"
    if scheme.strategy not in ("tensor", "channel", "group"):
        return "the kernel has no blocks"
    if scheme.group_size is not None and hidden_size % scheme.group_size:
        return f"groups of {scheme.group_size} do not divide hidden_size {hidden_size}"
    if scheme.num_bits == 4 and (hidden_size % 2 or (scheme.group_size or 2) % 2):
        return f"two weights of 4 bits share a byte, and hidden_size {hidden_size} or the group size is odd"
    return ""
