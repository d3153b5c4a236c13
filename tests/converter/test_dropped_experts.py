"""convert-pruned --drop-empty-experts: experts go with their rows of the router, and the result says so."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import deepseek
from helpers.dropped import restrict_to_experts_with_channels
from helpers.experts import router_of
from helpers.masked import convert_pruned
from helpers.tiny import HF_MOE, MOE_CONFIGS, STOCK_MOE, expert_masks, masks_for, prompts, tiny_model, write_masked
from safetensors.torch import load_file

from converter.convert import convert
from converter.plan import make_plan
from converter.quantize.converted import plan_of_converted
from converter.quantize.schemes import SCHEMES, Wanted
from learner.model.masking import apply_masks, restrict_routers
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.hf import load_pruned

WIDTH = 24
HEADS = [[0, 0, 0.5, 2, 1, 1], [0, 0, 0, 0, 0, 0], [1, 0, 2, 3, 1, 1]]
# Widths that masks leave, and how many experts stay in each layer; the router chooses two.
PATTERNS = {
    "other numbers": ([[17, 0, 24, 5], [0, 3, 0, 4], [24, 23, 1, 12]], [3, 2, 4]),
    "one number": ([[17, 0, 24, 5], [1, 2, 0, 4], [0, 23, 1, 12]], [3, 3, 3]),
    "other numbers of equal experts": ([[8, 0, 8, 8], [0, 8, 0, 8], [8, 8, 8, 8]], [3, 2, 4]),
    "whole experts": ([[24, 0, 24, 24], [0, 24, 24, 24], [24, 24, 24, 0]], [3, 3, 3]),
}
ROUTERS = ("qwen3_moe", "deepseek", "glm4_moe", "gpt_oss")  # one family for each kind of router
CASES = [
    (model_type, name)
    for model_type in MOE_CONFIGS
    for name in PATTERNS
    if model_type in ROUTERS or name == "other numbers"
]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(prompts()[-1:])).logits


def masked_checkpoint(directory, model_type: str, name: str, **config):
    """A model, masks and the experts that they leave in each layer that has any."""
    model = tiny_model(model_type, 6, 3, WIDTH, **config)
    widths, counts = PATTERNS[name]
    skipped = 1 if model_type == "deepseek" else 0  # its first layer has no experts
    masks = expert_masks(model, widths[skipped:])
    masks |= masks_for(HEADS, [], model) if FAMILIES[model_type].can_lose_heads and name == "other numbers" else {}
    write_masked(directory, model, masks)
    return model, masks, counts[skipped:]


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_what_is_left_is_the_masked_model_with_restricted_routers(tmp_path, capsys, model_type, name):
    model, masks, counts = masked_checkpoint(tmp_path / "ckpt", model_type, name)
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out", "--drop-empty-experts") == 0
    captured = capsys.readouterr()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    geometry = ModelGeometry.from_config(config)
    found = [layer.expert_intermediate_sizes for layer in geometry.layers if layer.expert_intermediate_sizes]
    assert list(map(len, found)) == counts and all(map(all, found))
    assert config["pruning"]["exact"] is False
    number = sum(map(len, config["pruning"]["dropped_experts"].values()))
    assert number == 4 * len(counts) - sum(counts)
    sentence = f"Not exact: {number} experts were dropped with their rows of the router"
    assert sentence in captured.out and "this is not exactly the masked model" in captured.err
    assert "Verified against the pruned model, whose routers choose among the experts that stay alone" in captured.out
    assert sentence in (tmp_path / "out" / "README.md").read_text()

    pruned = deepseek.load(tmp_path / "out") if model_type == "deepseek" else load_pruned(tmp_path / "out")
    with apply_masks(model, masks):
        exact = logits(model)
        restricted = logits(restrict_to_experts_with_channels(model, masks))
    torch.testing.assert_close(logits(pruned), restricted, rtol=1e-4, atol=1e-4)
    assert (exact - restricted).abs().max() > 0.1, "dropping changes nothing"


@pytest.mark.parametrize("model_type", [name for name in STOCK_MOE if not FAMILIES[name].latent_attention])
def test_whole_experts_of_one_number_are_a_stock_model(tmp_path, model_type):
    model, _, _ = masked_checkpoint(tmp_path / "ckpt", model_type, "whole experts", hidden_size=192)
    convert(make_plan(tmp_path / "ckpt", drop_empty_experts=True), tmp_path / "out")
    stock = load_pruned(tmp_path / "out")
    assert type(stock) is type(model) and stock.config.num_experts_per_tok == 2
    assert {layer.mlp.gate.weight.shape[0] for layer in stock.model.layers} == {3}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pruning"]["exact"] is False


@pytest.mark.parametrize("model_type", HF_MOE)
def test_the_learner_measures_the_same_routers(tmp_path, model_type):
    model, masks, _ = masked_checkpoint(tmp_path / "ckpt", model_type, "other numbers")
    routers = [router_of(layer.mlp) for layer in model.model.layers]
    parameters = [dict(router.named_parameters()) for router in routers]
    with apply_masks(model, masks), restrict_routers(model, masks):
        found = logits(model)
    for router, before in zip(routers, parameters, strict=True):
        assert all(getattr(router, name) is parameter for name, parameter in before.items())
    with apply_masks(model, masks):
        torch.testing.assert_close(found, logits(restrict_to_experts_with_channels(model, masks)), rtol=1e-4, atol=1e-4)


def test_without_the_option_nothing_is_dropped(tmp_path, capsys):
    model, masks, _ = masked_checkpoint(tmp_path / "ckpt", "qwen3_moe", "other numbers")
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 0
    assert "Not exact" not in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "exact" not in config["pruning"] and "num_experts" not in config["per_layer_config"]["1"]
    with apply_masks(model, masks):
        torch.testing.assert_close(logits(load_pruned(tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-4)


def test_nothing_to_drop(tmp_path, capsys):
    model = tiny_model("qwen3_moe", 6, 3, WIDTH)
    write_masked(tmp_path / "ckpt", model, expert_masks(model, [[1, 2, 3, 4]] * 3))
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out", "--drop-empty-experts") == 0
    assert "No expert lost all its channels" in capsys.readouterr().out
    assert "exact" not in json.loads((tmp_path / "out" / "config.json").read_text())["pruning"]


EIGHT = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}
GROUPS = {
    "one of each group": ([1, 0, 0, 2, 0, 3, 4, 0], EIGHT, "4 experts are not 4 groups (n_group) of equally many"),
    "two of a group": ([1, 1, 0, 0, 1, 1, 1, 1], EIGHT, "[2, 0, 2, 2] experts would be left of its 4 groups"),
    "half of each group": ([3, 0, 2, 0, 0, 1, 4, 0], EIGHT | {"n_group": 2, "topk_group": 1}, None),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_experts_stay_equally_large(tmp_path, capsys, name):
    widths, config, problem = GROUPS[name]
    model = tiny_model("deepseek_v3", 6, 6, WIDTH, **config)
    masks = expert_masks(model, [widths] * 3)
    write_masked(tmp_path / "ckpt", model, masks)
    code = convert_pruned(tmp_path / "ckpt", tmp_path / "out", "--drop-empty-experts")
    if problem is not None:
        assert code == 2 and f"layer 0: {problem}" in capsys.readouterr().err
        return
    assert code == 0
    with apply_masks(model, masks), restrict_routers(model, masks):
        expected = logits(model)
    torch.testing.assert_close(logits(load_pruned(tmp_path / "out")), expected, rtol=1e-4, atol=1e-4)


def test_too_few_experts_are_refused_by_layer(tmp_path, capsys):
    model = tiny_model("qwen3_moe", 6, 3, WIDTH)
    write_masked(tmp_path / "ckpt", model, expert_masks(model, [[0, 0, 0, 0], [1, 0, 0, 1], [0, 7, 0, 0]]))
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out", "--drop-empty-experts") == 2
    error = capsys.readouterr().err
    assert "layer 0: 0 of 4 experts have channels left, but the router chooses 2" in error
    assert "layer 2: 1 of 4 experts" in error and "layer 1" not in error
    assert not (tmp_path / "out").exists()


def test_models_without_experts_have_none_to_drop(ckpt, tmp_path, capsys):
    assert convert_pruned(ckpt, tmp_path / "out", "--drop-empty-experts") == 2
    assert "--drop-empty-experts is for models with experts, and LlamaForCausalLM has none" in capsys.readouterr().err


ROUTER, EXPERT = "model.layers.0.mlp.gate.weight", "model.layers.0.mlp.experts.{}.up_proj.weight"


def swapped(plan):
    """Expert 2, which is 1 now, gets what expert 3 has."""
    tensors = plan.checkpoint.tensors
    names = {EXPERT.format(1): EXPERT.format(2), EXPERT.format(2): EXPERT.format(1)}
    assert set(names) <= set(tensors)
    return replace(plan, source=replace(plan.source, weights=plan.checkpoint.renamed(names)))


FAULTS = {
    "other rows of the router": lambda plan: replace(
        plan, cuts=plan.cuts | {ROUTER: replace(plan.cuts[ROUTER], rows=plan.cuts[ROUTER].rows.roll(1))}
    ),
    "rows of experts that were dropped": lambda plan: replace(
        plan, cuts=plan.cuts | {ROUTER: replace(plan.cuts[ROUTER], rows=torch.tensor([0, 1, 2]))}
    ),
    "experts of others": swapped,
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(tmp_path, name):
    masked_checkpoint(tmp_path / "ckpt", "qwen3_moe", "whole experts")
    plan = make_plan(tmp_path / "ckpt", drop_empty_experts=True)
    with pytest.raises(InputError, match="does not compute what the pruned model computes"):
        convert(FAULTS[name](plan), tmp_path / "out", verify=True)


def test_quantized_afterwards_and_in_one_go(tmp_path):
    _, _, counts = masked_checkpoint(tmp_path / "ckpt", "qwen3_moe", "other numbers")
    convert(make_plan(tmp_path / "ckpt", drop_empty_experts=True, alignment=1), tmp_path / "out")
    wanted = Wanted(SCHEMES["w8a8-int8"])
    plans = {
        "afterwards": plan_of_converted(tmp_path / "out", wanted),
        "in one go": make_plan(tmp_path / "ckpt", drop_empty_experts=True, alignment=1, quantize=wanted),
    }
    tensors = []
    for name, plan in plans.items():
        convert(plan, tmp_path / name, verify=True)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert [len(layer.expert_intermediate_sizes) for layer in ModelGeometry.from_config(config).layers] == counts
        assert config["pruning"]["exact"] is False
        tensors.append(load_file(tmp_path / name / "model.safetensors"))
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name
