"""The oracle: a converted model served by vLLM computes what the masked dense model computes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import GEOMETRIES, assert_serves_the_masked_model, engine
from tiny import converted


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_served_model_is_the_masked_model(tmp_path, geometry):
    model, masks = geometry.model_and_masks()
    directory = converted(tmp_path, model, masks, geometry.site)
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"][0].startswith("Pruned") != geometry.stock
    assert_serves_the_masked_model(directory, model, masks, geometry.site)


@pytest.mark.parametrize("name", ["llama ragged", "qwen3 uneven groups", "llama biases survive the first layer"])
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


def rewrite(directory, change) -> None:
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_checkpoint_that_does_not_fit_is_refused_with_every_mismatch(tmp_path):
    """Stock vLLM truncates a tensor that is too large and leaves what is missing uninitialised."""
    model, masks = GEOMETRIES["llama ragged"].model_and_masks()
    directory = converted(tmp_path, model, masks)

    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(52, 96)
        tensors["model.layers.1.self_attn.q_proj.weight"] = torch.ones(64, 96)
        tensors["model.layers.2.mlp.extra.weight"] = torch.ones(3)
        del tensors["model.layers.2.self_attn.k_proj.weight"]

    rewrite(directory, change)
    with pytest.raises(ValueError, match="does not fit its config.json in 4 tensors") as error, engine(directory):
        pass
    for line in (
        "model.layers.0.mlp.up_proj.weight: the file has [52, 96], config.json says [51, 96]",
        "model.layers.1.self_attn.q_proj.weight: the file has [64, 96], config.json says [32, 96]",
        "model.layers.2.mlp.extra.weight [3]: not a tensor of this model",
        "model.layers.2.self_attn.k_proj.weight [192, 96]: missing",
    ):
        assert line in str(error.value)
