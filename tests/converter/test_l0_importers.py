"""Compresso, LoRaPruner and NutePrune: what is made of their files computes what their own models compute."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.l0 import SHAPES, TOKENS, L0Module, Shape, assert_converts_to, lora_weights, merged, rules_of, write
from helpers.llama import Rules, logits
from helpers.masked import convert_pruned, edit_json, edit_weights
from safetensors.torch import load_file

RAGGED = SHAPES["ragged"]
PROJECTS = ("compresso", "lorapruner", "nuteprune")


def hidden_size(out: Path) -> int:
    return json.loads((out / "config.json").read_text())["hidden_size"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("project", PROJECTS)
def test_masks_and_lora(tmp_path, project, shape):
    model, zs = SHAPES[shape].model(), SHAPES[shape].zs()
    lora = lora_weights(model.state_dict(), 8, "q_proj", "v_proj", "down_proj")
    base, masks = write(tmp_path, model, zs, lora)
    expected = logits(merged(model.state_dict(), lora, 1), 8, TOKENS, rules_of(project, zs))
    assert_converts_to(expected, masks, tmp_path / "out", "--from", project, "--base-model", base)
    kept, heads = SHAPES[shape].hidden, SHAPES[shape].num_heads
    cut = SHAPES[shape].hidden_size if project == "lorapruner" else math.ceil(kept / heads) * heads
    assert hidden_size(tmp_path / "out") == cut


@pytest.mark.parametrize("key", ["head_z", "intermediate_z", "hidden_z"])
@pytest.mark.parametrize("project", PROJECTS)
def test_any_kind_of_mask_may_be_absent(tmp_path, project, key):
    """The norms of two of the projects divide by a constant, also where no dimension is masked."""
    model, zs = RAGGED.model(), RAGGED.zs()
    del zs[key]
    base, masks = write(tmp_path, model, zs)
    expected = logits(model.state_dict(), 8, TOKENS, rules_of(project, zs))
    assert_converts_to(expected, masks / "zs.pt", tmp_path / "out", "--from", project, "--base-model", base)


@pytest.mark.parametrize("project", PROJECTS)
@pytest.mark.parametrize(
    "gates",
    [{"head_layer_z": [0, 1, 1], "mlp_z": [1, 0, 0]}, {"layer_z": [1, 0, 1]}, {"mlp_z": [0.49, 0.5, 0.51]}],
    ids=["two", "one for both", "soft"],
)
def test_gates_leave_layers_whole_or_do_nothing(tmp_path, capsys, project, gates):
    """0 does not remove the layer: its masks do not count. NutePrune's model has no gates."""
    model = RAGGED.model()
    zs = RAGGED.zs() | {key: torch.tensor(values) for key, values in gates.items()}
    base, masks = write(tmp_path, model, zs)
    expected = logits(model.state_dict(), 8, TOKENS, rules_of(project, zs))
    assert_converts_to(expected, masks, tmp_path / "out", "--from", project, "--base-model", base)
    assert ("model has no gates" in capsys.readouterr().out) == (project == "nuteprune")


@pytest.mark.parametrize("start", [5, None], ids=["l0_module.pt says which", "as the project's merge takes it"])
@pytest.mark.parametrize(("covered", "first"), [(26, 4), (28, 3)])
def test_masks_for_some_of_the_layers(tmp_path, capsys, covered, first, start):
    dense = Shape((1,) * 32, (2,) * 32, 6, num_heads=1, width=4)
    start = min(start, 32 - covered) if start else None
    zs = Shape((1, 0) * (covered // 2), (2, 0) * (covered // 2), 6, num_heads=1, width=4).zs()
    model, first = dense.model(), start or first
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)  # so that 32 layers do not drown each other
    module = L0Module({"head": torch.zeros(covered, 1)}, start, start + covered) if start else None
    base, masks = write(tmp_path, model, zs, module=module)
    expected = logits(model.state_dict(), 8, TOKENS, rules_of("compresso", zs, first))
    assert_converts_to(expected, masks, tmp_path / "out", "--from", "compresso", "--base-model", base)
    assert f"has masks for layers {first} to {first + covered - 1}" in capsys.readouterr().out


def expected_mask(log_alpha: torch.Tensor) -> torch.Tensor:
    """The mask of one row, from the paper of L0 regularisation and what the projects made of it."""
    x, stretch = log_alpha.double(), 2 / 3
    open_probability = 1 - 1 / (1 + torch.exp(x - stretch * math.log(0.1 / 1.1)))
    zeros = round(len(x) - open_probability.sum().item())
    mask = 1 / (1 + torch.exp(-x / stretch * 0.8))
    mask[x.argsort()[:zeros]] = 0
    return mask.float()


@pytest.mark.parametrize("present", [True, False], ids=["None", "absent"])
def test_masks_are_computed_where_zs_has_none(tmp_path, present):
    model = RAGGED.model()
    generator = torch.Generator().manual_seed(5)
    log_alphas = {
        "head": torch.randn(3, 4, generator=generator) * 2,
        "intermediate": torch.randn(3, 37, generator=generator) * 2,
        "hidden": torch.randn(32, generator=generator) * 2,
        "layer": torch.tensor([-4.0, 4.0, 1.0]),
    }
    rows = {kind: torch.stack([expected_mask(row) for row in log_alphas[kind]]) for kind in ("head", "intermediate")}
    zs = {"head_z": rows["head"], "intermediate_z": rows["intermediate"], "layer_z": torch.tensor([0, 1, 1])}
    zs["hidden_z"] = expected_mask(log_alphas["hidden"])
    assert 0 < zs["hidden_z"].count_nonzero() < 32 and 0 < zs["head_z"].count_nonzero() < 12
    base, masks = write(tmp_path, model, None, module=L0Module(log_alphas))
    if not present:
        (masks / "zs.pt").unlink()
    expected = logits(model.state_dict(), 8, TOKENS, rules_of("compresso", zs))
    assert_converts_to(expected, masks, tmp_path / "out", "--from", "compresso", "--base-model", base)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_nuteprune_masks_query_heads_of_grouped_queries(tmp_path, model_type):
    """In Mistral the norm divides by the hidden size."""
    shape = Shape((3, 1, 6), (11, 37, 1), 35, num_heads=6, num_kv_heads=2)
    config = {"sliding_window": None} if model_type == "mistral" else {}
    model, zs = shape.model(model_type, **config), shape.zs()
    base, masks = write(tmp_path, model, zs)
    rules = rules_of("nuteprune" if model_type == "llama" else "nuteprune in Mistral", zs)
    assert rules.divisor == (4096 if model_type == "llama" else None)
    expected = logits(model.state_dict(), 8, TOKENS, rules)
    assert_converts_to(expected, masks, tmp_path / "out", "--from", "nuteprune", "--base-model", base)
    assert hidden_size(tmp_path / "out") == (36 if model_type == "llama" else 35)


def test_alpha_scales_the_lora_weights(tmp_path, capsys):
    model, zs = RAGGED.model(), RAGGED.zs()
    lora = lora_weights(model.state_dict(), 4, "q_proj", "gate_proj")
    base, masks = write(tmp_path, model, zs, {f"module.{name}": tensor.half() for name, tensor in lora.items()})
    lora = {name: tensor.half().float() for name, tensor in lora.items()}
    expected = logits(merged(model.state_dict(), lora, 10 / 4), 8, TOKENS, rules_of("nuteprune", zs))
    args = ("--from", "nuteprune", "--base-model", base, "--lora-alpha", 10)
    assert_converts_to(expected, masks, tmp_path / "out", *args)
    assert "LoRA of rank 4, merged into 6 weights before the masks were folded in (alpha 10)" in capsys.readouterr().out


def merge(model, zs: dict[str, torch.Tensor], with_hidden: bool) -> dict[str, torch.Tensor]:
    """What merge_weights.py of Compresso and NutePrune saves."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer, (heads, channels) in enumerate(zip(zs["head_z"], zs["intermediate_z"], strict=True)):
        prefix = f"model.layers.{layer}."
        tensors[f"{prefix}self_attn.v_proj.weight"] *= heads.flatten().repeat_interleave(8)[:, None]
        for name in ("gate", "up"):
            tensors[f"{prefix}mlp.{name}_proj.weight"] *= channels.flatten()[:, None]
        for name in ("self_attn.o_proj", "mlp.down_proj") if with_hidden else ():
            tensors[f"{prefix}{name}.weight"] *= zs["hidden_z"][:, None]
    return tensors


@pytest.mark.parametrize("with_hidden", [False, True], ids=["exact", "hidden mask"])
@pytest.mark.parametrize("project", PROJECTS)
def test_merged_models(tmp_path, capsys, project, with_hidden):
    """Units with zero rows go; the norm still divides by 4096, but for LoRaPruner."""
    shape = SHAPES["sublayers without units"]
    model, zs = shape.model(), {key: mask.detach() for key, mask in shape.zs().items()}
    tensors = merge(model, zs, with_hidden)
    model.save_pretrained(tmp_path / "merged")
    edit_weights(tmp_path / "merged", tensors)
    edit_json(tmp_path / "merged" / "config.json", lora_rank=8, lora_alpha=8.0, lora_param="Q.V", lora_layers=-1)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    expected = logits(tensors, 8, TOKENS, Rules(divisor=None if project == "lorapruner" else 4096))
    args = ("--from", project, "--base-model", tmp_path / "base")
    assert_converts_to(expected, tmp_path / "merged", tmp_path / "out", *args)
    assert (tmp_path / "out" / "tokenizer.json").exists(), "the merged model has none"
    layers = json.loads((tmp_path / "out" / "config.json").read_text())["per_layer_config"]
    assert layers["0"] == {"skip": ["attention"], "intermediate_size": 5}
    assert layers["1"]["num_attention_heads"] == 3 and layers["1"]["skip"] == ["mlp"]
    assert layers["2"] == {"skip": ["attention", "mlp"]}
    assert ("15 of 32 hidden dimensions get nothing" in capsys.readouterr().out) == with_hidden


def test_results_depend_on_the_project_so_the_user_has_to_say_it(tmp_path, capsys):
    base, masks = write(tmp_path, RAGGED.model(), RAGGED.zs())
    assert convert_pruned(masks, tmp_path / "out", "--base-model", base) == 2
    message = capsys.readouterr().err
    assert all(f"--from {project} (" in message for project in PROJECTS) and "sheared" not in message
    edit_json(base / "config.json", lora_rank=8, lora_alpha=8.0, lora_param="Q.V", lora_layers=-1)
    assert convert_pruned(base, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert all(f"--from {project} (" in message for project in PROJECTS), "all three merge"


def test_keys_of_every_kind_are_told_apart(tmp_path, capsys):
    odd = {1: torch.ones(1), ("a",): torch.ones(1), b"b": torch.ones(1)}
    base, masks = write(tmp_path, RAGGED.model(), RAGGED.zs() | odd)
    assert convert_pruned(masks, tmp_path / "out", "--base-model", base) == 2
    assert "--from compresso (Compresso): zs.pt with head_z, intermediate_z, hidden_z" in capsys.readouterr().err
    assert convert_pruned(masks, tmp_path / "out", "--base-model", base, "--from", "compresso") == 2
    assert "1: unknown key" in capsys.readouterr().err


def test_log_alphas_of_nothing(tmp_path, capsys):
    base, masks = write(tmp_path, RAGGED.model(), None, module=L0Module({"head": torch.zeros(0, 4)}))
    assert convert_pruned(masks, tmp_path / "out", "--base-model", base, "--from", "compresso") == 2
    assert "head_loga has shape [0, 4]; it needs 2 axes, none empty" in capsys.readouterr().err


def changed(**changes):
    """Another zs.pt; None takes a mask away."""
    return lambda base, masks: torch.save(
        {key: mask for key, mask in (RAGGED.zs() | changes).items() if mask is not None}, masks / "zs.pt"
    )


LORA = "model.layers.0.self_attn.q_proj.lora_"


def lora_of(**tensors):
    return lambda base, masks: torch.save(
        {f"{LORA}{half}" if half in "AB" else half: tensor for half, tensor in tensors.items()},
        masks / "lora_weights.pt",
    )


def config_of(**changes):
    return lambda base, masks: edit_json(base / "config.json", **changes)


REFUSED = {
    "heads": (changed(head_z=torch.ones(3, 1, 5, 1, 1)), "head_z is for 5 units, the model has 4"),
    "channels": (changed(intermediate_z=torch.ones(3, 1, 1, 38)), "intermediate_z is for 38 units"),
    "dimensions": (changed(hidden_z=torch.ones(33)), "hidden_z is for 33 dimensions, the model has 32"),
    "axes": (changed(head_z=torch.ones(3, 2, 4, 1, 1)), "head_z: shape [3, 2, 4, 1, 1]"),
    "too few axes": (changed(intermediate_z=torch.ones(3, 37)), "intermediate_z: shape [3, 37]"),
    "layers": (changed(head_z=torch.ones(2, 1, 4, 1, 1)), "different numbers of layers: head_z has 2"),
    "unknown range": (
        changed(head_z=torch.ones(2, 1, 4, 1, 1), intermediate_z=None),
        "has masks for 2 layers, the model has 3; l0_module.pt",
    ),
    "not finite": (changed(hidden_z=torch.full((32,), math.nan)), "32 of 32 values of hidden_z are NaN"),
    "unknown key": (changed(depth_z=torch.ones(3)), "depth_z: unknown key"),
    "no tensors": (lambda base, masks: torch.save({"head_z": 1}, masks / "zs.pt"), "head_z: unknown key"),
    "empty": (lambda base, masks: torch.save({}, masks / "zs.pt"), "it has no masks"),
    "nothing": (lambda base, masks: torch.save(None, masks / "zs.pt"), "holds no masks, and l0_module.pt"),
    "grouped queries": (config_of(num_key_value_heads=2), "knows no grouped queries"),
    "other angles": (config_of(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}), "rope_theta is 500000"),
    "biases": (config_of(attention_bias=True), "there are biases"),
    "another model": (config_of(model_type="mistral", architectures=["MistralForCausalLM"]), "prunes llama alone"),
    "half of a LoRA": (lora_of(A=torch.ones(8, 32)), "q_proj.weight: lora_B is missing"),
    "LoRA of another width": (lora_of(A=torch.ones(8, 33), B=torch.ones(32, 8)), "lora_A has shape [8, 33]"),
    "LoRA of two ranks": (lora_of(A=torch.ones(8, 32), B=torch.ones(32, 4)), "lora_B [32, 4]"),
    "LoRA that is not finite": (lora_of(A=torch.ones(8, 32), B=torch.full((32, 8), math.inf)), "256 of 512 values"),
    "LoRA of a format without infinity": (
        lora_of(A=torch.ones(8, 32).to(torch.float8_e4m3fn), B=torch.ones(32, 8)),
        "q_proj.lora_A: torch.float8_e4m3fn; only floats can be merged",
    ),
    "LoRA twice": (
        lora_of(A=torch.ones(8, 32), B=torch.ones(32, 8), **{f"module.{LORA}A": torch.zeros(8, 32)}),
        "q_proj.lora_A: there twice",
    ),
    "LoRA of something else": (lora_of(bias=torch.ones(32)), "bias: not a LoRA weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path, capsys, name):
    spoil, message = REFUSED[name]
    base, masks = write(tmp_path, RAGGED.model(), RAGGED.zs())
    spoil(base, masks)
    assert convert_pruned(masks, tmp_path / "out", "--from", "compresso", "--base-model", base) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_is_missing_is_said(tmp_path, capsys):
    base, masks = write(tmp_path, RAGGED.model(), RAGGED.zs())
    cases = (
        ((masks, "--from", "compresso"), "masks, but no weights; give the dense model"),
        ((masks, "--from", "compresso", "--base-model", tmp_path / "no"), "neither a directory nor a model"),
        ((base, "--from", "compresso", "--base-model", base), "holds neither zs.pt nor l0_module.pt"),
        ((masks, "--from", "nuteprune", "--base-model", base, "--lora-alpha", 8), "which is not there"),
        ((base, "--from", "shapes", "--lora-alpha", 8), "--lora-alpha means nothing for --from shapes"),
    )
    for (source, *args), message in cases:
        assert convert_pruned(source, tmp_path / "out", *args) == 2
        assert message in capsys.readouterr().err


def test_inputs_stay_as_they_are(tmp_path):
    base, masks = write(tmp_path, RAGGED.model(), RAGGED.zs(), lora_weights(RAGGED.model().state_dict(), 2, "v_proj"))
    before = {path: path.read_bytes() for path in (*masks.iterdir(), *base.iterdir())}
    for out in ("first", "second"):
        assert convert_pruned(masks, tmp_path / out, "--from", "compresso", "--base-model", base) == 0
    assert {path: path.read_bytes() for path in (*masks.iterdir(), *base.iterdir())} == before
    first, second = (load_file(tmp_path / out / "model.safetensors") for out in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
