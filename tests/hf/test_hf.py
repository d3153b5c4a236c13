"""load_pruned: a converted model in Transformers computes what the masked dense model computes, and can be trained."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from helpers.tiny import NUM_LAYERS, converted, masks_for, oracle, prompts, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, DynamicCache

from learner.model.masking import apply_masks
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.hf.loading import load_pruned

WIDTH = 40
NUM_TOKENS = 6


@dataclass(frozen=True)
class Case:
    """What the masks leave: query heads of each layer by index, FFN width of each layer."""

    heads: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...] = (17, 1, 39)
    model_type: str = "llama"
    dense: tuple[int, int] = (6, 6)  # query and KV heads
    site: str = "product"
    config: dict = field(default_factory=dict)

    def convert(self, tmp_path: Path):
        """The dense model, its masks and the directory of the converted model."""
        model = tiny_model(self.model_type, *self.dense, WIDTH, **self.config)
        generator = torch.Generator().manual_seed(7)

        def mask(units: int, kept: torch.Tensor) -> torch.Tensor:
            values = 0.2 + 7.8 * torch.rand(len(kept), generator=generator) ** 3  # soft, as DDP learns them
            return torch.zeros(units).index_put((kept,), values)

        masks = masks_for(
            [mask(self.dense[0], torch.tensor(kept, dtype=torch.long)).tolist() for kept in self.heads],
            [mask(WIDTH, torch.randperm(WIDTH, generator=generator)[:width]) for width in self.widths],
        )
        return model, masks, converted(tmp_path, model, masks, self.site)


MHA = ((0, 1, 2, 5), (3,), (0, 1, 2, 3, 4, 5))
GQA = ((0, 1, 4, 5), (2, 3), (0, 1, 2, 3, 4, 5))  # whole groups of 2
UNEVEN = ((0, 1, 2, 5, 9, 11), (4, 5, 6, 7, 8), (0, 4, 5, 8, 9))  # groups of 4 become [3, 1, 2], [4, 1], [1, 2, 2]
BIASES = {"attention_bias": True, "mlp_bias": True}
LAYER_TYPES = {
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 8,
    "use_sliding_window": True,
}
# Its lists have one number for each two numbers of a head that are rotated; texts beyond 64 tokens take the second.
LONGROPE = {
    "hidden_size": 192,
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        **{"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        **{"short_factor": [1.0 + i / 4 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]},
    },
}
# A norm makes the sign of what a single channel adds, so that rounding shows where that is nearly 0.
NOT_ONE = (17, 6, 39)
NO_CHANNELS = (0,) * NUM_LAYERS
NO_HEADS = ((),) * NUM_LAYERS

CASES = {
    "llama": Case(MHA),
    "llama, gate and up": Case(MHA, site="gate_and_up"),
    "llama, biases": Case(MHA, config=BIASES),
    "llama, biases, gate and up": Case(MHA, config=BIASES, site="gate_and_up"),
    "llama, tied": Case(MHA, config={"tie_word_embeddings": True}),
    "llama, uneven": Case(UNEVEN, dense=(12, 3)),
    "llama, uneven, biases": Case(UNEVEN, dense=(12, 3), config=BIASES),
    "llama, one layer uneven": Case((GQA[0], (0, 2, 3), GQA[2]), dense=(6, 3)),
    "llama, no attention in layer 0": Case(((), *MHA[1:])),
    "llama, no attention in layers 0 and 1": Case(((), (), UNEVEN[2]), dense=(12, 3)),
    "llama, no attention": Case(NO_HEADS),
    "llama, no attention, biases": Case(NO_HEADS, config=BIASES),
    "llama, no mlp in layer 1": Case(MHA, (17, 0, 39)),
    "llama, no mlp, biases": Case(MHA, NO_CHANNELS, config=BIASES),
    "llama, layer 1 gone": Case((MHA[0], (), MHA[2]), (17, 0, 39)),
    "llama, everything gone but biases": Case(NO_HEADS, NO_CHANNELS, config=BIASES),
    "llama, everything gone": Case(NO_HEADS, NO_CHANNELS),
    "mistral": Case(MHA, model_type="mistral", config={"sliding_window": None}),
    "mistral, sliding window": Case(GQA, model_type="mistral", dense=(6, 3), config={"sliding_window": 8}),
    "mistral, sliding window, uneven, no attention in layer 0": Case(
        ((), *UNEVEN[1:]), model_type="mistral", dense=(12, 3), config={"sliding_window": 8}
    ),
    "qwen2": Case(GQA, model_type="qwen2", dense=(6, 3), site="gate_and_up"),
    "qwen2, nothing pruned": Case((GQA[2],) * NUM_LAYERS, (WIDTH,) * NUM_LAYERS, "qwen2", (6, 3)),
    "qwen2, uneven, layer types": Case(UNEVEN, model_type="qwen2", dense=(12, 3), config=LAYER_TYPES),
    "qwen2, layer types, no full attention": Case(((), (0, 1), ()), model_type="qwen2", config=LAYER_TYPES),
    "qwen3": Case(GQA, model_type="qwen3", dense=(6, 3)),
    "qwen3, uneven, biases, tied": Case(
        UNEVEN, model_type="qwen3", dense=(12, 3), config={"attention_bias": True, "tie_word_embeddings": True}
    ),
    "gemma3": Case(GQA, NOT_ONE, "gemma3_text", (6, 3)),
    "gemma3, uneven, gate and up": Case(UNEVEN, NOT_ONE, "gemma3_text", (12, 3), "gate_and_up"),
    "gemma3, uneven, biases, not tied": Case(
        UNEVEN, NOT_ONE, "gemma3_text", (12, 3), config={"attention_bias": True, "tie_word_embeddings": False}
    ),
    "gemma3, no attention in layer 0, no mlp in layer 1": Case(((), *MHA[1:]), (17, 0, 39), "gemma3_text"),
    "gemma3, layer 1 gone": Case((MHA[0], (), MHA[2]), (17, 0, 39), "gemma3_text"),
    "gemma3, everything gone": Case(NO_HEADS, NO_CHANNELS, "gemma3_text"),
    "phi3": Case(MHA, model_type="phi3", config={"sliding_window": 8}),
    "phi3, gate and up": Case(GQA, model_type="phi3", dense=(6, 3), site="gate_and_up"),
    "phi3, uniform": Case(((0, 1, 2),) * NUM_LAYERS, (8,) * NUM_LAYERS, "phi3"),
    "phi3, nothing pruned": Case((MHA[2],) * NUM_LAYERS, (WIDTH,) * NUM_LAYERS, "phi3"),
    "phi3, uneven, half of a head rotated": Case(
        UNEVEN, model_type="phi3", dense=(12, 3), config={"partial_rotary_factor": 0.5}
    ),
    "phi3, longrope": Case(GQA, model_type="phi3", dense=(6, 3), config=LONGROPE),
    "phi3, no attention in layer 0, no mlp in layer 1": Case(((), *MHA[1:]), (17, 0, 39), "phi3"),
    "phi3, layer 1 gone": Case((MHA[0], (), MHA[2]), (17, 0, 39), "phi3"),
    "ministral3": Case(MHA, model_type="ministral3"),
    "ministral3, uneven, sliding window": Case(
        UNEVEN, model_type="ministral3", dense=(12, 3), config={"sliding_window": 8}
    ),
    "ministral3, layer 1 gone, gate and up": Case((MHA[0], (), MHA[2]), (17, 0, 39), "ministral3", site="gate_and_up"),
    "qwen3, layer types, no sliding attention": Case(
        ((0, 1, 2), (), (3,)), model_type="qwen3", config=LAYER_TYPES | {"attention_bias": True}
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loaded_model_is_the_masked_model(tmp_path, case):
    model, masks, directory = case.convert(tmp_path)
    pruned = load_pruned(directory, dtype=torch.float32)
    assert type(pruned).__name__ == f"Pruned{type(model).__name__}" and isinstance(pruned, type(model))
    longest = max(map(len, prompts()))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts()])
    attended = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts()])
    tokens = torch.tensor(prompts()[-1:])
    with torch.no_grad(), apply_masks(model, masks, case.site):
        logits = model(tokens).logits
    for implementation in ("sdpa", "eager"):
        pruned.set_attn_implementation(implementation)
        assert {attention.config._attn_implementation for attention in stock_attentions(pruned)} <= {implementation}
        with torch.no_grad():
            torch.testing.assert_close(pruned(tokens).logits, logits, rtol=1e-4, atol=1e-4)
        continued = pruned.generate(
            padded, attention_mask=attended, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0
        )
        for prompt, generated in zip(prompts(), continued[:, longest:].tolist(), strict=True):
            assert len(generated) == NUM_TOKENS and oracle(model, masks, case.site, prompt, generated)[0] == generated


def stock_attentions(model) -> list:
    return [layer.self_attn for layer in model.model.layers if hasattr(layer.self_attn, "q_proj")]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_saved_model_is_the_converted_model(tmp_path, case):
    _, _, directory = case.convert(tmp_path)
    geometry = ModelGeometry.from_config(json.loads((directory / "config.json").read_text()))
    pruned, saved = load_pruned(directory), tmp_path / "saved"
    pruned.save_pretrained(saved, max_shard_size="100KB")
    assert load_shapes(saved) == geometry.tensor_shapes()
    config = json.loads((saved / "config.json").read_text())
    assert ModelGeometry.from_config(config) == geometry
    assert config["architectures"] == [geometry.family.pruned_architecture]
    assert config["pruning"] == json.loads((directory / "config.json").read_text())["pruning"]
    assert config["allow_global_per_layer_attribute_access"] is True
    assert AutoConfig.from_pretrained(saved).to_dict()["per_layer_config"] == config["per_layer_config"]
    tokens = torch.tensor(prompts()[-1:])
    with torch.no_grad():
        assert torch.equal(load_pruned(saved)(tokens).logits, pruned(tokens).logits)


def load_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    shards = [load_file(path) for path in directory.glob("*.safetensors")]
    return {name: tuple(tensor.shape) for shard in shards for name, tensor in shard.items()}


def test_cache_holds_each_kv_head_once(tmp_path):
    _, _, directory = CASES["llama, no attention in layers 0 and 1"].convert(tmp_path)
    cache = load_pruned(directory)(torch.tensor(prompts()[-1:])).past_key_values
    assert [layer.keys.shape for layer in cache.layers] == [(1, 1, 40, 1), (1, 1, 40, 1), (1, 3, 40, 32)]


@pytest.mark.parametrize("keyword", ["past_key_values", "cache"])  # before Transformers 5.24, and since
def test_attention_takes_its_cache_by_either_name(tmp_path, keyword):
    _, _, directory = Case(((), *UNEVEN[1:]), dense=(12, 3)).convert(tmp_path)
    pruned, stored = load_pruned(directory), DynamicCache()
    skipped, uneven = (pruned.model.layers[index].self_attn for index in (0, 1))
    skipped(torch.zeros(1, 5, pruned.config.hidden_size), **{keyword: stored})
    assert stored.get_seq_length() == 5
    (hook,) = uneven._forward_pre_hooks.values()
    _, kwargs = hook(uneven, (), {keyword: stored})
    assert list(kwargs) == [keyword] and kwargs[keyword] is not stored


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama, uneven, biases", "llama, layer 1 gone", "qwen3, uneven, biases, tied"])
def test_fine_tuning_moves_every_parameter(tmp_path, name, reentrant):
    _, _, directory = CASES[name].convert(tmp_path)
    pruned = load_pruned(directory, dtype=torch.float32).train()
    pruned.gradient_checkpointing_enable({"use_reentrant": reentrant})
    pruned.enable_input_require_grads()
    before = {name: parameter.detach().clone() for name, parameter in pruned.named_parameters()}
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=1e-3)
    tokens = torch.tensor([prompt * (40 // len(prompt)) for prompt in prompts() if 40 % len(prompt) == 0])
    losses = []
    for _ in range(5):
        loss = pruned(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert not [name for name, parameter in pruned.named_parameters() if torch.equal(parameter, before[name])]
    assert {name: tuple(tensor.shape) for name, tensor in before.items()} == pruned_geometry(pruned).tensor_shapes()


def pruned_geometry(model) -> ModelGeometry:
    return ModelGeometry.from_config(model.config.to_dict())


def test_gradients_are_those_of_the_masked_model(tmp_path):
    model, masks, directory = Case(UNEVEN, dense=(12, 3)).convert(tmp_path)
    pruned, tokens = load_pruned(directory, dtype=torch.float32), torch.tensor(prompts()[-1:])
    pruned(tokens, labels=tokens).loss.backward()
    model.requires_grad_(True)
    with apply_masks(model, masks):
        model(tokens, labels=tokens).loss.backward()
    kept = torch.tensor(UNEVEN[0])
    expected = model.model.layers[0].self_attn.q_proj.weight.grad.unflatten(0, (12, -1))[kept].flatten(0, 1)
    torch.testing.assert_close(pruned.model.layers[0].self_attn.q_proj.weight.grad, expected, rtol=1e-3, atol=1e-5)
    k_proj = pruned.model.layers[0].self_attn.k_proj.weight.grad
    torch.testing.assert_close(k_proj, model.model.layers[0].self_attn.k_proj.weight.grad, rtol=1e-3, atol=1e-5)


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    _, _, directory = CASES["llama, no attention in layers 0 and 1"].convert(tmp_path)
    pruned, tokens = load_pruned(directory, dtype=torch.float32), torch.tensor(prompts()[-1:])
    tuned = peft.get_peft_model(pruned, peft.LoraConfig(target_modules=["q_proj", "v_proj", "o_proj", "up_proj"]))
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
    for _ in range(3):
        loss = tuned(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
    logits = tuned.eval()(tokens).logits
    tuned.merge_and_unload().save_pretrained(tmp_path / "tuned")
    torch.testing.assert_close(load_pruned(tmp_path / "tuned")(tokens).logits, logits, rtol=1e-3, atol=1e-4)


def test_tensors_that_do_not_fit_are_all_listed(tmp_path):
    _, _, directory = CASES["llama"].convert(tmp_path)
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(52, 96)
    tensors["model.layers.2.mlp.extra.weight"] = torch.ones(3)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)  # old checkpoints have it
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    # A converted model has an index, which names tensors too.
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, path.name)}))
    with pytest.raises(InputError, match="do not fit its config.json") as error:
        load_pruned(directory)
    assert error.value.problems == (
        "model.layers.1.self_attn.k_proj.weight: missing",
        "model.layers.2.mlp.extra.weight: not a tensor of this model",
        "model.layers.0.mlp.up_proj.weight: the file has [52, 96], config.json says [17, 96]",
    )


def test_what_is_no_model_directory_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.config\.json is missing"):
        load_pruned(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["PrunedGPT2LMHeadModel"]}')
    with pytest.raises(InputError, match="PrunedGPT2LMHeadModel.*is not supported"):
        load_pruned(tmp_path)


def test_stock_results_load_as_stock_models(tmp_path):
    model, masks, directory = Case(((0, 1, 2),) * NUM_LAYERS, (8,) * NUM_LAYERS).convert(tmp_path)
    stock, tokens = load_pruned(directory, dtype=torch.float32), torch.tensor(prompts()[-1:])
    assert type(stock) is type(model)
    with torch.no_grad(), apply_masks(model, masks):
        torch.testing.assert_close(stock(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_stock_result_that_lacks_a_tensor_is_refused(tmp_path):
    _, _, directory = Case(((0, 1, 2),) * NUM_LAYERS, (8,) * NUM_LAYERS).convert(tmp_path)
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model.layers.1.self_attn.k_proj.weight: missing"):
        load_pruned(directory)


def test_loads_sharded_in_half_precision_without_a_dense_peak(tmp_path, monkeypatch):
    _, _, directory = CASES["llama"].convert(tmp_path)
    load_pruned(directory).save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    built = []
    empty = torch.nn.Linear.reset_parameters
    monkeypatch.setattr(
        torch.nn.Linear, "reset_parameters", lambda linear: (built.append(linear.weight.device.type), empty(linear))
    )
    pruned = load_pruned(tmp_path / "sharded", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.bfloat16}
    assert set(built) == {"meta"}
    assert pruned.num_parameters() == pruned_geometry(pruned).num_parameters


def test_needs_no_vllm():
    code = "import sys; sys.modules['vllm'] = None; import pruned_vllm.hf.loading"
    subprocess.run([sys.executable, "-c", code], check=True)
