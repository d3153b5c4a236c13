"""Experts of different widths with quantized weights: what reaches the kernel, on one rank and on several."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.compressed import SCHEMES, Scheme, round_weight, store
from vllm.config.quantization import resolve_quantization_config
from vllm.platforms import current_platform

from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.quantization import Quantization
from pruned_vllm.serving.expert_scheme import ExpertScheme, expert_problems, expert_scheme
from pruned_vllm.serving.expert_weights import make_parameters, place_experts, quantized
from pruned_vllm.serving.ragged_moe import RaggedExperts
from pruned_vllm.serving.sharding import shard_experts

HIDDEN = 64
WIDTHS = (17, 0, 70, 1, 33)
PROJECTIONS = {"w1": 0, "w3": 1}
CONFIG = {
    "architectures": ["PrunedQwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": HIDDEN,
    "vocab_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 70,
    "intermediate_size": 48,
    "per_layer_config": {"0": {"expert_intermediate_sizes": list(WIDTHS)}},
}
TAKEN = {
    "fp8-dynamic": ExpertScheme("fp8", quantizes_input=True),
    "w8a8-int8": ExpertScheme("int8", quantizes_input=True),
    "w8a16": ExpertScheme("int8"),
    "w4a16": ExpertScheme("int4"),
    "w4a16 in groups of 32": ExpertScheme("int4", 32),
}


def experts_on(rank: int, ranks: int, scheme: ExpertScheme | None, monkeypatch) -> RaggedExperts:
    monkeypatch.setattr("pruned_vllm.serving.ragged_moe.get_tensor_model_parallel_rank", lambda: rank)
    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    return RaggedExperts(vllm_config, WIDTHS, HIDDEN, "experts", scheme)


def wide(experts: RaggedExperts) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up [2, rows, hidden] and down [rows, hidden] in float32, by the definition of `Scales`."""

    def numbers(weight: torch.Tensor) -> torch.Tensor:
        if weight.dtype != torch.uint8:
            return weight.float()
        return torch.stack((weight & 15, weight >> 4), -1).flatten(-2).float() - 8

    size = experts.scheme.group_size
    gate_up = numbers(experts.gate_up) * experts.gate_up_scale.repeat_interleave(size or HIDDEN, -1)
    down = numbers(experts.down).clone()
    for rows, runs in zip(experts.offsets.unfold(0, 2, 1), experts.down_offsets.unfold(0, 2, 1), strict=True):
        for channel in range(rows[0], rows[1]):
            run = runs[0] + (channel - rows[0]) // (size or 10**6)
            assert run < runs[1]
            down[channel] *= experts.down_scale[run]
    return gate_up, down


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", TAKEN)
def test_weights_of_a_checkpoint_reach_the_kernel(name, ranks, monkeypatch):
    """The ranks' rows together are the experts' weights; nothing else is in them."""
    scheme, generator = SCHEMES[name], torch.Generator().manual_seed(0)
    stored, expected = [], {}
    for expert, width in enumerate(WIDTHS):
        for projection in ("w1", "w2", "w3") if width else ():
            shape = (HIDDEN, width) if projection == "w2" else (width, HIDDEN)
            rounded = round_weight(torch.randn(shape, generator=generator), scheme)
            if scheme.is_float:  # as llm-compressor writes them
                rounded = replace(rounded, scale=rounded.scale.bfloat16())
            parts = store(rounded, scheme)
            stored += [(f"{expert}.{projection}.{key}", value) for key, value in parts.items()]
            expected[expert, projection] = rounded.widened()
    found = {key: [] for key in expected}
    for rank in range(ranks):
        experts = experts_on(rank, ranks, TAKEN[name], monkeypatch)
        loaded = set(experts.load_weights(iter(stored)))
        assert loaded == {parameter for parameter, _ in experts.named_parameters()}
        gate_up, down = wide(experts)
        for (expert, projection), parts in found.items():
            rows = slice(experts.offsets[expert], experts.offsets[expert + 1])
            parts.append(down[rows].T if projection == "w2" else gate_up[PROJECTIONS[projection], rows])
    for (expert, projection), parts in found.items():
        together = torch.cat(parts, dim=1 if projection == "w2" else 0)
        torch.testing.assert_close(together, expected[expert, projection], rtol=0, atol=0)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number", ["int8", "fp8"])
def test_16_bit_weights_are_rounded_as_they_are_loaded(number, ranks, monkeypatch):
    """Rows of down_proj have one scale on all ranks, that of the whole row."""
    scheme, generator = ExpertScheme(number, is_online=True), torch.Generator().manual_seed(0)
    as_stored = SCHEMES["fp8-dynamic" if number == "fp8" else "w8a8-int8"]
    weights, expected = [], {}
    for expert, width in enumerate(WIDTHS):
        for projection in ("w1", "w2", "w3") if width else ():
            shape = (HIDDEN, width) if projection == "w2" else (width, HIDDEN)
            weight = torch.randn(shape, generator=generator).bfloat16()
            weights.append((f"{expert}.{projection}.weight", weight))
            expected[expert, projection] = round_weight(weight.float(), as_stored).widened()
    for rank in range(ranks):
        experts = experts_on(rank, ranks, scheme, monkeypatch)
        list(experts.load_weights(iter(weights)))
        gate_up, down = wide(experts)
        for (expert, projection), weight in expected.items():
            rows, channels = slice(*experts.offsets[expert : expert + 2]), experts.places[expert].channels
            held = down[rows].T if projection == "w2" else gate_up[PROJECTIONS[projection], rows]
            wanted = (
                weight[:, channels.start : channels.stop]
                if projection == "w2"
                else weight[channels.start : channels.stop]
            )
            torch.testing.assert_close(held, wanted, rtol=1e-6, atol=0)


def test_rows_of_zeros_stay_zeros():
    for number in ("int8", "fp8"):
        numbers, scale = quantized(torch.zeros(3, 5), ExpertScheme(number, is_online=True))
        assert not numbers.float().any() and scale.isfinite().all()


def test_nothing_is_padded_and_weights_are_as_small_as_their_kind():
    places = place_experts(shard_experts(WIDTHS, 1)[0], ExpertScheme("int4", 32))
    parameters = make_parameters(places, HIDDEN, ExpertScheme("int4", 32))
    rows = sum(WIDTHS)
    assert parameters["gate_up"].nbytes + parameters["down"].nbytes == 3 * rows * HIDDEN // 2
    assert parameters["gate_up_scale"].shape == (2, rows, 2)
    assert parameters["down_scale"].shape == (1 + 3 + 1 + 2, HIDDEN)  # a run for every 32 channels


@pytest.mark.parametrize(("is_cpu", "number", "expected"), [(True, "fp8", False), (False, "fp8", True),
                                                            (True, "int8", False), (False, "int8", False)])  # fmt: skip
def test_inputs_that_no_kernel_quantizes_are_named(is_cpu, number, expected, monkeypatch):
    monkeypatch.setattr("pruned_vllm.serving.ragged_moe.current_platform", SimpleNamespace(is_cpu=lambda: is_cpu))
    experts = experts_on(0, 1, ExpertScheme(number, quantizes_input=True), monkeypatch)
    assert experts.quantize_input == expected
    assert ("their inputs stay as they are" in experts._note()) == (not expected)
    assert experts_on(0, 1, ExpertScheme(number), monkeypatch)._note() == ""


# Which schemes are taken, and what is said of others.


def model_config(quantization: str | None, arguments: dict | None = None):
    return SimpleNamespace(
        quantization=quantization, quantization_config=resolve_quantization_config(quantization, arguments)
    )


def of_checkpoint(scheme: Scheme | dict, config: dict = CONFIG) -> ExpertScheme | None:
    stored = scheme if isinstance(scheme, dict) else scheme.config()
    quantization = Quantization.from_config({"quantization_config": stored})
    return expert_scheme(model_config(stored["quant_method"]), ModelGeometry.from_config(config), quantization, 0)


def online(name: str | None, arguments: dict | None = None) -> ExpertScheme | None:
    return expert_scheme(model_config(name, arguments), ModelGeometry.from_config(CONFIG), None, 0)


@pytest.mark.parametrize("name", TAKEN)
def test_schemes_of_checkpoints_that_are_taken(name):
    assert of_checkpoint(SCHEMES[name]) == TAKEN[name]
    assert of_checkpoint(replace(SCHEMES[name], ignore=(r"re:.*experts\..*",))) is None
    assert of_checkpoint(replace(SCHEMES[name], ignore=(r"re:.*layers\.1\..*",))) == TAKEN[name]


ONE_SCALE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}


def test_a_scale_for_a_tensor_is_taken_as_one_for_each_output():
    assert of_checkpoint(replace(SCHEMES["fp8-dynamic"], weights=ONE_SCALE)) == ExpertScheme(
        "fp8", quantizes_input=True
    )


W4, INT8 = SCHEMES["w4a16 in groups of 32"], SCHEMES["w8a8-int8"]
BLOCKS = ONE_SCALE | {"strategy": "block", "block_structure": [16, 16]}
REFUSED = {
    "asymmetric": (SCHEMES["w4a16 with zero points"], "zero points, packed, .*: the kernel has no zero points"),
    "static inputs": (SCHEMES["w8a8-int8 with stored scales of inputs"], "no stored scales of inputs"),
    "two bits": (replace(W4, weights=W4.weights | {"num_bits": 2}), "no weights of 2 bits"),
    "three bits": (replace(W4, weights=W4.weights | {"num_bits": 3}), "pack-quantized: int3 weights"),
    "groups": (replace(W4, weights=W4.weights | {"group_size": 48}), "groups of 48 do not divide hidden_size 64"),
    "blocks": (replace(SCHEMES["fp8-dynamic"], weights=BLOCKS),
               "a scale for each block of 16 x 16, .*: the kernel has no blocks"),
    "order of activations": (replace(W4, weights=W4.weights | {"actorder": "group"}), "order of activations"),
    "nvfp4": (replace(INT8, layout="nvfp4-pack-quantized"), "nvfp4-pack-quantized: int8 weights"),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "stores experts as fp8, float8_e4m3fn weights"),
    "gptq": (SCHEMES["gptq"], "as gptq, int4 weights"),
    "awq": (SCHEMES["awq"], "as awq, int4 weights"),
    "mxfp4": ({"quant_method": "mxfp4"}, "as mxfp4, mxfp4"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_schemes_of_checkpoints_are_refused_by_name(name):
    scheme, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=rf"(?s){sentence}.*such experts can have") as error:
        of_checkpoint(scheme)
    assert "does not reach experts of different widths" in str(error.value)


def test_experts_of_a_layer_must_be_stored_alike():
    with pytest.raises(ValueError, match="layer 0: its experts are stored in 2 different ways"):
        of_checkpoint(replace(INT8, ignore=(r"re:.*experts\.2\..*",)))


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        (None, None, None),
        ("fp8_per_channel", None, ExpertScheme("fp8", is_online=True, quantizes_input=True)),
        ("int8_per_channel_weight_only", None, ExpertScheme("int8", is_online=True)),
        ("experts_int8", None, ExpertScheme("int8", is_online=True)),
        ("online", {"moe": "int8_per_channel_static"}, ExpertScheme("int8", is_online=True)),
        ("online", {"linear": "fp8_per_channel_static"}, None),
        ("fp8_per_channel", {"ignore": ["model.layers.0.mlp.experts"]}, None),
        ("fp8_per_channel", {"ignore": ["*.layers.1.*"]}, ExpertScheme("fp8", is_online=True, quantizes_input=True)),
        ("online", {"targets": {"*.experts": "int8_per_channel_weight_only"}}, ExpertScheme("int8", is_online=True)),
        ("online", {"targets": {"*.self_attn.*": "fp8_per_channel"}}, None),
    ],
)
def test_what_is_asked_while_loading(name, arguments, expected):
    assert online(name, arguments) == expected


@pytest.mark.parametrize(
    "name", ["fp8_per_tensor", "fp8_per_block", "mxfp8", "mxfp4", "nvfp4_per_token", "fp8", "torchao", "humming", "inc"]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="does not reach experts of different widths; such experts can have"):
        online(name)


@pytest.mark.parametrize(
    ("name", "capability", "is_refused"),
    [
        ("fp8-dynamic", (8, 0), True),
        ("fp8-dynamic", (8, 9), False),
        ("fp8-dynamic", None, False),
        ("w8a8-int8", (8, 0), False),
    ],
)
def test_fp8_experts_are_refused_on_gpus_that_cannot_read_them(name, capability, is_refused, monkeypatch):
    assert of_checkpoint(SCHEMES[name]) == TAKEN[name]  # imports of vLLM what depends on the platform
    monkeypatch.setattr(current_platform, "is_cuda", lambda: capability is not None)
    monkeypatch.setattr(current_platform, "has_device_capability", lambda needed: capability >= needed)
    quantization = Quantization.from_config({"quantization_config": SCHEMES[name].config()})
    geometry = ModelGeometry.from_config(CONFIG)
    problems = expert_problems(model_config("compressed-tensors"), geometry, quantization, 1)
    assert len(problems) == is_refused
    assert all("compute capability 8.9" in problem and "experts_int8" in problem for problem in problems)


def test_experts_are_not_quantized_twice():
    quantization = Quantization.from_config({"quantization_config": INT8.config()})
    model = model_config("compressed-tensors", {"moe": "fp8_per_channel_static"})
    with pytest.raises(ValueError, match=re.escape("layer 0: its experts are quantized in the checkpoint")):
        expert_scheme(model, ModelGeometry.from_config(CONFIG), quantization, 0)
