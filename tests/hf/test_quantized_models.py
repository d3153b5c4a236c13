"""`load_pruned` of quantized models: what Transformers makes of them is what their rounded weights and inputs say."""

import json
import shutil

import pytest
import torch
from helpers.compressed import COMPRESSED, SCHEMES, to_bfloat16, write_quantized
from helpers.emulation import inputs_quantized, log_probabilities
from helpers.serving import ODD, UNEVEN, Geometry, rewrite
from helpers.tiny import converted, expert_masks, masks_for, prompts, tiny_model

from pruned_vllm.hf import load_pruned

MODELS = ("llama", "mixtral", "gpt_oss")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    widths, heads = [[17, 9, 24, 5], [1, 0, 3, 4], [24, 23, 1, 12]], masks_for([[0, 0, 1, 1, 1, 1]] * 3, [])
    experts = {name: tiny_model(name, 6, 3, 24) for name in ("mixtral", "gpt_oss")}
    return {
        "llama": to_bfloat16(converted(root / "llama", *Geometry(UNEVEN, ODD, group=4).model_and_masks())),
        "whole groups": to_bfloat16(
            converted(root / "whole", *Geometry(UNEVEN, (64, 96, 0), group=4).model_and_masks())
        ),
        **{
            name: to_bfloat16(
                converted(root / name, model, expert_masks(model, widths) | heads, drop_empty_experts=name == "mixtral")
            )
            for name, model in experts.items()
        },
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", COMPRESSED)
def test_loaded_model_computes_what_is_stored(sources, tmp_path, name, scheme):
    if SCHEMES[scheme].group_size is not None and name == "llama":
        name = "whole groups"
    written = write_quantized(sources[name], tmp_path, SCHEMES[scheme])
    if SCHEMES[scheme].group_size is not None and name in ("mixtral", "gpt_oss"):
        with pytest.raises(ValueError, match="groups that end inside of a layer") as error:
            load_pruned(written.directory)
        down = {"mixtral": "block_sparse_moe.experts.0.w2", "gpt_oss": "mlp.experts.0.down_proj"}[name]
        assert f"layers.0.{down}: 17 inputs in groups of 32" in str(error.value)
        return
    model, widened = (load_pruned(path, dtype=torch.float32) for path in (written.directory, written.widened))
    for prompt in prompts()[1:]:
        found = log_probabilities(model, prompt)
        with inputs_quantized(widened, SCHEMES[scheme], experts=True, most=127.5):
            expected = log_probabilities(widened, prompt)
        difference = (found - expected).abs()
        # Inputs that are rounded may fall to either side where two ways of adding up differ in the last bit.
        most = 1e-3 if SCHEMES[scheme].inputs is None else 0.1
        assert difference.max() < most and difference.mean() < most / 10, (
            f"{difference.max():.4f} {difference.mean():.4f}"
        )


def test_damage_is_named(sources, tmp_path):
    directory = write_quantized(sources["mixtral"], tmp_path, SCHEMES["w8a8-int8"]).directory
    lost = "model.layers.0.block_sparse_moe.experts.2.w2.weight_scale"
    rewrite(directory, lambda tensors: tensors.pop(lost))
    with pytest.raises(ValueError, match=rf"in 1 tensors.*\n.*{lost} \[96, 1\]: missing"):
        load_pruned(directory)


@pytest.mark.parametrize(
    ("stored", "sentence"),
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "is quantized by fp8; load_pruned reads"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}, "is quantized by gptq"),
        (
            SCHEMES["w4a16"].config() | {"format": "marlin-24"},
            "q_proj first, are quantized as marlin-24: int4 weights, strategy channel, which load_pruned does not know",
        ),
    ],
)
def test_other_formats_are_refused(sources, tmp_path, stored, sentence):
    directory = shutil.copytree(sources["llama"], tmp_path / "other")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    with pytest.raises(ValueError, match=sentence):
        load_pruned(directory)
