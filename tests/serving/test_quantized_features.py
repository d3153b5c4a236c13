"""What users turn on works with quantized pruned models: the KV cache in fp8, adapters, drafts, several ranks."""

import itertools
import json
import shutil

import pytest
import torch
from helpers.compressed import SCHEMES, to_bfloat16, write_quantized
from helpers.emulation import emulated_differences, inputs_quantized, log_probabilities
from helpers.serving import NUM_TOKENS, Geometry, engine, generate, rewrite
from helpers.tiny import converted, expert_masks, masks_for, prompts, tiny_model
from safetensors.torch import load_file
from transformers.models.llama import modeling_llama
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from pruned_vllm.common.padding import PAD, head_rows
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.quantization import Quantization
from pruned_vllm.hf import load_pruned
from pruned_vllm.serving.model_layout import ModelLayout

# Uneven query groups, a layer without attention and one without MLP; widths that the kernel for 4 bits takes.
RAGGED = Geometry(((3, 1, 0, 4), (0, 0, 0, 0), (4, 3, 2, 1)), (64, 96, 0), group=4)
SCHEME = SCHEMES["fp8-dynamic"]
HAS_AVX512 = torch.cpu._is_avx512_supported()


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    root = tmp_path_factory.mktemp("ragged")
    return write_quantized(to_bfloat16(converted(root / "plain", *RAGGED.model_and_masks())), root, SCHEME)


def assert_close(found: torch.Tensor) -> None:
    """Far from what rounding does (0.1 and more), near enough for inputs that fell to the other side of a number.

    In float32 nothing else differs, see test_quantized.py; where caches or several ranks round too, few stay the same.
    """
    assert found.median() < 0.01 and found.mean() < 0.03, f"median {found.median():.6f}, mean {found.mean():.5f}"


@pytest.mark.skipif(not HAS_AVX512, reason="vLLM's KV cache in fp8 needs AVX-512 on a CPU")
def test_scales_of_the_kv_cache_reach_uneven_groups(ragged, tmp_path, monkeypatch):
    """Each layer's keys and values are rounded by that layer's own scale, which the file has."""
    scales = {0: (0.031, 0.017), 2: (0.023, 0.041)}
    directory = shutil.copytree(ragged.directory, tmp_path / "cache")
    config = json.loads((directory / "config.json").read_text())
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config["quantization_config"]["kv_cache_scheme"] = cache
    (directory / "config.json").write_text(json.dumps(config))

    def add(tensors):
        for layer, values in scales.items():
            for letter, value in zip("kv", values, strict=True):
                tensors[f"model.layers.{layer}.self_attn.{letter}_scale"] = torch.tensor([value])

    rewrite(directory, add)
    with engine(directory, kv_cache_dtype="fp8") as llm:
        outputs = generate(llm)
        held = llm.collective_rpc(cache_scales)[0]
    assert held == {layer: pytest.approx(values) for layer, values in scales.items()}

    model = load_pruned(ragged.widened, dtype=torch.float32)
    plain = emulated_differences(outputs, model, SCHEME)
    for layer, (_, scale) in scales.items():
        projection = model.model.layers[layer].self_attn.v_proj
        projection.register_forward_hook(lambda _, inputs, output, scale=scale: to_fp8(output, scale))
    keys, rotate = itertools.cycle([scale for scale, _ in scales.values()]), modeling_llama.apply_rotary_pos_emb

    def rotate_and_round(q, k, *args, **kwargs):
        q, k = rotate(q, k, *args, **kwargs)
        return q, to_fp8(k, next(keys))

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate_and_round)
    found = emulated_differences(outputs, model, SCHEME)
    assert_close(found)
    assert found.mean() < plain.mean() / 3, f"{found.mean():.4f}; without rounding {plain.mean():.4f}"


def cache_scales(worker) -> dict[int, tuple[float, float]]:
    layers = enumerate(worker.get_model().model.layers)
    ops = {index: getattr(layer.self_attn, "attn", None) for index, layer in layers}
    ops = {index: getattr(op, "attn", op) for index, op in ops.items() if op is not None}
    return {index: (op._k_scale_float, op._v_scale_float) for index, op in ops.items()}


def to_fp8(x: torch.Tensor, scale: float) -> torch.Tensor:
    """As vLLM's KV cache on CPUs has it: float8_e4m3fn with what does not fit into 3 bits cut off, not rounded."""
    numbers = (x / scale).clamp(-448, 448)
    step = 2.0 ** ((numbers.frexp().exponent - 1).clamp(min=-6) - 3)
    return (numbers / step).trunc() * step * scale


def test_scales_by_head_are_refused(ragged, tmp_path):
    directory = shutil.copytree(ragged.directory, tmp_path / "cache")
    config = json.loads((directory / "config.json").read_text())
    cache = {"num_bits": 8, "type": "float", "strategy": "attn_head", "dynamic": False, "symmetric": True}
    config["quantization_config"]["kv_cache_scheme"] = cache
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="kv_cache_scheme .* has scales by attn_head"), engine(directory):
        pass


@pytest.mark.slow
def test_lora_adapter_of_a_quantized_model(ragged, tmp_path):
    """The adapter adds to what the rounded layers compute, from inputs that are not rounded."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        load_pruned(ragged.widened, dtype=torch.float32),
        peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=5, detokenize=False, ignore_eos=True)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts()]
    with engine(ragged.directory, enable_lora=True, max_lora_rank=8) as llm:
        adapter = LoRARequest("tuned", 1, str(tmp_path / "adapter"))
        outputs = llm.generate(inputs, params, use_tqdm=False, lora_request=adapter)
    model.eval()
    assert_close(emulated_differences(outputs, model, SCHEME))
    with model.disable_adapter():
        assert emulated_differences(outputs, model, SCHEME).mean() > 0.1


@pytest.mark.slow
def test_quantized_target_with_a_draft(ragged):
    """The draft is the same model, so that a draft or a target that went wrong shows in what is accepted."""
    draft = {"method": "draft_model", "model": str(ragged.directory), "num_speculative_tokens": 3}
    with engine(ragged.directory, speculative_config=draft, disable_log_stats=False) as llm:
        outputs = generate(llm, logprobs=None, prompt_logprobs=None)
        counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    model = load_pruned(ragged.widened, dtype=torch.float32)
    for prompt, output in zip(prompts(), outputs, strict=True):
        tokens = [*prompt, *output.outputs[0].token_ids]
        with inputs_quantized(model, SCHEME):
            expected = log_probabilities(model, tokens)[len(prompt) - 1 :]
        served = expected.gather(1, torch.tensor(tokens[len(prompt) :])[:, None])[:, 0]
        assert (expected.max(-1).values - served).max() < 0.1  # greedy, but for what rounding makes of near ties
    accepted = counters["vllm:spec_decode_num_accepted_tokens"] / counters["vllm:spec_decode_num_draft_tokens"]
    assert accepted > 0.8  # what is drafted beyond the last token is cut off


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    model = tiny_model("qwen2_moe", 6, 3, 24)
    masks = expert_masks(model, [[17, 9, 24, 5], [1, 0, 3, 4], [16, 16, 16, 16]])
    heads = masks_for([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]], [])
    return to_bfloat16(converted(tmp_path_factory.mktemp("mixture"), model, masks | heads))


def test_experts_of_one_width_beside_others(mixture, tmp_path):
    """On a CPU vLLM has few kernels for quantized experts of one width; these are computed as the others are."""
    written = write_quantized(mixture, tmp_path, SCHEMES["w8a8-int8"], 63)
    with engine(written.directory) as llm:
        outputs = generate(llm)
        scheme = llm.collective_rpc(lambda worker: str(worker.get_model().model.layers[2].mlp.experts.scheme))[0]
    assert scheme == "int8, a scale for each output"
    model = load_pruned(written.widened, dtype=torch.float32)
    assert_close(emulated_differences(outputs, model, SCHEMES["w8a8-int8"]))


@pytest.mark.slow
def test_weights_are_loaded_again(mixture, tmp_path):
    """`reload_weights` of vLLM puts other weights into the same engine, quantized while they are loaded."""
    other = shutil.copytree(mixture, tmp_path / "other")
    rewrite(other, lambda tensors: tensors.update({name: tensor.flip(0) for name, tensor in load_file(
        mixture / "model.safetensors").items() if ".experts." in name and "down_proj" in name}))  # fmt: skip
    with engine(mixture, dtype="bfloat16", quantization="experts_int8") as llm:
        before = generate(llm)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        after = generate(llm)
    with engine(other, dtype="bfloat16", quantization="experts_int8") as llm:
        expected = generate(llm)
    tokens = [[output.outputs[0].token_ids for output in outputs] for outputs in (before, after, expected)]
    assert tokens[1] == tokens[2] != tokens[0]


RANKS = {
    "uneven GQA, fp8": ("llama", "fp8-dynamic", 2, {}),
    "uneven GQA, 4 bits in groups": ("llama", "w4a16 in groups of 32", 2, {"dtype": "float16"}),
    "experts, int8": ("mixture", "w8a8-int8", 3, {}),
    "experts, 4 bits in groups": ("mixture", "w4a16 in groups of 32", 2, {"dtype": "float16"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RANKS)
def test_ranks(ragged, mixture, tmp_path, monkeypatch, case):
    name, scheme, ranks, options = RANKS[case]
    if "4 bits" in case and not HAS_AVX512:
        pytest.skip("vLLM's kernel for 4 bits needs AVX-512")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1|0|1")
    source = mixture
    if name == "llama":
        source = to_bfloat16(converted(tmp_path, *RAGGED.model_and_masks()))
    elif "4 bits" in case:  # the shared experts are too narrow for vLLM's kernel
        model = tiny_model("qwen3_moe", 6, 3, 24)
        masks = expert_masks(model, [[17, 9, 24, 5], [1, 0, 3, 4], [24, 23, 1, 12]])
        source = to_bfloat16(converted(tmp_path, model, masks | masks_for([[0, 0, 1, 1, 1, 1]] * 3, [])))
    written = write_quantized(source, tmp_path / "written", SCHEMES[scheme], 63)
    with engine(written.directory, tensor_parallel_size=ranks, **options) as llm:
        outputs = generate(llm)
    model = load_pruned(written.widened, dtype=torch.float32)
    assert_close(
        emulated_differences(outputs, model, SCHEMES[scheme], shares=shares_of_inputs(written.directory, ranks))
    )


def shares_of_inputs(directory, ranks: int) -> dict[str, list[list[int]]]:
    """The inputs that each rank holds of projections whose inputs are shared out."""
    config = json.loads((directory / "config.json").read_text())
    geometry = ModelGeometry.from_config(config)
    layout, shares = ModelLayout.from_geometry(geometry, ranks, Quantization.from_config(config)), {}
    for number, layer in enumerate(layout.layers):
        prefix = f"model.layers.{number}"
        rows = head_rows(layer.query_index, geometry.head_dim).tolist()
        mlp = geometry.family.mlp_of(geometry.layers[number])
        for module, index in {"self_attn.o_proj": rows, f"{mlp}.down_proj": layer.channel_index}.items():
            size = len(index) // ranks
            parts = [index[rank * size : (rank + 1) * size] for rank in range(ranks)]
            shares[f"{prefix}.{module}"] = [[unit for unit in part if unit != PAD] for part in parts]
    return {module: [part for part in parts if part] for module, parts in shares.items()}
