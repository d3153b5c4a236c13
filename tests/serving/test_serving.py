"""The oracle: a converted model served by vLLM computes what the masked dense model computes."""

import functools
import json

import pytest
import torch
from helpers.serving import GEOMETRIES, assert_serves_the_masked_model, engine, rewrite
from helpers.tiny import converted, prompts

from learner.model.masking import apply_masks
from pruned_vllm.hf import load_pruned
from pruned_vllm.serving.base import PrunedForCausalLM

# What the converter does differently for these, load_pruned shows as well; what vLLM does, other geometries show.
SERVED_SLOWLY = (
    "llama gate and up",
    "llama negative masks",
    "llama negative gate and up",
    "llama biases gate and up",
    "llama gqa, one query head of each group",
    "llama uneven groups, negative masks",
    "llama the same uneven groups everywhere",
    "llama no attention in the first layer",
    "llama no mlp in the first layer",
    "llama nothing in the last layer",
    "llama no mlp at all",
    "mistral ragged",
    "mistral skips",
    "qwen2 gqa",
    "qwen2 skips",
    "qwen2 nothing pruned",
    "qwen2 uniform heads",
    "qwen2 uniform widths, heads wider than hidden",
    "qwen3 gqa",
    "qwen3 mha",
    "qwen3 gqa, 2 of 4 query heads",
    "qwen3 very uneven groups",
    "qwen3 uneven groups",
    "qwen3 skips",
    "gemma3 gqa",
    "gemma3 uniform",
    "phi3 ragged",
    "phi3 uneven groups, sliding window",
    "ministral3 skips, sliding window",
    "qwen3.5 gqa, biases",
    "qwen3.5 skips, tied",
)


@pytest.mark.parametrize("name", SERVED_SLOWLY)
def test_loaded_model_is_the_masked_model(tmp_path, name):
    """In a fraction of the time that an engine takes to start."""
    geometry = GEOMETRIES[name]
    model, masks = geometry.model_and_masks()
    pruned = load_pruned(converted(tmp_path, model, masks, geometry.site), dtype=torch.float32)
    for prompt in prompts():
        tokens = torch.tensor([prompt])
        with torch.no_grad(), apply_masks(model, masks, geometry.site):
            expected = model(tokens).logits.log_softmax(-1)
        with torch.no_grad():
            torch.testing.assert_close(pruned(tokens).logits.log_softmax(-1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "geometry",
    [
        pytest.param(geometry, id=name, marks=pytest.mark.slow if name in SERVED_SLOWLY else ())
        for name, geometry in GEOMETRIES.items()
    ],
)
def test_served_model_is_the_masked_model(tmp_path, geometry):
    model, masks = geometry.model_and_masks()
    directory = converted(tmp_path, model, masks, geometry.site)
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"][0].startswith("Pruned") != geometry.stock
    assert_serves_the_masked_model(directory, model, masks, geometry.site)


COMPILED = ("llama ragged", "qwen3 uneven groups", "llama biases survive the first layer", "gemma3 skips")
ALSO_COMPILED = (
    "mistral uneven groups, sliding window",
    "qwen2 skips",
    "phi3 skips, half of a head rotated",
    "ministral3 uneven groups",
    "granite uneven groups, biases",
    "qwen3.5 uneven groups, full attention alone",
)


@pytest.mark.parametrize("name", [*COMPILED, *(pytest.param(name, marks=pytest.mark.slow) for name in ALSO_COMPILED)])
def test_compiled(tmp_path, name):
    model, masks = GEOMETRIES[name].model_and_masks()
    directory = converted(tmp_path, model, masks)
    assert_serves_the_masked_model(directory, model, masks, enforce_eager=False)


def test_kv_cache_capacity_grows_by_the_heads_removed(tmp_path):
    model, masks = GEOMETRIES["llama ragged"].model_and_masks()
    directory = converted(tmp_path, model, masks)
    model.save_pretrained(tmp_path / "dense")
    capacity = {}
    for name, where in (("dense", tmp_path / "dense"), ("pruned", directory)):
        with engine(where) as llm:
            cache = llm.llm_engine.vllm_config.cache_config
            capacity[name] = cache.num_gpu_blocks
            # 2 (key, value) * 18 heads before, 11 after * head_dim 32 * 4 bytes
            bytes_per_block = cache.block_size * 2 * {"dense": 18, "pruned": 11}[name] * 32 * 4
            assert cache.num_gpu_blocks == cache.kv_cache_memory_bytes // bytes_per_block
    assert capacity["pruned"] / capacity["dense"] == pytest.approx(18 / 11, rel=1e-3)


@pytest.mark.parametrize("name", ["llama uneven groups, biases", "qwen3 biases, skips"])
def test_every_tensor_that_does_not_fit_is_named(tmp_path, name):
    """Stock vLLM truncates a tensor that is too large and leaves what is missing uninitialised.

    Every dimension of every tensor is off by one here, one tensor is missing and one is too many.
    """
    model, masks = GEOMETRIES[name].model_and_masks()
    directory = converted(tmp_path, model, masks)
    expected = {}

    def change(tensors):
        lost = tensors.pop("model.layers.1.mlp.up_proj.weight")
        expected["model.layers.1.mlp.up_proj.weight"] = f"{list(lost.shape)}: missing"
        for number, (key, tensor) in enumerate(sorted(tensors.items())):
            shape = list(tensor.shape)
            shape[number % len(shape)] += 1 if number % 3 else -1
            tensors[key] = torch.ones(shape)
            expected[key] = f"the file has {shape}, config.json says {list(tensor.shape)}"
        tensors["model.layers.2.mlp.extra.weight"] = torch.ones(3)
        expected["model.layers.2.mlp.extra.weight"] = "not a tensor of this model"

    rewrite(directory, change)
    with (
        pytest.raises(ValueError, match=f"does not fit its config.json in {len(expected)} ") as error,
        engine(directory),
    ):
        pass
    lines = [line for line in str(error.value).splitlines() if line.startswith("  - ")]
    assert len(lines) == len(expected)
    for key, message in expected.items():
        assert any(key in line and message in line for line in lines), f"{key}: {message} is not reported"


@pytest.mark.parametrize("name", ["llama uneven groups, biases", "llama biases survive everywhere", "qwen3 skips"])
def test_nothing_stays_uninitialised(tmp_path, monkeypatch, name):
    """Every weight is loaded into memory that is full of NaN."""
    geometry = GEOMETRIES[name]
    model, masks = geometry.model_and_masks()
    directory = converted(tmp_path, model, masks, geometry.site)
    built = []
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    original = PrunedForCausalLM.__init__

    @functools.wraps(original)  # vLLM looks at the arguments
    def build_in_poisoned_memory(self, **kwargs):
        torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
        original(self, **kwargs)
        torch.use_deterministic_algorithms(False)
        built.append({name for name, parameter in self.named_parameters() if parameter.isnan().all()})

    monkeypatch.setattr(PrunedForCausalLM, "__init__", build_in_poisoned_memory)
    assert_serves_the_masked_model(directory, model, masks, geometry.site)
    (poisoned,) = built
    assert any("qkv_proj" in name for name in poisoned) and any("gate_up_proj" in name for name in poisoned)
