"""Sheared LLaMA: Composer checkpoints with and without masks, and masks alone."""

import json

import pytest
import torch
from helpers.composer import DictConfig, composer_names, kept_masks, log_alphas, rules_of, save_checkpoint, with_masks
from helpers.l0 import SHAPES, TOKENS, Shape, assert_converts_to
from helpers.llama import Rules, logits
from helpers.masked import convert_pruned, edit_json

SHAPE = Shape((0, 0, 0), (0, 0, 0), 0)  # of the dense model alone


TARGET = {"d_model": 21, "n_heads": 2, "intermediate_size": 9, "n_layers": 2}
KEPT = {"hidden": 21, "head": 2, "intermediate": 9, "layer": 2, "head_layer": 2, "mlp": 2}


@pytest.mark.parametrize(
    ("config", "kept"),
    {
        "target": ({"target_model": TARGET}, KEPT),
        "target, not evaluated with": ({"target_model": TARGET, "eval_target_model": False}, {}),
        "no target": ({"target_sparsity": 0.5}, {}),
        "no config.pt": (None, {}),
    }.values(),
    ids=["target", "target, not evaluated with", "no target", "no config.pt"],
)
@pytest.mark.parametrize(
    "kinds", [("head", "intermediate", "hidden", "layer"), ("head", "head_layer", "mlp", "intermediate")]
)
def test_checkpoint_with_masks(tmp_path, capsys, config, kept, kinds):
    """The model that was trained: the embedding is not masked while the masks are inside of the model."""
    model, masks = SHAPE.model(), log_alphas(SHAPE, kinds)
    model.save_pretrained(tmp_path / "base")
    file = save_checkpoint(tmp_path / "run", with_masks(model, masks))
    if config is not None:
        torch.save(DictConfig({"model": {"name": "llama", "l0_module": config}}), tmp_path / "run" / "config.pt")
    zs = kept_masks(masks, kept)
    assert all(0 < mask.count_nonzero() < mask.numel() for mask in zs.values())
    expected = logits(model.state_dict(), 8, TOKENS, rules_of(zs, embedding=False))
    source = file if config is None else tmp_path / "run"
    assert_converts_to(expected, source, tmp_path / "out", "--from", "sheared", "--base-model", tmp_path / "base")
    assert ("names no target shape" in capsys.readouterr().out) == (not kept)


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_alone(tmp_path, capsys, shape):
    """zs_s*.pt holds NumPy arrays. Masks that are given to the model multiply the embedding too."""
    model, zs = SHAPES[shape].model(), {key: mask.detach() for key, mask in SHAPES[shape].zs().items()}
    layers = torch.linspace(0, 0.9, SHAPES[shape].num_layers)
    model.save_pretrained(tmp_path / "base")
    arrays = zs | {"head_z": zs["head_z"][..., 0], "head_layer_z": layers, "mlp_z": layers}
    torch.save({key: mask.numpy() for key, mask in arrays.items()}, tmp_path / "zs_s3200.pt")
    masks = {"head": zs["head_z"].flatten(1), "intermediate": zs["intermediate_z"].flatten(1)}
    masks |= {"hidden": zs["hidden_z"], "layer": layers}
    expected = logits(model.state_dict(), 8, TOKENS, rules_of(masks, embedding=True))
    assert_converts_to(expected, tmp_path / "zs_s3200.pt", tmp_path / "out", "--base-model", tmp_path / "base")
    assert "LLM-Shearing trains the weights with them" in capsys.readouterr().out


def cut(model, heads: dict[int, int], channels: dict[int, int], dimensions: int) -> dict[str, torch.Tensor]:
    """The first heads, channels and dimensions of a dense model; sublayers without units are gone."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        units = {"self_attn": 8 * heads.get(layer, 0), "mlp": channels.get(layer, 0)}
        part = next((part for part in units if part in name or IN_PART.get(part, "?") in name), None)
        if part is not None and not units[part]:
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensor = tensor[: units[part], :dimensions]
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor = tensor[:dimensions, : units[part]]
        else:
            tensor = tensor[..., :dimensions]
        tensors[name] = tensor.clone()
    return tensors


IN_PART = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
CUTS = {
    "uniform": (dict.fromkeys(range(3), 3), dict.fromkeys(range(3), 20), 24, ["LlamaForCausalLM"]),
    "fewer layers": ({0: 2, 1: 2}, {0: 20, 1: 20}, 20, ["LlamaForCausalLM"]),
    "ragged": ({0: 3, 1: 1, 2: 2}, {0: 20, 1: 1, 2: 37}, 24, ["PrunedLlamaForCausalLM"]),
    "sublayers that are gone": ({0: 3, 2: 2}, {0: 20, 1: 5}, 24, ["PrunedLlamaForCausalLM"]),
    "no attention": ({}, {0: 20, 1: 20, 2: 20}, 20, ["PrunedLlamaForCausalLM"]),
    "heads alone": (dict.fromkeys(range(3), 3), dict.fromkeys(range(3), 20), 32, ["PrunedLlamaForCausalLM"]),
    "odd dimensions": (dict.fromkeys(range(3), 2), dict.fromkeys(range(3), 20), 23, ["LlamaForCausalLM"]),
}


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "trained further"])
@pytest.mark.parametrize("name", CUTS)
def test_checkpoint_without_masks(tmp_path, name, nested):
    heads, channels, dimensions, architectures = CUTS[name]
    model = SHAPE.model()
    model.save_pretrained(tmp_path / "base")
    edit_json(tmp_path / "base" / "config.json", dtype="float16")
    tensors = cut(model, heads, channels, dimensions)
    file = tmp_path / "pruned-latest-rank0.pt"
    if nested:
        save_checkpoint(tmp_path, composer_names(tensors), file.name)
    else:
        torch.save(composer_names(tensors), file)
    expected = logits(tensors, 8, TOKENS, Rules())
    assert_converts_to(expected, file, tmp_path / "out", "--base-model", tmp_path / "base")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == architectures and config["head_dim"] == 8
    assert config["hidden_size"] == (24 if name == "odd dimensions" else dimensions)
    assert config["num_hidden_layers"] == (2 if name == "fewer layers" else 3) and config["dtype"] == "float32"


def test_a_directory_with_several_checkpoints_is_ambiguous(tmp_path, capsys):
    model = SHAPE.model()
    model.save_pretrained(tmp_path / "base")
    for name in ("latest-rank0.pt", "pruned-latest-rank0.pt"):
        save_checkpoint(tmp_path / "run", composer_names(model.state_dict()), name)
    assert convert_pruned(tmp_path / "run", tmp_path / "out", "--base-model", tmp_path / "base") == 2
    assert "several files: latest-rank0.pt, pruned-latest-rank0.pt" in capsys.readouterr().err


HEAD_MASKS = "model.l0_module.masks.head.z_loga"
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
REFUSED = {
    "masks inside of heads": (
        {"model.l0_module.masks.qk_head_dim.z_loga": torch.ones(3, 4, 8)},
        "masks inside of heads",
    ),
    "tensor of another model": (
        {"model.transformer.blocks.0.moe.router.weight": torch.ones(3)},
        "moe.router.weight: not",
    ),
    "no lm_head": ({"model.transformer.output.weight": None}, "transformer.output.weight: missing"),
    "no part of attention": ({"model.transformer.blocks.1.attn.wk.weight": None}, "k_proj"),
    "heads of another model": ({HEAD_MASKS: torch.ones(3, 5)}, "head_z is for 5 units, the model has 4"),
    "masks without layers": ({HEAD_MASKS: torch.ones(4)}, "head: log alpha has shape [4]; it needs 2 axes"),
    "masks of nothing": ({HEAD_MASKS: torch.ones(0, 4)}, "head: log alpha has shape [0, 4]"),
    "a tensor that is not read": (
        {f"model.transformer.blocks.1.{name}.weight": torch.eye(4).to_sparse() for name in MLP},
        "blocks.1.mlp.up_proj.weight: no tensor, or one of a kind that is not read",
    ),
    "a tensor twice": (
        {"ref_model.transformer.blocks.0.attn.wq.weight": torch.ones(32, 32)},
        "blocks.0.attn.wq.weight: there twice, under different prefixes",
    ),
    "layers of another model": ({HEAD_MASKS: torch.ones(2, 4)}, "head_z has masks for 2 layers, the model has 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path, capsys, name):
    changes, message = REFUSED[name]
    model = SHAPE.model()
    model.save_pretrained(tmp_path / "base")
    state_dict = {key: tensor for key, tensor in (with_masks(model, {}) | changes).items() if tensor is not None}
    file = save_checkpoint(tmp_path / "run", state_dict)
    assert convert_pruned(file, tmp_path / "out", "--from", "sheared", "--base-model", tmp_path / "base") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_base_model_is_needed_for_its_config(tmp_path, capsys):
    file = save_checkpoint(tmp_path / "run", composer_names(SHAPE.model().state_dict()))
    assert convert_pruned(file, tmp_path / "out", "--from", "sheared") == 2
    assert "tensors, but no config.json; give the dense model" in capsys.readouterr().err
