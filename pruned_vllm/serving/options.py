"""Options of vLLM that a pruned model cannot honour: each is refused with a sentence, none is ignored.

OPTIONS.md beside this file says what becomes of every option; a test holds the two together. Options that tensor
parallelism meets are checked in config.py, quantization also in expert_scheme.py and cpu_kernels.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.serving.expert_scheme import expert_problems, has_own_experts
from pruned_vllm.serving.model_layout import ModelLayout, model_layout

if TYPE_CHECKING:  # this file is imported while the plugin registers, before vLLM may be set up
    from vllm.config import VllmConfig

# KV connectors that move whole pages, layer by layer; others cut them by one number of heads for all layers.
PAGE_CONNECTORS = ("ExampleConnector", "OffloadingConnector")

PICKLE_FORMATS = ("pt", "npcache")
FOR_EXPERTS_ALONE = ("experts_int8", "int8_per_channel_weight_only")
# What vLLM leaves as it is without a word: its own class for Kimi-K3 takes care of that.
PASSED_OVER = "int4_per_group_32"


@dataclass(frozen=True)
class Refusal:
    """Something that a user may ask of vLLM and a pruned model cannot give.

    Attributes:
        options: the options of `vllm serve` that ask for it, as OPTIONS.md has them.
        is_asked: whether this configuration asks for it, of a model of this geometry.
        sentence: why not, and what to do. A function where it quotes the configuration.
    """

    options: tuple[str, ...]
    is_asked: Callable[["VllmConfig", ModelGeometry], bool]
    sentence: str | Callable[["VllmConfig", ModelGeometry], str]


def check_options(vllm_config: "VllmConfig", layout: ModelLayout) -> None:
    """Refuses what a model of these sizes cannot honour.

    Raises:
        InputError: with a sentence for each option.
    """
    geometry = layout.geometry
    problems = expert_problems(vllm_config.model_config, geometry, layout.quantization, layout.ranks)
    if layout.quantization is not None and layout.quantization.kv_cache_strategy not in (None, "tensor"):
        problems.append(
            f"kv_cache_scheme in quantization_config has scales by {layout.quantization.kv_cache_strategy}, which vLLM "
            "cuts by one number of heads for all layers; quantize with strategy tensor"
        )
    for refusal in REFUSALS:
        if refusal.is_asked(vllm_config, geometry):
            sentence = refusal.sentence
            problems.append(sentence if isinstance(sentence, str) else sentence(vllm_config, geometry))
    if problems:
        raise InputError("This pruned model cannot be served so:", problems)


def _has_own_experts(vllm_config: "VllmConfig", geometry: ModelGeometry) -> bool:
    """Whether some layer has experts that vLLM's own expert layer does not compute."""
    layout = model_layout(vllm_config)
    arguments = vllm_config.model_config, geometry, layout.quantization
    return any(has_own_experts(*arguments, index, layout.ranks) for index in range(len(geometry.layers)))


def _asks_for_what_is_passed_over(vllm_config: "VllmConfig", geometry: ModelGeometry) -> bool:
    from vllm.config.quantization import QUANT_KEY_NAMES

    arguments = vllm_config.model_config.quantization_config
    specs = [] if arguments is None else [arguments.linear, arguments.moe]
    weights = [spec.weight for spec in specs if spec is not None and spec.weight is not None]
    return QUANT_KEY_NAMES.get(PASSED_OVER) in weights


def _shares_out_experts(vllm_config: "VllmConfig", geometry: ModelGeometry) -> bool:
    parallel = vllm_config.parallel_config
    asked = (
        parallel.enable_expert_parallel
        or parallel.enable_eplb
        or parallel.enable_elastic_ep
        or parallel.use_ubatching
        or parallel.data_parallel_size > 1
    )
    return geometry.experts is not None and asked


def _substitutes_experts(vllm_config: "VllmConfig", geometry: ModelGeometry) -> bool:
    """vLLM 0.33 replaces experts by constants where config.json says so, in layers of its own."""
    config = vllm_config.model_config.hf_config.to_dict()
    compression = config.get("compression_config") or {}
    asked = config.get("approximate_experts") or (compression.get("transform_config") or {}).get("expert_substitution")
    return geometry.experts is not None and bool(asked)


def _stages_without_attention(vllm_config: "VllmConfig", geometry: ModelGeometry) -> list[tuple[int, int, int]]:
    """Pipeline stages (number, layers from and to) with no layer that has attention, while others have some."""
    from vllm.distributed.utils import get_pp_indices

    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages == 1 or not geometry.num_key_value_heads:
        return []
    found = [(stage, *get_pp_indices(len(geometry.layers), stage, stages)) for stage in range(stages)]
    return [
        (stage, start, end)
        for stage, start, end in found
        if not any(layer.num_key_value_heads or layer.linear_attention for layer in geometry.layers[start:end])
    ]


def _pipeline_sentence(vllm_config: "VllmConfig", geometry: ModelGeometry) -> str:
    stage, start, end = _stages_without_attention(vllm_config, geometry)[0]
    return (
        f"--pipeline-parallel-size {vllm_config.parallel_config.pipeline_parallel_size} gives stage {stage} the layers "
        f"{start} to {end - 1}, none of which has attention left, and vLLM wants a KV cache in every stage; use fewer "
        "stages, or move the borders with VLLM_PP_LAYER_PARTITION"
    )


def _connector_needs_equal_heads(vllm_config: "VllmConfig", geometry: ModelGeometry) -> bool:
    if len({layer.num_key_value_heads for layer in geometry.layers}) == 1:
        return False
    transfer, cache = vllm_config.kv_transfer_config, vllm_config.cache_config
    connector = transfer.kv_connector if transfer is not None else None
    through_lmcache = cache.kv_offloading_size is not None and cache.kv_offloading_backend == "lmcache"
    return through_lmcache or connector not in (None, *PAGE_CONNECTORS)


REFUSALS = (
    Refusal(
        ("--quantization",),
        lambda vllm_config, geometry: (
            geometry.experts is None and vllm_config.model_config.quantization in FOR_EXPERTS_ALONE
        ),
        f"--quantization {' and '.join(FOR_EXPERTS_ALONE)} change experts alone, and this model has none",
    ),
    Refusal(
        ("--quantization-config",),
        lambda vllm_config, geometry: (
            vllm_config.model_config.quantization_config is not None and vllm_config.model_config.quantization is None
        ),
        "--quantization-config alone changes nothing in vLLM; add --quantization online, or leave it out",
    ),
    Refusal(
        ("--quantization-config",),
        _asks_for_what_is_passed_over,
        f"--quantization-config with {PASSED_OVER} changes nothing in vLLM but for one model that is not pruned; "
        "quantize-pruned writes weights of 4 bits",
    ),
    Refusal(
        (
            "--enable-expert-parallel",
            "--enable-eplb",
            "--enable-elastic-ep",
            "--enable-dbo",
            "--ubatch-size",
            "--data-parallel-size",
        ),
        _shares_out_experts,
        "--enable-expert-parallel, --enable-eplb, --enable-elastic-ep, --enable-dbo, --ubatch-size and "
        "--data-parallel-size spread whole experts over ranks, which a pruned model does not; with "
        "--tensor-parallel-size alone every rank holds a part of each expert, and independent servers behind a load "
        "balancer do what data parallelism does",
    ),
    Refusal(
        ("--moe-backend",),
        lambda vllm_config, geometry: (
            vllm_config.kernel_config.moe_backend != "auto" and _has_own_experts(vllm_config, geometry)
        ),
        "--moe-backend chooses among kernels for experts of one width; these differ, or are quantized on a CPU, and "
        "have a kernel of their own; leave it at auto",
    ),
    Refusal(
        ("--enable-return-routed-experts",),
        lambda vllm_config, geometry: (
            vllm_config.aux_output_config.enable_return_routed_experts and _has_own_experts(vllm_config, geometry)
        ),
        "--enable-return-routed-experts reads the choices of vLLM's own expert layers, and layers whose experts have "
        "different widths, or are quantized on a CPU, are not; serve without it",
    ),
    Refusal(
        ("--decode-context-parallel-size", "--prefill-context-parallel-size"),
        lambda vllm_config, geometry: (
            max(
                vllm_config.parallel_config.decode_context_parallel_size,
                vllm_config.parallel_config.prefill_context_parallel_size,
            )
            > 1
        ),
        "--decode-context-parallel-size and --prefill-context-parallel-size share the KV cache out as if every layer "
        "had the same KV heads on the same ranks, which pruning changes; use --tensor-parallel-size alone",
    ),
    Refusal(
        ("--pipeline-parallel-size",),
        lambda vllm_config, geometry: bool(_stages_without_attention(vllm_config, geometry)),
        _pipeline_sentence,
    ),
    Refusal(
        ("--kv-transfer-config", "--kv-offloading-backend"),
        _connector_needs_equal_heads,
        "--kv-transfer-config and --kv-offloading-backend lmcache cut KV caches by one number of heads for all layers, "
        f"and these layers differ; connectors that move whole pages are not refused: {', '.join(PAGE_CONNECTORS)} "
        "(--kv-offloading-backend native)",
    ),
    Refusal(
        ("--enable-mfu-metrics",),
        lambda vllm_config, geometry: vllm_config.observability_config.enable_mfu_metrics and not geometry.is_dense,
        "--enable-mfu-metrics counts operations by one size of all layers, which would be wrong here; serve without it",
    ),
    Refusal(
        ("--load-format",),
        lambda vllm_config, geometry: vllm_config.load_config.load_format in PICKLE_FORMATS,
        f"--load-format {' and '.join(PICKLE_FORMATS)} read pickles, which can run code; pruned models are safetensors",
    ),
    Refusal(
        ("--hf-overrides",),
        _substitutes_experts,
        "config.json has approximate_experts or an expert_substitution, which replace experts by constants in layers "
        "of vLLM 0.33; convert-pruned reads such a model (--from mone), and its result is served with the constants",
    ),
)
