"""convert-pruned on mixture-of-experts models: what it writes computes what the masked model computes."""

import json
from pathlib import Path

import pytest
import torch
from helpers import deepseek
from helpers.experts import gate_and_up, output_of, product_of
from helpers.masked import convert_pruned, edit_json, edit_masks, edit_weights
from helpers.tiny import STOCK_MOE, converted, expert_masks, prompts, soft_mask, tiny_model, write_masked
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from converter.convert import convert
from converter.plan import make_plan
from learner.model.masking import apply_masks
from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.masked import CHANNEL_MASK_SITES, EXPERT_MASK, HEAD_MASK
from pruned_vllm.serving.deepseek_config import DeepseekConfig

WIDTH = 24
RAGGED = [[17, 0, 24, 5], [0, 0, 0, 0], [1, 2, 3, 4]]
EXPERTS0 = EXPERT_MASK.format(0)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    shards = [load_file(path) for path in directory.glob("*.safetensors")]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def expected_logits(model, masks, site="product") -> torch.Tensor:
    with torch.no_grad(), apply_masks(model, masks, site):
        return model(input_ids=torch.tensor(prompts()[-1:])).logits


def zero_padded(out: Path, dense: Path, padded: Path):
    """The converted experts with zeros for what is gone, as a stock model."""
    config = json.loads((out / "config.json").read_text())
    for key in ("per_layer_config", "expert_intermediate_sizes", "allow_global_per_layer_attribute_access"):
        config.pop(key, None)
    config["architectures"] = [config["architectures"][0].removeprefix("Pruned")]
    tensors, padded_tensors = tensors_of(out), {}
    for name, tensor in tensors_of(dense).items():
        padded_tensors[name] = torch.zeros_like(tensor)
        if name in tensors:
            rows = tuple(slice(size) for size in tensors[name].shape)
            padded_tensors[name][rows] = tensors[name]
    padded.mkdir()
    (padded / "config.json").write_text(json.dumps(config))
    save_file(padded_tensors, padded / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(padded, dtype=torch.float32)


@pytest.mark.parametrize("site", ["product", "gate_and_up"])
@pytest.mark.parametrize("model_type", STOCK_MOE)
def test_experts_compute_what_the_masked_ones_compute(tmp_path, model_type, site):
    model = tiny_model(model_type, 6, 3, WIDTH)
    masks = expert_masks(model, RAGGED)
    masks |= {HEAD_MASK.format(2): torch.tensor([1, -2, 0.5, 3, 0.1, 1])}  # none is removed
    out = converted(tmp_path, model, masks, site)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [FAMILIES[model_type].pruned_architecture]
    assert config["per_layer_config"] == {str(i): {"expert_intermediate_sizes": row} for i, row in enumerate(RAGGED)}
    shapes = ModelGeometry.from_config(config).tensor_shapes()
    assert {name: tuple(tensor.shape) for name, tensor in tensors_of(out).items()} == shapes
    padded = zero_padded(out, tmp_path / "ckpt", tmp_path / "padded")
    expected = expected_logits(model, masks, site)
    assert not torch.allclose(expected, expected_logits(model, {}), atol=0.1), "the masks change nothing"
    with torch.no_grad():
        torch.testing.assert_close(padded(torch.tensor(prompts()[-1:])).logits, expected, rtol=1e-4, atol=1e-4)


DEEPSEEK_MASKS = {
    "experts": ({}, {}, [1, 0]),
    "heads, some of each group": ({0: [1, 0, 2, 0.5, 0, 0], 2: [0, 0, 0, 0, 3, 1]}, {}, []),
    "no attention in layer 1": ({1: [0] * 6}, {}, [7]),
    "renormalised, all layers": ({}, {"norm_topk_prob": True, "first_k_dense_replace": 0}, []),
    "every second layer": ({}, {"moe_layer_freq": 2, "first_k_dense_replace": 0}, [3]),
}


@pytest.mark.parametrize("site", ["product", "gate_and_up"])
@pytest.mark.parametrize("name", DEEPSEEK_MASKS)
def test_deepseek_computes_what_the_masked_one_computes(tmp_path, name, site):
    heads, changes, dense_widths = DEEPSEEK_MASKS[name]
    model = tiny_model("deepseek", 6, 3, 40, **changes)
    masks = expert_masks(model, RAGGED, dense_widths)
    masks |= {HEAD_MASK.format(index): torch.tensor(mask, dtype=torch.float32) for index, mask in heads.items()}
    out = converted(tmp_path, model, masks, site)
    pruned = deepseek.load(out)
    assert pruned.config.architectures == ["PrunedDeepseekForCausalLM"]
    logits = pruned(torch.tensor(prompts()[-1:])).logits
    torch.testing.assert_close(logits, expected_logits(model, masks, site), rtol=1e-4, atol=1e-4)


def test_the_config_of_deepseek_is_read_without_code_from_the_model(tmp_path):
    model = tiny_model("deepseek", 6, 3, 40)
    model.save_pretrained(tmp_path)
    edit_json(
        tmp_path / "config.json", auto_map={"AutoConfig": "configuration_deepseek.DeepseekConfig"}, rope_theta=5e4
    )
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(config) is DeepseekConfig and config.n_routed_experts == 4 and config.moe_layer_freq == 1
    assert config.rope_parameters["rope_theta"] == 10000  # what the file says in the newer form counts
    assert DeepseekConfig(rope_theta=5e4).rope_parameters["rope_theta"] == 5e4
    assert DeepseekConfig().rope_parameters["rope_theta"] == 10000


@pytest.mark.parametrize("model_type", STOCK_MOE)
def test_equal_experts_run_on_stock_hugging_face(tmp_path, model_type):
    model = tiny_model(model_type, 6, 3, WIDTH)
    masks = expert_masks(model, [[8] * 4] * 3)
    out = converted(tmp_path, model, masks)
    config = json.loads((out / "config.json").read_text())
    # vLLM's Qwen2-MoE takes hidden_size / heads for head_dim, which here is not so. A shared MLP may be as wide as some
    # experts together.
    if model_type == "qwen2_moe" or FAMILIES[model_type].experts_format.shared_count_key:
        assert config["per_layer_config"] == {str(index): {"moe_intermediate_size": 8} for index in range(3)}
        return
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(stock) is type(model) and "per_layer_config" not in config
    with torch.no_grad():
        logits = stock(torch.tensor(prompts()[-1:])).logits
    torch.testing.assert_close(logits, expected_logits(model, masks), rtol=1e-4, atol=1e-4)


def test_alignment_pads_mlps_and_equal_experts_only(tmp_path, capsys):
    model = tiny_model("deepseek", 6, 3, 40)
    masks = expert_masks(model, [[9, 23, 5, 0], [9, 9, 9, 9]], [21])
    write_masked(tmp_path / "ckpt", model, masks)
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out", "--align", 16) == 0
    pruned = deepseek.load(tmp_path / "out")
    geometry = ModelGeometry.from_config(pruned.config.to_dict())
    widths = [layer.expert_intermediate_sizes for layer in geometry.layers]
    assert widths == [(), (9, 23, 5, 0), (16,) * 4] and geometry.layers[0].intermediate_size == 32
    logits = pruned(torch.tensor(prompts()[-1:])).logits
    torch.testing.assert_close(logits, expected_logits(model, masks), rtol=1e-4, atol=1e-4)
    printed = " ".join(capsys.readouterr().out.split())
    assert "36+28 9 9 9" in printed and "21+11" in printed
    assert "Experts: 8 with 192 channels before, 73 after (62.0% removed); 1 experts lost all." in printed


def test_folds_in_float32_and_casts_once(tmp_path):
    model = tiny_model("qwen3_moe", 6, 3, WIDTH).to(torch.bfloat16)
    mask = torch.linspace(0.1, 7.9, 4 * WIDTH).view(4, WIDTH)
    out = converted(tmp_path, model, {EXPERTS0: mask})
    tensors, before = tensors_of(out), tensors_of(tmp_path / "ckpt")
    for expert in range(4):
        up, gate = (f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight" for name in ("up", "gate"))
        assert torch.equal(tensors[up], (before[up].float() * mask[expert][:, None]).bfloat16())
        assert torch.equal(tensors[gate], before[gate])


def test_a_model_of_a_family_with_experts_may_have_none(tmp_path, capsys):
    model = tiny_model("qwen3_moe", 6, 3, 40, mlp_only_layers=[0, 1, 2])
    write_masked(tmp_path / "ckpt", model, expert_masks(model, [], [9, 0, 40]))
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 0
    assert "Experts:" not in capsys.readouterr().out


def test_an_adapter_is_merged_before_the_masks(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model("qwen3_moe", 6, 3, 40, mlp_only_layers=[1])
    masks = expert_masks(model, RAGGED, [9]) | {HEAD_MASK.format(0): torch.tensor([1, 2, 0, 0, 3, 0.5])}
    write_masked(tmp_path / "ckpt", model, masks, lora_adapter="adapter")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config)
    tuned.save_pretrained(tmp_path / "ckpt" / "adapter")
    convert(make_plan(tmp_path / "ckpt"), tmp_path / "out")
    merged = tuned.merge_and_unload()
    converted(tmp_path / "merged", merged, masks)
    expected = tensors_of(tmp_path / "merged" / "out")
    for name, tensor in tensors_of(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


@pytest.fixture
def ckpt(tmp_path):
    model = tiny_model("qwen3_moe", 6, 3, 40, mlp_only_layers=[1])
    return write_masked(tmp_path / "ckpt", model, expert_masks(model, RAGGED, [9]))


def fuse(ckpt: Path) -> None:
    names = [f"model.layers.0.mlp.experts.{expert}.down_proj.weight" for expert in range(4)]
    tensors = tensors_of(ckpt)
    fused = {"model.layers.0.mlp.experts.down_proj": torch.stack([tensors[name] for name in names])}
    edit_weights(ckpt, fused, remove=names)


BAD_INPUTS = {
    "mask shape": (lambda c: edit_masks(c, **{EXPERTS0: torch.ones(4, 40)}), "[4, 40], the model needs [4, 24]"),
    "mask nan": (lambda c: edit_masks(c, **{EXPERTS0: torch.full((4, 24), torch.nan)}), "96 of 96 values are NaN"),
    "mask of a dense mlp": (
        lambda c: edit_masks(c, **{"model.layers.0.mlp.channel_mask": torch.ones(40)}),
        "model.layers.0.mlp.channel_mask: unknown key; known: model.layers.{i}.self_attn.head_mask and "
        "model.layers.{i}.mlp.experts.channel_mask and model.layers.{i}.mlp.channel_mask",
    ),
    "fused on disk": (
        fuse,
        "model.layers.0.mlp.experts.down_proj and 0 more hold all experts of a layer in one tensor",
    ),
    "expert missing": (
        lambda c: edit_weights(c, {}, remove=("model.layers.2.mlp.experts.3.up_proj.weight",)),
        "model.layers.2.mlp.experts.3.up_proj.weight [24, 96]: missing",
    ),
    "experts": (lambda c: edit_json(c / "config.json", num_local_experts="4"), "num_local_experts is '4'"),
}


@pytest.mark.parametrize(("break_it", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_is_refused(ckpt, tmp_path, capsys, break_it, message):
    break_it(ckpt)
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_masks_of_both_projections_are_refused_where_these_are_clamped(tmp_path, capsys):
    model = tiny_model("gpt_oss", 6, 3, WIDTH)
    write_masked(tmp_path / "ckpt", model, expert_masks(model, RAGGED), "gate_and_up")
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "channel_mask_site is gate_and_up, but GptOssForCausalLM clamps both projections" in error
    assert not (tmp_path / "out").exists()


def test_few_shapes_are_refused(ckpt, tmp_path, capsys):
    assert convert_pruned(ckpt, tmp_path / "out", "--max-distinct-shapes", 2) == 2
    assert "--max-distinct-shapes is for models without experts" in capsys.readouterr().err


def test_olmoe_keeps_its_heads(tmp_path, capsys):
    model = tiny_model("olmoe", 6, 3, WIDTH)
    masks = {HEAD_MASK.format(1): torch.tensor([1.0, 0, 1, 0, 1, 1])}
    write_masked(tmp_path / "ckpt", model, masks)
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 2
    message = "2 of 6 heads have a mask of 0, but OlmoeForCausalLM normalises q and k over all heads together"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize(
    ("model_type", "site"),
    [(name, site) for name in STOCK_MOE for site in CHANNEL_MASK_SITES] + [("gpt_oss", "product")],
)
def test_masks_multiply_what_the_formats_say(model_type, site, implementation):
    """Against one block written out, in every way in which Transformers computes experts; values and gradients."""
    model = tiny_model(model_type, 6, 3, WIDTH, num_hidden_layers=1)
    model.set_experts_implementation(implementation)
    experts = model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(3)
    mask = torch.stack([soft_mask(WIDTH, kept, generator) for kept in RAGGED[0]]).requires_grad_()
    names_before = [name for name, _ in model.named_parameters()]
    seen = {}
    hook = experts.register_forward_hook(lambda module, args, output: seen.update(args=args, output=output))
    with apply_masks(model, {EXPERTS0: mask}, site):
        model(torch.tensor(prompts()[-1:]))
    hook.remove()
    states, chosen, weights = seen["args"]
    expected = torch.zeros_like(states)
    for index in range(4):
        if site == "gate_and_up":
            gate, up = gate_and_up(experts, index, states)
            product = torch.nn.functional.silu(mask[index] * gate) * (mask[index] * up)
        else:
            product = mask[index] * product_of(experts, index, states)
        share = ((chosen == index) * weights).sum(-1, keepdim=True)
        expected = expected + output_of(experts, index, product) * share
    torch.testing.assert_close(seen["output"], expected, rtol=1e-4, atol=1e-4)
    direction = torch.randn(expected.shape, generator=generator)
    (gradient,) = torch.autograd.grad((seen["output"] * direction).sum(), mask)
    (expected_gradient,) = torch.autograd.grad((expected * direction).sum(), mask)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-3)
    assert sorted(name for name, _ in model.named_parameters()) == sorted(names_before), "parametrizations are left"
