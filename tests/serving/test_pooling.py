"""An embedding model of sentence-transformers, converted, gives the vectors of the masked model."""

import json

import torch
from helpers.masked import convert_pruned, edit_json, edit_weights
from helpers.serving import UNEVEN, engine
from helpers.serving import Geometry as Masks
from helpers.tiny import byte_tokenizer, prompts, write_masked
from safetensors.torch import save_file

from learner.model.masking import apply_masks

MODULES = ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")
BIASES = {"attention_bias": True, "mlp_bias": True}


def test_mean_pooling_projection_and_normalization(tmp_path):
    """The model also has biases in o_proj and down_proj alone, which config.json does not know: FLAP's kind."""
    model, masks = Masks(UNEVEN, (51, 17, 0), group=4, config=BIASES).model_and_masks()
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias") and not name.endswith(("o_proj.bias", "down_proj.bias")):
            parameter.zero_()
    dense = write_masked(tmp_path / "dense", model, masks)
    edit_weights(dense, {}, remove=tuple(name for name, value in model.named_parameters() if not value.any()))
    edit_json(dense / "config.json", **dict.fromkeys(BIASES, False))
    byte_tokenizer().save_pretrained(dense)
    projection = torch.nn.Linear(model.config.hidden_size, 24)
    for path, _ in MODULES:
        (dense / path).mkdir(exist_ok=True)
    kinds = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in MODULES]
    (dense / "modules.json").write_text(json.dumps(kinds))
    (dense / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    sizes = {
        "in_features": 96,
        "out_features": 24,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    (dense / "2_Dense" / "config.json").write_text(json.dumps(sizes))
    save_file(
        {f"linear.{name}": value.data for name, value in projection.named_parameters()},
        dense / "2_Dense" / "model.safetensors",
    )
    assert convert_pruned(dense, tmp_path / "out") == 0
    with engine(tmp_path / "out", skip_tokenizer_init=False) as llm:
        outputs = llm.embed([{"prompt_token_ids": prompt} for prompt in prompts()], use_tqdm=False)
    for prompt, output in zip(prompts(), outputs, strict=True):
        with torch.no_grad(), apply_masks(model, masks):
            hidden = model.model(torch.tensor([prompt])).last_hidden_state[0]
            expected = torch.nn.functional.normalize(projection(hidden.mean(0)), dim=0)
        torch.testing.assert_close(torch.tensor(output.outputs.embedding), expected, rtol=0, atol=1e-5)
