"""Biases of o_proj and down_proj alone, as FLAP leaves them in a Llama whose config.json knows of none."""

import json

import pytest
import torch
from helpers.masked import convert_pruned, edit_json, edit_weights
from helpers.tiny import byte_tokenizer, masks_for, prompts, soft_mask, tiny_model, write_masked
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from learner.job import Job
from learner.model.dense import load_dense
from learner.model.masking import apply_masks
from pruned_vllm.hf.loading import load_pruned

GENERATOR = torch.Generator().manual_seed(5)
RAGGED = masks_for(  # the second layer loses its heads, the last one its channels: their last biases stay
    [[1, 0, 2.5, 0, 1, 1], [0] * 6, [1, 1, 1, 1, 1, -0.5]],
    [soft_mask(40, 17, GENERATOR), soft_mask(40, 40, GENERATOR), torch.zeros(40)],
)
UNIFORM = masks_for([[1, 0, 2, 0, 0, 0.5]] * 3, [soft_mask(40, 8, GENERATOR) for _ in range(3)])
O_PROJ, DOWN_PROJ, Q_PROJ = "self_attn.o_proj", "mlp.down_proj", "self_attn.q_proj"
CASES = {
    "both": (RAGGED, (O_PROJ, DOWN_PROJ), range(3)),
    "o_proj": (RAGGED, (O_PROJ,), range(3)),
    "down_proj": (RAGGED, (DOWN_PROJ,), range(3)),
    "one layer": (RAGGED, (O_PROJ, DOWN_PROJ), [1]),
    "q_proj": (RAGGED, (Q_PROJ,), range(3)),
    "all": (RAGGED, [f"self_attn.{name}_proj" for name in "qkvo"], range(3)),
    "uniform": (UNIFORM, (O_PROJ, DOWN_PROJ), range(3)),
}


def biased(directory, model_type: str, masks, modules, layers):
    """A masked checkpoint with these biases, which config.json does not mention; the model that has them."""
    model = tiny_model(model_type, 6, 6, 40, attention_bias=True, mlp_bias=True)
    names = {f"model.layers.{layer}.{module}.bias" for layer in layers for module in modules}
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias") and name not in names:
            parameter.zero_()
    write_masked(directory, model, masks)
    absent = [name for name, _ in model.named_parameters() if name.endswith("_proj.bias") and name not in names]
    edit_weights(directory, {}, remove=tuple(absent))
    edit_json(directory / "config.json", attention_bias=False, mlp_bias=False)
    return model


@pytest.mark.parametrize(("masks", "modules", "layers"), CASES.values(), ids=CASES)
def test_biases_that_config_json_does_not_know_are_kept(tmp_path, masks, modules, layers):
    model = biased(tmp_path / "ckpt", "llama", masks, modules, layers)
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["attention_bias"] == any("attn" in module for module in modules)
    assert config["mlp_bias"] == any("mlp" in module for module in modules)
    tokens = torch.tensor(prompts()[-1:])
    pruned = load_pruned(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad(), apply_masks(model, masks):
        torch.testing.assert_close(pruned(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    if masks is UNIFORM:
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        torch.testing.assert_close(stock(tokens).logits, pruned(tokens).logits)


def test_zeros_have_the_dtype_of_their_weight(tmp_path):
    biased(tmp_path / "ckpt", "llama", RAGGED, (O_PROJ,), range(3))
    weights = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "ckpt" / "model.safetensors").items()}
    edit_weights(tmp_path / "ckpt", weights)
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 0
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(shard)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert (
        not tensors["model.layers.0.self_attn.q_proj.bias"].any() and "model.layers.0.mlp.up_proj.bias" not in tensors
    )


def test_masks_are_learned_on_the_model_that_has_them(tmp_path):
    model = biased(tmp_path / "dense", "llama", RAGGED, (O_PROJ, DOWN_PROJ), range(3))
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    loaded = load_dense(Job(model=str(tmp_path / "dense"), method="magnitude"), "cpu").model
    with torch.no_grad():
        tokens = torch.tensor(prompts()[-1:])
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_other_families_refuse_what_their_config_cannot_say(tmp_path, capsys, model_type):
    write_masked(tmp_path / "ckpt", tiny_model(model_type, 6, 6, 40), RAGGED)
    edit_weights(tmp_path / "ckpt", {"model.layers.0.self_attn.o_proj.bias": torch.ones(96)})
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 2
    assert "model.layers.0.self_attn.o_proj.bias [96]: not a tensor of" in capsys.readouterr().err
