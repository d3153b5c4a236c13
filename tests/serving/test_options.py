"""Every option of vLLM is honoured or refused with a sentence, and OPTIONS.md says which.

A VllmConfig is enough: what the plugin refuses, it refuses before vLLM starts a process.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from helpers.serving import Geometry
from helpers.tiny import converted, expert_masks, masks_for, tiny_model
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsLinearMethod
from vllm.model_executor.layers.quantization.online.fp8 import Fp8PtpcOnlineLinearMethod
from vllm.utils.argparse_utils import FlexibleArgumentParser

from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.quantization import Quantization
from pruned_vllm.serving import options
from pruned_vllm.serving.model_layout import ModelLayout, model_layout
from pruned_vllm.serving.options import REFUSALS, check_options
from pruned_vllm.serving.quantization import check_quantized

# Uneven query groups, a layer without attention and one without MLP; at most ten query heads in a layer.
RAGGED = Geometry(((3, 1, 0, 4), (0, 0, 0, 0), (4, 3, 2, 1)), (51, 99, 0), group=4)
EXPERTS = {
    "ragged": [[17, 9, 24, 5], [1, 2, 3, 4], [24, 23, 1, 12]],
    "mixed": [[16] * 4, [1, 2, 3, 4], [8] * 4],
    "equal": [[16] * 4, [8] * 4, [24] * 4],
}
HEADS = [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Converted models by name: a dense one without experts, and three with."""
    root = tmp_path_factory.mktemp("models")
    directories = {"llama": converted(root / "llama", *RAGGED.model_and_masks())}
    for name, widths in EXPERTS.items():
        model = tiny_model("qwen3_moe", 6, 3, 24)
        directories[name] = converted(root / name, model, expert_masks(model, widths) | masks_for(HEADS, []))
    return directories


def vllm_config(directory: Path, **arguments):
    defaults = {"dtype": "bfloat16", "max_model_len": 128, "skip_tokenizer_init": True}
    return EngineArgs(model=str(directory), **defaults | arguments).create_engine_config()


@dataclass(frozen=True)
class Case:
    """Something that is refused.

    Attributes:
        options: what OPTIONS.md calls the options.
        sentence: what the message must say.
        arguments: of EngineArgs.
        change: sets what vLLM itself refuses on CPU, in a configuration that exists already.
    """

    options: tuple[str, ...]
    sentence: str
    model: str = "llama"
    arguments: dict = field(default_factory=dict)
    change: Callable | None = None


def parallel(**values) -> Callable:
    def change(config) -> None:
        for name, value in values.items():
            setattr(config.parallel_config, name, value)

    return change


LINEAR = {"linear": {"weight": "fp8_per_channel_static"}}
NOT_REACHED = "does not reach experts of different widths"
SPREAD = "spread whole experts over ranks"
DENSE_SIZE = "would build every layer of this pruned model at the dense size"
CUT_BY_HEADS = "cut KV caches by one number of heads"
QUANTIZATIONS = [
    "fp8",
    "fp8_per_tensor",
    "fp8_per_block",
    "mxfp8",
    "nvfp4_per_token",
    "compressed-tensors",
    "awq",
    "gptq",
    "moe_wna16",
    "torchao",
    "inc",
    "humming",
    "modelopt",
    "quark",
    "mxfp4",
]
ON_DISK = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BY_HEAD = {"num_bits": 8, "type": "float", "strategy": "attn_head", "symmetric": True, "dynamic": False}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
STORED = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "0": {"targets": ["Linear"], "weights": INT8, "input_activations": INT8 | {"strategy": "tensor"}}
    },
    "kv_cache_scheme": BY_HEAD,
}
CASES = [
    *[Case(("--quantization",), NOT_REACHED, "ragged", {"quantization": name}) for name in QUANTIZATIONS],
    Case(("--quantization",), NOT_REACHED, "mixed", {"quantization": "fp8_per_tensor"}),
    Case(("--quantization",), NOT_REACHED, "ragged", {"hf_overrides": {"quantization_config": ON_DISK}}),
    Case(
        ("--quantization",),
        NOT_REACHED,
        "ragged",
        {"quantization": "online", "quantization_config": LINEAR | {"moe": {"weight": "fp8_per_tensor_static"}}},
    ),
    # Experts of one width that two ranks do not divide have the ragged kernel, too.
    Case(("--quantization",), NOT_REACHED, "equal", {"quantization": "fp8"}, parallel(tensor_parallel_size=3)),
    *[
        Case(("--quantization",), "change experts alone, and this model has none", "llama", {"quantization": name})
        for name in ("experts_int8", "int8_per_channel_weight_only")
    ],
    Case(("--quantization-config",), "alone changes nothing", "llama", {"quantization_config": LINEAR}),
    *[
        Case(
            ("--quantization-config",),
            "int4_per_group_32 changes nothing in vLLM",
            model,
            {"quantization": "online", "quantization_config": LINEAR | {"moe": {"weight": "int4_per_group_32"}}},
        )
        for model in ("ragged", "equal")
    ],
    Case(("--enable-expert-parallel",), SPREAD, "equal", {"enable_expert_parallel": True}),
    Case(("--enable-eplb", "--enable-elastic-ep"), SPREAD, "equal", {}, parallel(enable_eplb=True)),
    Case(("--enable-elastic-ep",), SPREAD, "equal", {}, parallel(enable_elastic_ep=True)),
    Case(("--enable-dbo",), SPREAD, "ragged", {"enable_dbo": True}),
    Case(("--ubatch-size",), SPREAD, "ragged", {"ubatch_size": 2}),
    Case(("--data-parallel-size",), SPREAD, "ragged", {"data_parallel_size": 2}),
    Case(("--moe-backend",), "chooses among kernels for experts of one width", "mixed", {"moe_backend": "triton"}),
    Case(("--enable-return-routed-experts",), "reads the choices", "ragged", {"enable_return_routed_experts": True}),
    *[  # on a CPU those of one width have the ragged kernel, too, where they are quantized
        Case(
            (f"--{name.replace('_', '-')}",),
            "or are quantized on a CPU",
            "equal",
            {name: value, "quantization": "experts_int8"},
        )
        for name, value in {"moe_backend": "triton", "enable_return_routed_experts": True}.items()
    ],
    Case(
        ("--decode-context-parallel-size",),
        "share the KV cache out",
        "llama",
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
    ),
    Case(("--prefill-context-parallel-size",), "share the KV cache out", "llama", {"prefill_context_parallel_size": 2}),
    Case(
        ("--pipeline-parallel-size",),
        "gives stage 1 the layers 1 to 1, none of which has attention",
        "llama",
        {"pipeline_parallel_size": 3},
    ),
    *[
        Case(
            ("--kv-transfer-config",),
            CUT_BY_HEADS,
            "llama",
            {"kv_transfer_config": {"kv_connector": name, "kv_role": "kv_both"}},
        )
        for name in ("NixlConnector", "LMCacheConnectorV1", "MultiConnector")
    ],
    Case(
        ("--kv-offloading-backend",),
        CUT_BY_HEADS,
        "llama",
        {"kv_offloading_backend": "lmcache", "kv_offloading_size": 1},
    ),
    Case(
        ("--kv-cache-dtype", "--kv-cache-dtype-skip-layers"),
        "has scales by attn_head, which vLLM cuts by one number of heads",
        "llama",
        {"hf_overrides": {"quantization_config": STORED}},
    ),
    Case(("--load-format",), "read pickles", "llama", {"load_format": "pt"}),
    Case(("--load-format",), "read pickles", "llama", {"load_format": "npcache"}),
    Case(("--enable-mfu-metrics",), "counts operations by one size", "llama", {"enable_mfu_metrics": True}),
    Case(
        ("--hf-overrides",),
        "replace experts by constants",
        "equal",
        {"hf_overrides": {"approximate_experts": {"0": [1]}}},
    ),
    *[
        Case(("--hf-overrides", "--model-impl"), DENSE_SIZE, "llama", {"hf_overrides": {"architectures": [name]}})
        for name in ("LlamaForCausalLM", "LlamaModel", "LlamaForSequenceClassification")
    ],
    Case(("--tensor-parallel-size",), "is more than the 10 query heads", "llama", {"tensor_parallel_size": 11}),
    Case(
        ("--enable-lora",),
        "LoRA adapters have the unpadded shapes",
        "llama",
        {"tensor_parallel_size": 2, "enable_lora": True},
    ),
]


def ids(case: Case) -> str:
    return f"{case.model} {case.arguments or case.options}"


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_what_cannot_be_honoured_is_refused(models, case):
    if case.change is None:
        with pytest.raises(ValueError, match=re.escape(case.sentence)):
            vllm_config(models[case.model], **case.arguments)
        return
    config = vllm_config(models[case.model], **case.arguments)
    case.change(config)
    with pytest.raises(ValueError, match=re.escape(case.sentence)):
        check_options(config, model_layout(config))


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("ragged", {"quantization": "online", "quantization_config": LINEAR}),
        ("equal", {"quantization": "fp8_per_channel"}),
        ("ragged", {"quantization": "fp8_per_channel"}),
        ("mixed", {"quantization": "experts_int8"}),
        ("ragged", {"quantization": "int8_per_channel_weight_only"}),
        ("llama", {"quantization": "fp8_per_channel"}),
        ("llama", {"data_parallel_size": 2}),
        ("llama", {"pipeline_parallel_size": 2}),
        ("equal", {"moe_backend": "triton"}),
        ("llama", {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}),
        ("llama", {"kv_offloading_size": 1}),
        ("llama", {"load_format": "dummy"}),
        ("llama", {"runner": "pooling"}),
    ],
    ids=str,
)
def test_what_can_be_honoured_is_not_refused(models, model, arguments):
    vllm_config(models[model], **arguments)


def test_a_quantization_that_reaches_no_layer_is_refused(models):
    """Whatever vLLM does with a method that nobody has listed: what counts is what the layers got."""

    class Layer(LinearBase):
        def __init__(self, quant_method) -> None:
            torch.nn.Module.__init__(self)
            self.quant_method = quant_method

    config = json.loads((models["llama"] / "config.json").read_text())
    groups = {"0": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}}
    stored = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups}
    stored["ignore"] = ["plain"]
    geometry = ModelGeometry.from_config(config)
    online, on_disk = (
        ModelLayout.from_geometry(geometry, 1, Quantization.from_config(config | changes))
        for changes in ({}, {"quantization_config": stored})
    )
    plain, reached = Layer(UnquantizedLinearMethod()), Layer(object.__new__(Fp8PtpcOnlineLinearMethod))
    check_quantized(torch.nn.ModuleDict({"plain": plain}), None, online)
    check_quantized(torch.nn.ModuleDict({"plain": plain, "other": reached}), "fp8_per_channel", online)
    with pytest.raises(ValueError, match="quantization 'torchao' changes no layer of this pruned model"):
        check_quantized(torch.nn.ModuleDict({"plain": plain}), "torchao", online)
    check_quantized(torch.nn.ModuleDict({"plain": plain, "other": reached}), "compressed-tensors", on_disk)
    layers = {"plain": plain, "left": Layer(UnquantizedLinearMethod()), "other": reached}
    with pytest.raises(
        ValueError, match=r"in 1 layers:\n  - left: quantized in the checkpoint, but vLLM built it for pl"
    ):
        check_quantized(torch.nn.ModuleDict(layers), "compressed-tensors", on_disk)
    layers = {"plain": Layer(object.__new__(CompressedTensorsLinearMethod)), "other": reached}
    with pytest.raises(
        ValueError, match="in 1 layers:\n  - plain: plain in the checkpoint, but vLLM built it for Compr"
    ):
        check_quantized(torch.nn.ModuleDict(layers), "compressed-tensors", on_disk)


def test_all_that_is_wrong_is_said_at_once(models):
    with pytest.raises(ValueError) as error:
        vllm_config(models["ragged"], quantization="fp8", moe_backend="triton", data_parallel_size=2)
    for sentence in (NOT_REACHED, "chooses among kernels", SPREAD):
        assert sentence in str(error.value)


# The document.

TABLE = Path(options.__file__).with_name("OPTIONS.md").read_text()
VERDICTS = ("works", "inherited", "refused", "vLLM refuses", "no effect", "as stock")


def rows() -> list[tuple[list[str], str]]:
    """(options, what happens) of every row."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.splitlines() if line[:3] == "| `"]
    return [(re.findall(r"`([^`]+)`", row[0]), row[1]) for row in cells]


def test_the_table_has_every_option_of_vllm_once():
    parser = ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers())
    groups = {
        group.title: [action.option_strings[0] for action in group._group_actions if action.option_strings]
        for group in parser._action_groups
    }
    named = [name for names, _ in rows() for name in names]
    in_groups = [option for name in named if name in groups for option in groups[name]]
    known = [option for names in groups.values() for option in names]
    assert sorted(set(known) - set(named) - set(in_groups)) == [], "options that OPTIONS.md does not decide"
    assert sorted(set(named) - set(known) - set(groups)) == [], "OPTIONS.md has options that vLLM has not"
    assert len(named) == len(set(named)), "OPTIONS.md names an option twice"


def test_every_row_has_a_verdict():
    for names, what in rows():
        assert what.startswith(VERDICTS), f"{names}: {what}"


def test_what_the_table_calls_refused_is_tested():
    refused = {name for names, what in rows() if re.search(r"(?<!vLLM )refused", what) for name in names}
    assert refused == {option for case in CASES for option in case.options}
    assert {option for refusal in REFUSALS for option in refusal.options} <= refused
