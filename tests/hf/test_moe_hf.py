"""load_pruned on mixture-of-experts models: ragged experts in Transformers, and training them."""

import json
from pathlib import Path

import pytest
import torch
from helpers.dropped import restrict_to_experts_with_channels
from helpers.experts import router_of
from helpers.tiny import HF_MOE, converted, expert_masks, masks_for, oracle, prompts, stored_numbers, tiny_model
from safetensors.torch import load_file

from learner.model.masking import apply_masks
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.masked import CHANNEL_MASK_SITES
from pruned_vllm.hf.loading import load_pruned

WIDTH = 24
RAGGED = [[17, 0, 24, 5], [0, 0, 0, 0], [1, 2, 3, 4]]
HEADS = [[0, 0, 0.5, 2, 1, 1], [0, 0, 0, 0, 0, 0], [1, 0, 2, 3, 1, 1]]  # whole groups, no attention, an uneven group
WHOLE_HEADS = [[0, 0, 0, 0, 0, 0], [1, -2, 0.5, 3, 0.1, 1]]  # as attention with a latent vector has it
MIXED = {"mlp_only_layers": [1]}
NUM_TOKENS = 6
NO_SUCH_MASKS = ("gpt_oss", "gate_and_up")

# model_type, masks of heads, widths of dense MLPs, config
CASES = {
    "mixtral": ("mixtral", HEADS, [], {}),
    "mixtral, sliding window": ("mixtral", HEADS, [], {"sliding_window": 8}),
    "olmoe": ("olmoe", [], [], {}),
    "gpt_oss": ("gpt_oss", HEADS, [], {}),
    "qwen2_moe": ("qwen2_moe", HEADS, [], {}),
    "qwen2_moe, mixed": ("qwen2_moe", [], [11], MIXED),
    "qwen3_moe": ("qwen3_moe", HEADS, [], {"attention_bias": True}),
    "qwen3_next": ("qwen3_next", HEADS, [], {}),
    "qwen3_next, mixed": ("qwen3_next", HEADS, [11], MIXED),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", HEADS, [], {"attention_bias": True}),
    "qwen3_moe, mixed": ("qwen3_moe", HEADS, [11], MIXED),
    "glm4_moe": ("glm4_moe", HEADS, [], {}),
    "glm4_moe, a dense layer": ("glm4_moe", [], [11], {"first_k_dense_replace": 1, "use_qk_norm": False}),
    "deepseek_v2": ("deepseek_v2", WHOLE_HEADS, [11], {"first_k_dense_replace": 1}),
    "deepseek_v3": ("deepseek_v3", WHOLE_HEADS, [], {}),
    "glm4_moe_lite": ("glm4_moe_lite", [], [0], {"mlp_layer_types": ["sparse", "dense", "sparse"]}),
    "qwen3_moe, mixed, no mlp in layer 1": ("qwen3_moe", [], [0], MIXED),
}


def convert(tmp_path: Path, name: str, site: str = "product"):
    model_type, heads, dense_widths, config = CASES[name]
    width = 40 if config == MIXED else WIDTH
    model = tiny_model(model_type, 6, 3, width, **config)
    masks = expert_masks(model, RAGGED, dense_widths, [5, 0]) | masks_for(heads, [], model)
    return model, masks, converted(tmp_path, model, masks, site)


@pytest.mark.parametrize(
    ("name", "site"), [(name, site) for name in CASES for site in CHANNEL_MASK_SITES if (name, site) != NO_SUCH_MASKS]
)
def test_loaded_model_is_the_masked_model(tmp_path, name, site):
    model, masks, directory = convert(tmp_path, name, site)
    pruned, tokens = load_pruned(directory, dtype=torch.float32), torch.tensor(prompts()[-1:])
    assert isinstance(pruned, type(model))
    with torch.no_grad(), apply_masks(model, masks, site):
        torch.testing.assert_close(pruned(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    generated = pruned.generate(tokens, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0)
    continuation = generated[0, tokens.shape[1] :].tolist()
    assert oracle(model, masks, site, prompts()[-1], continuation)[0] == continuation


@pytest.mark.parametrize("name", CASES)
def test_saved_model_is_the_converted_model(tmp_path, name):
    _, _, directory = convert(tmp_path, name)
    geometry = ModelGeometry.from_config(json.loads((directory / "config.json").read_text()))
    pruned, saved = load_pruned(directory), tmp_path / "saved"
    assert stored_numbers(pruned) == geometry.num_parameters
    pruned.save_pretrained(saved, max_shard_size="100KB")
    shards = [load_file(path) for path in saved.glob("*.safetensors")]
    assert {name: tuple(x.shape) for shard in shards for name, x in shard.items()} == geometry.tensor_shapes()
    assert ModelGeometry.from_config(json.loads((saved / "config.json").read_text())) == geometry
    tokens = torch.tensor(prompts()[-1:])
    with torch.no_grad():  # weights that lie elsewhere in memory may be multiplied in another order
        torch.testing.assert_close(load_pruned(saved)(tokens).logits, pruned(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", HF_MOE)
def test_layers_with_their_own_number_of_experts(tmp_path, model_type):
    """The second layer has as many as a token is sent to. Loaded, saved and loaded again."""
    model = tiny_model(model_type, 6, 3, WIDTH)
    masks = expert_masks(model, [[17, 0, 24, 5], [0, 3, 0, 4], [8, 8, 8, 8]])
    directory = converted(tmp_path, model, masks, drop_empty_experts=True)
    restrict_to_experts_with_channels(model, masks)
    pruned, saved, tokens = load_pruned(directory), tmp_path / "saved", torch.tensor(prompts()[-1:])
    assert [tuple(router_of(layer.mlp).weight.shape) for layer in pruned.model.layers] == [
        (count, model.config.hidden_size) for count in (3, 2, 4)
    ]
    generated = pruned.generate(tokens, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0)
    continuation = generated[0, tokens.shape[1] :].tolist()
    assert oracle(model, masks, "product", prompts()[-1], continuation)[0] == continuation
    pruned.save_pretrained(saved)
    geometries = [ModelGeometry.from_config(json.loads((path / "config.json").read_text())) for path in
                  (directory, saved)]  # fmt: skip
    assert geometries[0] == geometries[1] and stored_numbers(pruned) == geometries[0].num_parameters
    with torch.no_grad():
        torch.testing.assert_close(load_pruned(saved)(tokens).logits, pruned(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe, mixed"])
def test_fine_tuning_moves_every_parameter(tmp_path, name):
    _, _, directory = convert(tmp_path, name)
    pruned = load_pruned(directory, dtype=torch.float32).train()
    before = {name: parameter.detach().clone() for name, parameter in pruned.named_parameters()}
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=1e-3)
    tokens = torch.tensor(prompts()[-1:])
    losses = []
    for _ in range(5):
        loss = pruned(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    unmoved = {name for name, parameter in pruned.named_parameters() if torch.equal(parameter, before[name])}
    gone = 2 if "mixed" in name else 1  # the layer that lost all channels of its experts: nothing reads its router
    assert unmoved <= {f"model.layers.{gone}.{rest}.weight" for rest in ("mlp.gate", "post_attention_layernorm")}


def test_stock_models_are_loaded_as_ever(tmp_path):
    """The pruned class of a family must not change how Transformers loads the family's own models."""
    model, _, directory = convert(tmp_path, "mixtral")
    load_pruned(directory)
    stock, tokens = type(model).from_pretrained(tmp_path / "ckpt"), torch.tensor(prompts()[-1:])
    with torch.no_grad():
        assert torch.equal(stock(tokens).logits, model(tokens).logits)


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    _, _, directory = convert(tmp_path, "mixtral")
    config = json.loads((directory / "config.json").read_text())
    config["per_layer_config"]["0"]["expert_intermediate_sizes"] = [17, 1, 23, 0]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="do not fit its config.json") as error:
        load_pruned(directory)
    problems = " ".join(error.value.problems)
    assert "experts.1.w1.weight: missing" in problems and "experts.3.w2.weight: not a tensor" in problems
    assert "experts.2.w3.weight: the file has [24, 96], config.json says [23, 96]" in problems


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_5_moe_text", "deepseek_v3", "gpt_oss"])
def test_lora(tmp_path, model_type):
    peft = pytest.importorskip("peft")
    _, _, directory = convert(tmp_path, model_type)
    pruned, tokens = load_pruned(directory, dtype=torch.float32), torch.tensor(prompts()[-1:])
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "q_b_proj", "kv_b_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(pruned, config)
    logits = tuned.eval()(tokens).logits
    tuned.merge_and_unload().save_pretrained(tmp_path / "tuned")
    torch.testing.assert_close(load_pruned(tmp_path / "tuned")(tokens).logits, logits, rtol=1e-3, atol=1e-4)


def test_what_transformers_lacks_is_refused(tmp_path):
    model = tiny_model("deepseek", 6, 3, 40)
    directory = converted(tmp_path, model, expert_masks(model, RAGGED))
    with pytest.raises(InputError, match="Transformers has no DeepseekForCausalLM.*served by vLLM"):
        load_pruned(directory)
