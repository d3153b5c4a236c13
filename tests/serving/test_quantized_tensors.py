"""Tensors of quantized checkpoints are judged by name, shape and dtype before anything starts, and layers looked up as
vLLM looks them up."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers.compressed import SCHEMES, to_bfloat16, write_quantized
from helpers.serving import Geometry, rewrite
from helpers.tiny import converted, expert_masks, masks_for, tiny_model
from safetensors.torch import load_file
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.quantization import Quantization, UnknownScheme
from pruned_vllm.formats.quantized_tensors import expected_tensors
from pruned_vllm.formats.tensor_check import TensorCheck
from pruned_vllm.serving.base import PrunedForCausalLM

WIDE = Geometry(((3, 1, 0, 4), (0, 0, 0, 0), (4, 3, 2, 1)), (64, 96, 0), group=4)  # vLLM's kernels take 32 channels


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    model = tiny_model("mixtral", 6, 3, 24)
    masks = expert_masks(model, [[17, 9, 24, 5], [1, 0, 3, 4], [24, 23, 1, 12]])
    root = tmp_path_factory.mktemp("sources")
    return {
        "llama": to_bfloat16(converted(root / "llama", *WIDE.model_and_masks())),
        "mixtral": to_bfloat16(converted(root / "mixtral", model, masks | masks_for([[0, 0, 1, 1, 1, 1]] * 3, []))),
    }


@pytest.fixture(scope="module")
def quantized(sources, tmp_path_factory):
    written = {}

    def write(model: str, scheme: str):
        if (model, scheme) not in written:
            target = tmp_path_factory.mktemp("quantized")
            written[model, scheme] = write_quantized(sources[model], target, SCHEMES[scheme]).directory
        return written[model, scheme]

    return write


def read(directory) -> None:
    EngineArgs(str(directory), max_model_len=128, skip_tokenizer_init=True).create_engine_config()


CHECKPOINTS = [(model, scheme) for model in ("llama", "mixtral") for scheme in ("fp8-dynamic", "w8a8-int8", "w4a16",
                                                                                "w4a16 in groups of 32")]  # fmt: skip


@pytest.mark.parametrize(("model", "scheme"), CHECKPOINTS)
def test_every_damage_to_every_kind_of_tensor_is_named(quantized, tmp_path, model, scheme):
    """Of each kind of tensor one is lost, one too large, one of another dtype; and one is unknown."""
    directory = shutil.copytree(quantized(model, scheme), tmp_path / "damaged")
    if torch.cpu._is_avx512_supported() or "w4a16" not in scheme:
        read(directory)
    expected = {}

    def change(tensors):
        kinds: dict[str, list[str]] = {}
        for name in sorted(tensors):
            kinds.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), []).append(name)
        for names in kinds.values():
            lost, *others = names
            shape = list(tensors.pop(lost).shape)
            expected[lost] = f"{lost} {shape}: missing"
            if others:
                wrong = others.pop()
                shape = list(tensors[wrong].shape)
                tensors[wrong] = torch.ones([size + 1 for size in shape], dtype=tensors[wrong].dtype)
                expected[wrong] = f"{wrong}: the file has {[size + 1 for size in shape]}, config.json says {shape}"
            if others:
                odd = others.pop()
                tensors[odd] = tensors[odd].to(torch.int16)
                expected[odd] = f"{odd}: the file has I16 numbers, config.json says"
        tensors["model.layers.2.self_attn.q_proj.weight_other"] = torch.ones(3)
        expected["other"] = "weight_other [3]: not a tensor of this model"

    rewrite(directory, change)
    with pytest.raises(ValueError) as error:
        read(directory)
    message = str(error.value)
    assert f"in {len(expected)} tensors" in message
    for sentence in expected.values():
        assert sentence in message, sentence


def test_what_is_loaded_is_judged_again(quantized):
    """As where the files are not in a directory, or a loader of vLLM's reads them in its own way."""
    directory = quantized("mixtral", "w4a16 in groups of 32")
    config = json.loads((directory / "config.json").read_text())
    model = SimpleNamespace(
        _geometry=ModelGeometry.from_config(config),
        _quantization=Quantization.from_config(config),
        _all_tensors_expected=True,
    )
    tensors = load_file(directory / "model.safetensors")
    assert dict(PrunedForCausalLM._checked(model, tensors.items())).keys() == tensors.keys()
    expert = "model.layers.0.block_sparse_moe.experts.2.w2"
    tensors[f"{expert}.weight_packed"] = tensors[f"{expert}.weight_packed"].float()
    del tensors[f"{expert}.weight_scale"]
    with pytest.raises(ValueError, match="in 2 tensors") as error:
        list(PrunedForCausalLM._checked(model, tensors.items()))
    assert f"{expert}.weight_packed: the file has F32 numbers, config.json says I32" in str(error.value)
    assert f"{expert}.weight_scale [96, 1]: missing" in str(error.value)


def test_weights_of_another_scheme_are_not_taken_by_value(quantized, tmp_path):
    """Both have `weight` and `weight_scale` of the same shapes; vLLM would copy 100.0 into an int8 as 100."""
    directory = shutil.copytree(quantized("llama", "fp8-dynamic"), tmp_path / "mixed")
    other = json.loads((quantized("llama", "w8a8-int8") / "config.json").read_text())["quantization_config"]
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": other}))
    with pytest.raises(ValueError, match="q_proj.weight: the file has F8_E4M3 numbers, config.json says I8"):
        read(directory)


CONFIG = {
    "architectures": ["PrunedQwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "hidden_size": 64,
    "vocab_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 32,
    "intermediate_size": 48,
    "mlp_only_layers": [1],
    "per_layer_config": {"0": {"expert_intermediate_sizes": [17, 0, 24, 5]}},
}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
NATIVE = {
    "fp8": {"activation_scheme": "dynamic", "weight_block_size": [32, 16]},
    "fp8, static": {"activation_scheme": "static", "modules_to_not_convert": ["model.layers.0.self_attn.o_proj"]},
    "gptq": {"bits": 4, "group_size": 16, "sym": True, "desc_act": False},
    "gptq, channel": {"bits": 8, "group_size": -1, "sym": True, "desc_act": False},
    "awq": {"bits": 4, "group_size": 16, "zero_point": True},
}


def stored_config(**changes) -> dict:
    groups = {"group_0": {"targets": ["Linear"], "weights": INT8}}
    return {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups} | changes


def names_and_numbers(stored_as: dict) -> dict:
    geometry = ModelGeometry.from_config(CONFIG)
    expected = expected_tensors(geometry, Quantization.from_config(CONFIG | {"quantization_config": stored_as}))
    return {
        f"{module}.{part}": (stored.shapes[0], stored.dtypes[0])
        for module, choices in expected.items()
        for part, stored in (choices or ({},))[0].items()
        if stored.is_required
    }


@pytest.mark.parametrize(
    ("method", "tensors"),
    [
        ("fp8", {"o_proj.weight": ((64, 128), "F8_E4M3"), "o_proj.weight_scale_inv": ((2, 8), "F32")}),
        ("fp8, static", {"q_proj.weight_scale": ((1,), "F32"), "q_proj.input_scale": ((1,), "F32"),
                         "o_proj.weight": ((64, 128), "F32")}),
        ("gptq", {"o_proj.qweight": ((16, 64), "I32"), "o_proj.scales": ((8, 64), "F32"),
                  "o_proj.qzeros": ((8, 8), "I32")}),
        ("gptq, channel", {"o_proj.qweight": ((32, 64), "I32"), "o_proj.scales": ((1, 64), "F32"),
                           "o_proj.qzeros": ((1, 16), "I32")}),
        ("awq", {"o_proj.qweight": ((128, 8), "I32"), "o_proj.scales": ((8, 64), "F32"),
                 "o_proj.qzeros": ((8, 8), "I32")}),
    ],
)  # fmt: skip
def test_native_formats(method, tensors):
    found = names_and_numbers(NATIVE[method] | {"quant_method": method.partition(",")[0]})
    for name, stored in tensors.items():
        assert found[f"model.layers.0.self_attn.{name}"] == stored
    assert found["model.layers.0.mlp.gate.weight"] == ((4, 64), "F32")  # the router


def test_gptq_may_leave_layers_plain_but_not_by_halves():
    geometry = ModelGeometry.from_config(CONFIG)
    stored_as = NATIVE["gptq"] | {"quant_method": "gptq"}
    quantization = Quantization.from_config(CONFIG | {"quantization_config": stored_as})

    def check(damage: str | None):
        checker = TensorCheck(geometry, quantization)
        for module, choices in expected_tensors(geometry, quantization).items():
            choice = choices[-1 if "o_proj" in module else 0]  # o_proj is plain
            for part, stored in choice.items():
                if stored.is_required and f"{module}.{part}" != damage:
                    checker.accepts(f"{module}.{part}", stored.shapes[0], stored.dtypes[0])
        if damage == "both":
            checker.accepts("model.layers.1.mlp.up_proj.weight", (48, 64), "BF16")
        checker.finish()

    check(None)
    with pytest.raises(ValueError, match=r"in 1 tensors.*\n.*layers.0.self_attn.q_proj.scales \[4, 128\]: missing"):
        check("model.layers.0.self_attn.q_proj.scales")
    with pytest.raises(ValueError, match="up_proj.weight: beside tensors of another kind"):
        check("both")


GROUPS = {
    "one": {"a": {"targets": ["Linear"], "weights": INT8}},
    "by name": {"a": {"targets": [r"re:.*self_attn\..*"], "weights": INT8},
                "b": {"targets": ["model.layers.1.mlp.down_proj"], "weights": FP8, "format": "naive-quantized"}},
    "names before classes": {"a": {"targets": ["Linear"], "weights": INT8},
                             "b": {"targets": [r"re:.*o_proj$"], "weights": FP8, "format": "naive-quantized"}},
    "a name twice": {"a": {"targets": ["Linear"], "weights": INT8},
                     "b": {"targets": ["Linear"], "weights": FP8, "format": "naive-quantized"}},
    "fused names": {"a": {"targets": [r"re:.*qkv_proj$", r"re:.*gate_up_proj$"], "weights": INT8}},
}  # fmt: skip
IGNORE = [[], ["lm_head", r"re:.*mlp.gate$"], [r"re:.*layers\.0\..*"], [r"re:.*down_proj"], [r"re:.*gate_up_proj$"]]
CLASSES = {"QKVParallelLinear": ("self_attn.qkv_proj", "self_attn.q_proj"),
           "RowParallelLinear": ("self_attn.o_proj", "self_attn.o_proj"),
           "MergedColumnParallelLinear": ("mlp.gate_up_proj", "mlp.up_proj")}  # fmt: skip


@pytest.mark.parametrize("ignore", IGNORE, ids=str)
@pytest.mark.parametrize("groups", GROUPS)
def test_layers_are_looked_up_as_vllm_does(groups, ignore):
    """vLLM by the name of the joined layer, we by that of each layer in the file."""
    stored = stored_config(format="pack-quantized", config_groups=GROUPS[groups], ignore=ignore)
    ours = Quantization.from_config({"quantization_config": stored})
    theirs = CompressedTensorsConfig.from_config(json.loads(json.dumps(stored)))
    theirs.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]
    }  # fmt: skip
    for class_name, (joined, single) in CLASSES.items():
        for layer in (0, 1):
            module = type(class_name, (torch.nn.Module,), {})()
            scheme = theirs.get_scheme_dict(module, f"model.layers.{layer}.{joined}")
            found = ours.scheme_of(f"model.layers.{layer}.{single}")
            assert (found is None) == (scheme is None)
            assert found is None or found.strategy == scheme["weights"].strategy


def test_what_is_not_known_is_left_to_vllm_but_the_rest_is_judged():
    geometry = ModelGeometry.from_config(CONFIG)
    for stored_as in (
        {"quant_method": "quark"},
        NATIVE["gptq"] | {"quant_method": "gptq", "bits": 3},
        stored_config(format="nvfp4-pack-quantized"),
        stored_config(config_groups={"a": {"targets": ["Linear"], "weights": INT8 | {"num_bits": 4}}}),
        stored_config(format="pack-quantized", config_groups={
            "a": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 16, "actorder": "group"}}}),
    ):  # fmt: skip
        quantization = Quantization.from_config(CONFIG | {"quantization_config": stored_as})
        assert isinstance(quantization.scheme_of("model.layers.0.self_attn.o_proj"), UnknownScheme)
        check = TensorCheck(geometry, quantization)
        assert check.accepts("model.layers.0.self_attn.o_proj.weight_global_scale", (7,), "U8")
        assert not check.accepts("model.norm.weight", (65,), "BF16")
        assert "model.layers.0.self_attn.o_proj" in check.unjudged and "model.norm" not in check.unjudged


def test_projections_that_vllm_joins_must_be_stored_alike():
    groups = {"a": {"targets": [r"re:.*(self_attn\.[kv]_proj|experts\.2\.gate_proj)$"], "weights": INT8}}
    quantization = Quantization.from_config({"quantization_config": stored_config(config_groups=groups)})
    with pytest.raises(ValueError) as error:
        TensorCheck(ModelGeometry.from_config(CONFIG), quantization, all_expected=False).finish()
    for sentence in (
        "vLLM computes model.layers.0.self_attn.q_proj and 2 more together, but",
        "vLLM computes model.layers.0.mlp.experts.0.gate_proj and 8 more together",
        "model.layers.1.self_attn.k_proj has int8 weights",
    ):
        assert sentence in str(error.value)


@pytest.mark.parametrize(
    "stored", [{}, [], {"quant_method": 8}, stored_config(config_groups={"a": ["Linear"]}),
               stored_config(config_groups={"a": {"targets": ["Linear"]}}), {"quant_method": "gptq"},
               stored_config(ignore=[1]), stored_config(ignore="lm_head"), stored_config(ignore=["re:("]),
               stored_config(config_groups={"a": {"targets": ["re:("], "weights": INT8}}),
               stored_config(config_groups={"a": {"targets": [1], "weights": INT8}}),
               *(stored_config(config_groups={"a": {"targets": ["Linear"], "weights": INT8 | {
                   "strategy": "group", "group_size": size}}}) for size in (0, -2, True, "a", None, 10**30)),
               stored_config(config_groups={"a": {"targets": ["Linear"], "weights": INT8 | {"symmetric": []}}}),
               NATIVE["gptq"] | {"quant_method": "gptq", "bits": 4.0},
               {"quant_method": "fp8", "weight_block_size": [0, 128]},
               {"quant_method": "fp8", "ignored_layers": [None]},
               NATIVE["gptq"] | {"quant_method": "gptq", "group_size": 0},
               NATIVE["awq"] | {"quant_method": "awq", "group_size": 0}], ids=str
)  # fmt: skip
def test_what_nobody_can_read_is_refused(stored):
    with pytest.raises(ValueError, match="quantization_config"):
        Quantization.from_config({"quantization_config": stored})


def test_scales_of_the_kv_cache_are_optional_unless_config_json_has_them():
    geometry = ModelGeometry.from_config(CONFIG)
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    without, with_scales = (names_and_numbers(stored_config(kv_cache_scheme=value)) for value in (None, scheme))
    assert set(with_scales) - set(without) == {
        f"model.layers.{layer}.self_attn.{letter}_scale" for layer in (0, 1) for letter in "kv"
    }
    check = TensorCheck(geometry, Quantization.from_config({"quantization_config": stored_config()}))
    assert check.accepts("model.layers.0.self_attn.k_scale", (), "BF16")
    assert not check.accepts("model.layers.1.self_attn.k_scale", (2,), "F32")
