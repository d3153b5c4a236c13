"""A loaded model is an ordinary Python object: it can be pickled, copied and sent to another process."""

import copy
import multiprocessing
import pickle
from pathlib import Path

import pytest
import torch
from helpers.tiny import converted, expert_masks, masks_for, prompts, tiny_model

from pruned_vllm.hf import classes
from pruned_vllm.hf.loading import load_pruned

RAGGED = [[17, 0, 24, 5], [0, 0, 0, 0], [1, 2, 3, 4]]
UNEVEN = [[0] * 6, [1, 1, 1, 0, 1, 0], [1] * 6]  # no attention, groups of [2, 1, 1], all
DENSE = ("llama", "gemma3_text", "phi3")
CHANNELS = [(torch.arange(40) < width).float() for width in (17, 0, 40)]


def loaded(directory: Path, model_type: str):
    model = tiny_model(model_type, 6, 3, 24 if model_type in ("mixtral", "qwen3_moe") else 40)
    masks = masks_for(UNEVEN, CHANNELS if model_type in DENSE else [])
    masks |= expert_masks(model, RAGGED) if model_type not in DENSE else {}
    return load_pruned(converted(directory, model, masks), dtype=torch.float32)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(prompts()[-1:])).logits


def saved_and_loaded(model, directory: Path):
    torch.save(model, directory / "model.pt")
    return torch.load(directory / "model.pt", weights_only=False)


WAYS = {
    "torch.save": saved_and_loaded,
    "pickle": lambda model, directory: pickle.loads(pickle.dumps(model)),
    "deepcopy": lambda model, directory: copy.deepcopy(model),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi3", "mixtral", "qwen3_moe"])
def test_a_copy_is_the_model(tmp_path, model_type, way):
    model = loaded(tmp_path, model_type)
    copied = WAYS[way](model, tmp_path)
    assert type(copied) is type(model) and type(copied.model) is type(model.model)
    assert torch.equal(logits(copied), logits(model))
    copied.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_pruned(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("model_type", ["llama", "phi3", "mixtral"])
def test_another_process_can_use_it(tmp_path, model_type):
    model = loaded(tmp_path, model_type)  # a new process has not made the classes yet
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        torch.testing.assert_close(pool.apply(logits, (model,)), logits(model))


@pytest.mark.parametrize("name", ["PrunedLlamaForCausalLM", "PrunedMixtralForCausalLM", "PrunedMixtralModel"])
def test_classes_can_be_imported(name):
    assert getattr(classes, name) is getattr(classes, name) and getattr(classes, name).__name__ == name


@pytest.mark.parametrize("name", ["PrunedGPT2LMHeadModel", "PrunedDeepseekForCausalLM", "LlamaForCausalLM", "nothing"])
def test_other_names_are_no_attributes(name):
    with pytest.raises(AttributeError, match=name):
        getattr(classes, name)
