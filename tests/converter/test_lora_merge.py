"""convert-pruned with a LoRA adapter: merged in float32, before the masks are folded in."""

import re
from pathlib import Path

import pytest
import torch
from helpers.lora import MODULES, UNIFORM, adapted_checkpoint, channels, write_adapter
from helpers.masked import convert_pruned, edit_json
from helpers.tiny import tiny_model, write_masked
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from learner.model.masking import apply_masks
from pruned_vllm.hf.loading import load_pruned


@pytest.fixture
def ckpt(tmp_path) -> Path:
    return adapted_checkpoint(tmp_path / "ckpt")


def delta(tensors: dict[str, torch.Tensor], module: str, scale: float) -> torch.Tensor:
    a, b = (tensors[f"base_model.model.{module}.lora_{half}.weight"].double() for half in "AB")
    return scale * (b @ a)


def converted_tensors(out: Path) -> dict[str, torch.Tensor]:
    (shard,) = out.glob("*.safetensors")
    return load_file(shard)


def assert_rounded_once(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """`exact` is float64; half a unit in the last place for the cast, and float32's own error below it."""
    relative = torch.finfo(actual.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(actual.double(), exact, rtol=relative, atol=1e-6)


Q_PROJ, UP_1 = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"
SCALES = {  # adapter_config.json, the ranks that are not r, scale of q_proj and of up_proj in layer 1
    "alpha / r": ({"r": 4, "lora_alpha": 8}, {}, 2, 2),
    "fractional alpha": ({"r": 3, "lora_alpha": 0.5}, {}, 0.5 / 3, 0.5 / 3),
    "rslora": ({"r": 4, "lora_alpha": 8, "use_rslora": True}, {}, 4, 4),
    "rank by suffix": ({"rank_pattern": {"q_proj": 2}}, {Q_PROJ: 2}, 4, 2),
    "part of a name is no suffix": ({"alpha_pattern": {"proj": 1, "_proj": 1}}, {}, 2, 2),
    "rank by expression": ({"rank_pattern": {r"^model\.layers\.[0-1]\.mlp.*": 16}}, {UP_1: 16}, 2, 0.5),
    "anchored names": ({"rank_pattern": {r"^model\.layers\.\d\.mlp\.up_proj$": 16}}, {UP_1: 16}, 2, 0.5),
    "alternatives": ({"alpha_pattern": {"up_proj|q_proj": 1}}, {}, 0.25, 0.25),
    "first match counts": ({"alpha_pattern": {"self_attn.q_proj": 4, "q_proj": 40}}, {}, 1, 2),
    "rslora with patterns": (
        {"use_rslora": True, "rank_pattern": {"up_proj": 16}, "alpha_pattern": {"1.mlp.up_proj": 6}},
        {UP_1: 16},
        4,
        1.5,
    ),
}


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize(("config", "ranks", "q_scale", "up_scale"), SCALES.values(), ids=SCALES.keys())
def test_scales(tmp_path, config, ranks, q_scale, up_scale, dtypes):
    model = tiny_model("llama", 6, 6, 40).to(dtypes[0])
    mask = channels(*range(1, 30, 2))
    ckpt = write_masked(
        tmp_path / "ckpt", model, {"model.layers.1.mlp.channel_mask": mask}, lora_adapter="adapter", method="x"
    )
    tensors = write_adapter(ckpt, model, [Q_PROJ, UP_1], ranks, dtype=dtypes[1], **config)
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    result = converted_tensors(tmp_path / "out")
    kept = mask.nonzero().view(-1)
    q_proj, up_proj = (model.get_submodule(name).weight.double() for name in (Q_PROJ, UP_1))
    assert result[f"{Q_PROJ}.weight"].dtype == result[f"{UP_1}.weight"].dtype == dtypes[0]
    # q_proj is not cut at all; up_proj is folded after the merge and rounded once.
    assert_rounded_once(result[f"{Q_PROJ}.weight"], q_proj + delta(tensors, Q_PROJ, q_scale))
    assert_rounded_once(
        result[f"{UP_1}.weight"], (mask.double()[:, None] * (up_proj + delta(tensors, UP_1, up_scale)))[kept]
    )
    assert torch.equal(result["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)


def test_float64_weights_are_merged_in_float64(tmp_path):
    model = tiny_model("llama", 6, 6, 40).double()
    ckpt = write_masked(tmp_path / "ckpt", model, UNIFORM, lora_adapter="adapter")
    tensors = write_adapter(ckpt, model, ["lm_head"], dtype=torch.bfloat16)
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    expected = model.lm_head.weight + delta(tensors, "lm_head", 2)
    torch.testing.assert_close(converted_tensors(tmp_path / "out")["lm_head.weight"], expected, rtol=0, atol=1e-14)


@torch.no_grad()
def assert_stock_model_computes(out: Path, merged: PreTrainedModel, site: str) -> None:
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert stock.config.num_attention_heads == 3 and stock.config.intermediate_size == 8
    tokens = torch.arange(50)[None]
    with apply_masks(merged, UNIFORM, site):
        torch.testing.assert_close(stock(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("site", ["gate_and_up", "product"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_masks_are_folded_into_the_merged_model(tmp_path, family, site):
    model = tiny_model(family, 6, 6, 40)
    ckpt = write_masked(tmp_path / "ckpt", model, UNIFORM, site, lora_adapter="adapter")
    tensors = write_adapter(ckpt, model, [*MODULES, "lm_head"])
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    for module in [*MODULES, "lm_head"]:
        model.get_submodule(module).weight += delta(tensors, module, 2).float()
    assert_stock_model_computes(tmp_path / "out", model, site)


def test_an_adapter_of_fused_projections_is_merged_into_their_parts(tmp_path):
    model = tiny_model("phi3", 6, 3, 40)
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    modules = [f"model.layers.{index}.{part}" for index in range(3) for part in parts]
    masks = {"model.layers.1.mlp.channel_mask": channels(*range(1, 30, 2))}
    ckpt = write_masked(tmp_path / "ckpt", model, masks, "gate_and_up", lora_adapter="adapter")
    tensors = write_adapter(ckpt, model, modules)
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    for module in modules:
        model.get_submodule(module).weight += delta(tensors, module, 2).float()
    pruned, tokens = load_pruned(tmp_path / "out", dtype=torch.float32), torch.arange(50)[None]
    with torch.no_grad(), apply_masks(model, masks, "gate_and_up"):
        torch.testing.assert_close(pruned(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


PEFT_CONFIGS = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 8},
    "all, patterns": {
        "target_modules": "all-linear",
        "r": 4,
        "rank_pattern": {"down_proj": 2, "^model.layers.1.self_attn.[kv]_proj": 6, "proj": 3},
        "alpha_pattern": {"layers.2.mlp.up_proj": 32, ".*gate_proj": 1},
    },
    "rslora, some layers": {
        "target_modules": ["o_proj", "up_proj"],
        "use_rslora": True,
        "layers_to_transform": [0, 2],
        "rank_pattern": {"0.self_attn.o_proj": 9},
    },
    "lm_head": {"target_modules": ["lm_head", "gate_proj"]},  # PEFT stores a copy of lm_head too
    "mica": {"target_modules": ["down_proj"], "init_lora_weights": "mica"},
    "embeddings saved": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize(("name", "config"), PEFT_CONFIGS.items(), ids=PEFT_CONFIGS.keys())
@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")  # of patterns without a match
def test_merges_what_peft_merges(tmp_path, name, config):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama", 6, 6, 40)
    ckpt = write_masked(tmp_path / "ckpt", model, UNIFORM, "gate_and_up", lora_adapter="deep/adapter")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.15)
    adapted.save_pretrained(
        ckpt / "deep" / "adapter", save_embedding_layers=True if name == "embeddings saved" else "auto"
    )
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    assert_stock_model_computes(tmp_path / "out", adapted.merge_and_unload(), "gate_and_up")


def test_the_adapter_changes_the_result_and_the_report_says_so(ckpt, tmp_path, capsys):
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    assert "LoRA adapter: rank 4, merged into 21 weights" in capsys.readouterr().out
    assert "LoRA adapter: rank 4, merged into 21 weights" in (tmp_path / "out" / "README.md").read_text()
    edit_json(ckpt / "pruning.json", lora_adapter=None)
    assert convert_pruned(ckpt, tmp_path / "dense") == 0
    assert "LoRA" not in capsys.readouterr().out
    merged, plain = converted_tensors(tmp_path / "out"), converted_tensors(tmp_path / "dense")
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert changed == {f"{module}.weight" for module in MODULES}


def test_the_adapter_lies_beside_the_masks_wherever_the_weights_are(ckpt, tmp_path):
    masks_only = tmp_path / "masks"
    masks_only.mkdir()
    for name in ("pruning_masks.safetensors", "pruning.json", "adapter"):
        (ckpt / name).rename(masks_only / name)
    assert convert_pruned(masks_only, tmp_path / "out", "--base-model", ckpt) == 0


def test_keys_with_the_adapter_name(ckpt, tmp_path):
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    file = ckpt / "adapter" / "adapter_model.safetensors"
    save_file({re.sub(r"(lora_[AB])", r"\1.default", key): value for key, value in load_file(file).items()}, file)
    assert convert_pruned(ckpt, tmp_path / "out2") == 0
    shard = "model.safetensors"
    assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "out2" / shard).read_bytes()
