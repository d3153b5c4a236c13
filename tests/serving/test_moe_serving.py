"""Experts of different widths on vLLM: the served model is the masked one, in all families that have experts."""

import json

import pytest
import torch
from helpers.dropped import restrict_to_experts_with_channels
from helpers.serving import NUM_TOKENS, assert_serves_the_masked_model, engine, rewrite
from helpers.tiny import MOE_CONFIGS, converted, expert_masks, masks_for, oracle, prompts, tiny_model
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.linear_attention import FULL
from pruned_vllm.hf import load_pruned

WIDTH = 24  # channels of each of the 4 experts in the dense models
RAGGED = [[17, 9, 24, 5], [1, 2, 3, 4], [24, 23, 1, 12]]
ONE_EMPTY = [[17, 0, 24, 5], [0, 2, 3, 4], [24, 23, 1, 0]]
LAYER_EMPTY = [[17, 9, 24, 5], [0, 0, 0, 0], [24, 23, 1, 12]]
UNIFORM = [[11] * 4] * 3
HALF_UNIFORM = [[16] * 4, [1, 2, 3, 4], [8] * 4]  # vLLM's own fused experts beside ragged ones
HEADS = [[0, 0, 0.5, 2, 1, 1], [0, 0, 0, 0, 0, 0], [1, 0, 2, 3, 1, 1]]  # whole groups, no attention, an uneven group
LINEAR_FAMILIES = ("qwen3_next", "qwen3_5_moe_text")
WHOLE_HEADS = [[0.5, 2, 3, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 0.1, 2, 3, 1, 1]]  # all of them or none
FIRST_DENSE = {"deepseek"}  # their first layer has an MLP in place of experts
LATENT = [name for name in MOE_CONFIGS if FAMILIES[name].latent_attention]


def model_and_masks(model_type: str, widths: list[list[int]], heads: bool = False, **config):
    """Dense MLPs keep 17 channels of 24, but for those of DeepSeekMoE, which keep all.

    Shared experts keep 9 channels in one layer and none in the next, but where layers are to come out equal.
    """
    model = tiny_model(model_type, 6, 6 if model_type == "deepseek" else 3, WIDTH, **config)
    first_dense = model_type in FIRST_DENSE
    masks = expert_masks(
        model,
        widths[1:] if first_dense else widths,
        [] if first_dense else [17] * len(widths),
        [] if widths is UNIFORM else [9, 0],
    )
    if heads and model_type != "olmoe":
        masks |= masks_for(WHOLE_HEADS if model_type in LATENT else HEADS, [], model)
    return model, masks


PATTERNS = {
    "ragged": (RAGGED, False),
    "an empty expert everywhere, heads": (ONE_EMPTY, True),
    "an empty layer": (LAYER_EMPTY, False),
    "uniform": (UNIFORM, False),
    "uniform layers beside a ragged one, heads": (HALF_UNIFORM, True),
}
EIGHT = [[17, 0, 24, 5, 3, 2, 1, 9], [11] * 8, [0, 2, 3, 4, 24, 1, 1, 6]]
GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}
YARN = {
    "rope_parameters": {
        **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
        **{"mscale": 0.7, "mscale_all_dim": 0.5, "beta_fast": 8, "beta_slow": 1},
    }
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "hidden_size": 192}  # otherwise a stock model
OTHERWISE = {  # than every published gpt-oss, and than vLLM's own class takes for granted
    "attention_bias": False,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "rms_norm_eps": 0.05,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e3},
}
FULL_ATTENTION = {"layer_types": [FULL] * 3}  # what vLLM computes in float32 on CPUs, too
CASES = {
    f"{model_type}, {name}": (model_type, *PATTERNS[name], {}) for model_type in MOE_CONFIGS for name in PATTERNS
} | {
    "qwen3_moe, a dense layer": ("qwen3_moe", RAGGED, True, {"mlp_only_layers": [1], "norm_topk_prob": False}),
    "qwen2_moe, every second layer": ("qwen2_moe", RAGGED, True, {"decoder_sparse_step": 2, "norm_topk_prob": True}),
    "mixtral, sliding window": ("mixtral", RAGGED, True, {"sliding_window": 8, "norm_topk_prob": False}),  # not its key
    "olmoe, norms and router": ("olmoe", UNIFORM, False, {"rms_norm_eps": 0.05, "norm_topk_prob": True}),
    "gpt_oss, no biases, windows elsewhere, norms": ("gpt_oss", RAGGED, True, OTHERWISE),
    "qwen2_moe, windows in some layers": ("qwen2_moe", UNIFORM, False, WINDOWS),
    "glm4_moe, a dense layer, no norms of heads": (
        "glm4_moe",
        RAGGED,
        True,
        {"first_k_dense_replace": 1, "use_qk_norm": False, "attention_bias": False, "partial_rotary_factor": 0.25},
    ),
    "qwen3_next, full attention alone": ("qwen3_next", ONE_EMPTY, True, FULL_ATTENTION),
    "qwen3_5_moe_text, full attention alone": ("qwen3_5_moe_text", ONE_EMPTY, True, FULL_ATTENTION),
    "deepseek_v3, groups of experts, yarn": ("deepseek_v3", EIGHT, True, GROUPS | YARN),
    "deepseek_v2, groups, low rank of queries": (
        "deepseek_v2",
        EIGHT,
        False,
        GROUPS | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0, "q_lora_rank": 20},
    ),
    "glm4_moe_lite, dense layers between": (
        "glm4_moe_lite",
        RAGGED,
        False,
        {"mlp_layer_types": ["dense", "sparse", "dense"], "q_lora_rank": None},
    ),
}


def is_slow(model_type: str, name: str) -> bool:
    """What one family shows for all, and stock results of families of which another case is served."""
    if model_type in LINEAR_FAMILIES:
        return (model_type, name) != ("qwen3_5_moe_text", "an empty expert everywhere, heads")
    shown_by_qwen3_moe = ("ragged", "an empty layer", "uniform layers beside a ragged one, heads")
    return (model_type != "qwen3_moe" and name in shown_by_qwen3_moe) or (
        model_type in ("olmoe", "qwen2_moe", "deepseek_v2", "glm4_moe_lite") and name == "uniform"
    )


@pytest.mark.parametrize(
    ("model_type", "widths", "heads", "config"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] * is_slow(*name.split(", ", 1)))
        for name, case in CASES.items()
    ],
)
def test_served_model_is_the_masked_model(tmp_path, model_type, widths, heads, config):
    model, masks = model_and_masks(model_type, widths, heads, **config)
    directory = converted(tmp_path, model, masks)
    assert_serves_the_masked_model(directory, model, masks)


# Widths of which 0 is dropped: other numbers of experts in each layer, as many as the router chooses in the second one.
DROPPED = [[17, 0, 24, 5], [0, 3, 0, 4], [24, 23, 1, 12]]
DROPPED_EQUAL = [[8, 0, 8, 8], [0, 8, 0, 8], [8, 8, 8, 8]]  # vLLM's own expert layers, each with its own number
DROPPED_ALIKE = [[24, 0, 24, 24], [0, 24, 24, 24], [24, 24, 24, 0]]  # a stock model


@pytest.mark.parametrize(
    ("model_type", "widths", "ranks", "config"),
    [
        ("qwen3_moe", DROPPED, 1, {}),
        *(pytest.param(name, DROPPED, 1, {}, marks=pytest.mark.slow) for name in MOE_CONFIGS if name != "qwen3_moe"),
        pytest.param("mixtral", DROPPED_EQUAL, 1, {}, marks=pytest.mark.slow),
        pytest.param("qwen2_moe", DROPPED_ALIKE, 1, {"hidden_size": 192}, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", DROPPED, 2, {}, marks=pytest.mark.slow),
        pytest.param("glm4_moe", DROPPED_ALIKE, 1, {}, marks=pytest.mark.slow),
        pytest.param("qwen2_moe", DROPPED_EQUAL, 3, {"vocab_size": 257}, marks=pytest.mark.slow),
    ],
)
def test_experts_that_are_dropped_are_never_chosen(tmp_path, monkeypatch, model_type, widths, ranks, config):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1|0|1" if ranks > 1 else "auto")
    model, masks = model_and_masks(model_type, widths, widths is DROPPED, **config)
    directory = converted(tmp_path, model, masks, drop_empty_experts=True)
    written = json.loads((directory / "config.json").read_text())
    assert ("per_layer_config" in written) == (widths is not DROPPED_ALIKE) and written["pruning"]["exact"] is False
    restrict_to_experts_with_channels(model, masks)
    options = {"tensor_parallel_size": ranks} if ranks > 1 else {}
    assert_serves_the_masked_model(directory, model, masks, **options)


def test_masks_on_both_projections(tmp_path):
    model, masks = model_and_masks("qwen3_moe", ONE_EMPTY, True)
    directory = converted(tmp_path, model, masks, "gate_and_up")
    assert_serves_the_masked_model(directory, model, masks, "gate_and_up")


@pytest.mark.parametrize(
    "model_type", ["qwen2_moe", *[pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek_v3", "gpt_oss")]]
)
def test_compiled(tmp_path, model_type):
    model, masks = model_and_masks(model_type, ONE_EMPTY, True)
    directory = converted(tmp_path, model, masks)
    assert_serves_the_masked_model(directory, model, masks, enforce_eager=False)


# Layers of ragged experts, of experts that ranks divide (vLLM's own) and that they do not, shared experts of odd width.
MIXED_WIDTHS = [[8] * 4, [1, 2, 3, 4], [11] * 4]
ODD_SHARED = {"shared_expert_intermediate_size": 21}


@pytest.mark.parametrize(
    ("ranks", "model_type", "widths", "config"),
    [
        (2, "qwen3_moe", ONE_EMPTY, {}),
        (2, "gpt_oss", ONE_EMPTY, {}),
        pytest.param(4, "gpt_oss", RAGGED, {"vocab_size": 257}, marks=pytest.mark.slow),
        pytest.param(4, "qwen2_moe", MIXED_WIDTHS, {"vocab_size": 331, **ODD_SHARED}, marks=pytest.mark.slow),
        pytest.param(2, "mixtral", LAYER_EMPTY, {}, marks=pytest.mark.slow),
        pytest.param(2, "deepseek", RAGGED, {}, marks=pytest.mark.slow),
        pytest.param(2, "qwen3_5_moe_text", ONE_EMPTY, ODD_SHARED | FULL_ATTENTION, marks=pytest.mark.slow),
        (2, "glm4_moe", ONE_EMPTY, {"first_k_dense_replace": 1}),
        pytest.param(3, "deepseek_v3", ONE_EMPTY, {}, marks=pytest.mark.slow),
        pytest.param(3, "qwen2_moe", [[9] * 4, *RAGGED[1:]], {"vocab_size": 257, **ODD_SHARED}, marks=pytest.mark.slow),
        pytest.param(3, "qwen3_moe", ONE_EMPTY, {"tie_word_embeddings": True}, marks=pytest.mark.slow),
    ],
)
def test_ranks(tmp_path, monkeypatch, ranks, model_type, widths, config):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1|0|1")
    model, masks = model_and_masks(model_type, widths, True, **config)
    directory = converted(tmp_path, model, masks)
    assert_serves_the_masked_model(directory, model, masks, tensor_parallel_size=ranks)


def test_gpt_oss_with_an_adapter_and_what_vllm_sets_for_it(tmp_path):
    peft = pytest.importorskip("peft")
    model, masks = model_and_masks("gpt_oss", ONE_EMPTY, True)
    directory = converted(tmp_path, model, masks)
    tuned = load_pruned(directory, dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(tuned, config).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    with engine(directory, enable_lora=True, max_lora_rank=8) as llm:
        adapter = LoRARequest("tuned", 1, str(tmp_path / "adapter"))
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=5, detokenize=False, ignore_eos=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts()]
        outputs = llm.generate(inputs, params, use_tqdm=False, lora_request=adapter)
        assert llm.llm_engine.vllm_config.structured_outputs_config.reasoning_parser == "openai_gptoss"
    for prompt, output in zip(prompts(), outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        preferred, expected = oracle(tuned.get_base_model(), {}, "product", prompt, tokens)
        assert tokens == preferred
        for position, logprobs in enumerate(output.outputs[0].logprobs, len(prompt) - 1):
            assert all(abs(found.logprob - expected[position, token]) < 1e-4 for token, found in logprobs.items())


def test_missing_and_wrong_expert_tensors_are_named(tmp_path):

    model, masks = model_and_masks("mixtral", RAGGED)
    directory = converted(tmp_path, model, masks)

    def change(tensors):
        del tensors["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
        tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"] = torch.ones(96, 4)

    rewrite(directory, change)
    with pytest.raises(ValueError, match="does not fit its config.json in 2 tensors") as error, engine(directory):
        pass
    assert "model.layers.0.block_sparse_moe.experts.1.w3.weight [9, 96]: missing" in str(error.value)
    assert "experts.2.w2.weight: the file has [96, 4], config.json says [96, 3]" in str(error.value)


def test_weights_are_stored_without_padding(tmp_path):
    """What a rank allocates for ragged experts is what the file holds, to the row."""
    model, masks = model_and_masks("qwen3_moe", ONE_EMPTY)
    directory = converted(tmp_path, model, masks)
    config = json.loads((directory / "config.json").read_text())
    assert config["per_layer_config"]["0"]["expert_intermediate_sizes"] == [17, 0, 24, 5]
    with engine(directory, load_format="dummy") as llm:

        def rows(worker):
            layers = worker.get_model().model.layers
            return [len(layer.mlp.experts.offsets) and int(layer.mlp.experts.offsets[-1]) for layer in layers]

        assert llm.collective_rpc(rows)[0] == [46, 9, 48]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", LATENT)
def test_ranks_that_do_not_divide_whole_attention_are_refused(tmp_path, model_type):
    model, masks = model_and_masks(model_type, ONE_EMPTY)
    directory = converted(tmp_path, model, masks)
    with (
        pytest.raises(ValueError, match="no head can be padded, since .* keeps one latent vector"),
        engine(directory, tensor_parallel_size=4),
    ):
        pass


@pytest.mark.slow
def test_a_latent_vector_for_all_heads_is_cached_once(tmp_path):
    """As many bytes a token as the geometry says: none for the layer without attention."""
    model, masks = model_and_masks("deepseek_v2", RAGGED, True)
    directory = converted(tmp_path, model, masks)
    geometry = ModelGeometry.from_config(json.loads((directory / "config.json").read_text()))
    with engine(directory) as llm:

        def shapes(worker):
            return [cache.shape for cache in worker.model_runner.kv_caches]

        found = llm.collective_rpc(shapes)[0]
        assert len(found) == 2 and all(shape[-1] == 576 for shape in found)
    assert geometry.kv_cache_bytes_per_token(4) == 2 * 576 * 4


@pytest.mark.slow
def test_float16_is_not_divided_by_what_nothing_multiplies(tmp_path):
    """vLLM's DeepSeek layer divides its states by the router's factor in float16."""
    model, masks = model_and_masks("deepseek_v3", RAGGED, routed_scaling_factor=8.0)
    directory = converted(tmp_path, model, masks)
    tokens = prompts()[-1]
    with engine(directory, dtype="float16") as llm:
        (output,) = llm.generate([{"prompt_token_ids": tokens}], SamplingParams(max_tokens=1, prompt_logprobs=1))
    expected = oracle(model, masks, "product", tokens[:1], tokens[1:])[1]
    found = [(position, *item) for position, row in enumerate(output.prompt_logprobs[1:]) for item in row.items()]
    differences = [abs(value.logprob - expected[position, token].item()) for position, token, value in found]
    assert sorted(differences)[len(differences) // 2] < 0.1, f"up to {max(differences):.2g}"
