"""convert-pruned with a LoRA adapter: merged in float32, before the masks are folded in, or refused whole."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from helpers.masked import convert_pruned, edit_json
from helpers.tiny import masks_for, tiny_model, write_masked
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from learner.model.masking import apply_masks

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "megatron_core": "megatron.core"}
PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
MODULES = [f"model.layers.{index}.{name}" for index in range(3) for name in PROJECTIONS]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def channels(*kept: int) -> torch.Tensor:
    mask = torch.zeros(40)
    mask[list(kept)] = torch.linspace(-1.3, 2, len(kept))  # none is 0
    return mask


# Three heads and eight channels in every layer, with soft values: a stock architecture can say what is left.
UNIFORM = masks_for(
    [[1, 0, 2, 0, 0, 0.5], [0, 1, 1, 0, 4, 0], [0.1, 0, 0, 0, 1, 7]],
    [channels(*range(8)), channels(*range(30, 38)), channels(*range(5, 13))],
)


@pytest.fixture
def ckpt(tmp_path) -> Path:
    model = tiny_model("llama", 6, 6, 40)
    write_masked(tmp_path / "ckpt", model, UNIFORM, "gate_and_up", lora_adapter="adapter")
    write_adapter(tmp_path / "ckpt", model, MODULES)
    return tmp_path / "ckpt"


def write_adapter(
    ckpt: Path, model: PreTrainedModel, modules: list[str], ranks: dict | None = None, dtype=torch.float32, **config
) -> dict[str, torch.Tensor]:
    """Saves a random adapter as PEFT does; returns its tensors. `ranks` are the ones that are not 4 (or `r`)."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for module in modules:
        rank = (ranks or {}).get(module, config.get("r", 4))
        rows, columns = model.get_submodule(module).weight.shape
        for half, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            value = torch.randn(shape, generator=generator).mul(0.15).to(dtype)
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = value
    (ckpt / "adapter").mkdir()
    save_file(tensors, ckpt / "adapter" / "adapter_model.safetensors")
    (ckpt / "adapter" / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return tensors


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


def edit_config(**changes):
    return lambda ckpt: edit_json(ckpt / "adapter" / "adapter_config.json", **changes)


def edit_tensors(changes: dict, remove: tuple = ()):
    def edit(ckpt: Path) -> None:
        path = ckpt / "adapter" / "adapter_model.safetensors"
        tensors = {key: value for key, value in (load_file(path) | changes).items() if key not in remove}
        save_file(tensors, path)

    return edit


def place(where):
    return lambda ckpt: edit_json(ckpt / "pruning.json", lora_adapter=where)


def truncate(ckpt: Path) -> None:
    path = ckpt / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def tie(ckpt: Path) -> None:
    edit_json(ckpt / "config.json", tie_word_embeddings=True)
    path = ckpt / "model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if key != "lm_head.weight"}, path)
    edit_tensors(
        {
            "base_model.model.lm_head.lora_A.weight": torch.ones(4, 96),
            "base_model.model.lm_head.lora_B.weight": torch.ones(256, 4),
        }
    )(ckpt)


INSIDE = "it must be null or a directory inside of the checkpoint"
BAD_ADAPTERS = {
    "absolute path": (lambda c: place(str(c / "adapter"))(c), INSIDE),
    "path that leaves": (place("../ckpt/adapter"), INSIDE),
    "path that leaves inside": (place("adapter/../../ckpt/adapter"), INSIDE),
    "path no string": (place(["adapter"]), INSIDE),
    "no directory": (place("nowhere"), "nowhere, the lora_adapter of pruning.json, is not a directory"),
    "a file": (place("config.json"), "is not a directory"),
    "no config": (lambda c: (c / "adapter" / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "no tensors": (lambda c: (c / "adapter" / "adapter_model.safetensors").unlink(), "safetensors is missing"),
    "truncated": (truncate, "truncated or no safetensors"),
    "damaged config": (lambda c: (c / "adapter" / "adapter_config.json").write_text("{"), "not valid JSON"),
    "peft type": (edit_config(peft_type="LOHA"), "peft_type is 'LOHA'; only 'LORA' is merged"),
    "rank": (edit_config(r=0), "r is 0; it must be a whole number of at least 1"),
    "rank bool": (edit_config(r=True), "r is True; it must be a whole number"),
    "rank missing": (edit_config(r=None), "r is None; it must be a whole number"),
    "rank huge": (edit_config(r=10**400), "shape [4, 96], but rank 1000000"),
    "alpha": (edit_config(lora_alpha="8"), "lora_alpha is '8'; it must be a finite number"),
    "alpha nan": (edit_config(lora_alpha=math.nan), "lora_alpha is nan; it must be a finite number"),
    "alpha huge": (edit_config(lora_alpha=10**400), "it must be a finite number"),
    "rslora": (edit_config(use_rslora="yes"), "use_rslora is 'yes'; it must be true or false"),
    "pattern list": (edit_config(rank_pattern=[4]), "rank_pattern is [4]; it must be a mapping"),
    "pattern value": (edit_config(rank_pattern={"q_proj": 0.5}), "rank_pattern['q_proj'] is 0.5; it must be a whole"),
    "pattern expression": (edit_config(alpha_pattern={"q_(": 1}), "alpha_pattern['q_(']: no regular expression"),
    "rank differs": (edit_config(r=8), "lora_A.weight: shape [4, 96], but rank 8 and model.layers.0."),
    "rank differs by pattern": (edit_config(rank_pattern={"q_proj": 2}), "0.self_attn.q_proj.lora_B.weight: shape"),
    "bias": (edit_config(bias="lora_only"), "bias is 'lora_only'; trained biases are not merged"),
    "dora": (edit_config(use_dora=True), "use_dora is True; only plain LoRA is merged"),
    "fan_in_fan_out": (edit_config(fan_in_fan_out=True), "fan_in_fan_out is True"),
    "lora_bias": (edit_config(lora_bias=True), "lora_bias is True"),
    "modules_to_save": (edit_config(modules_to_save=["lm_head"]), "modules_to_save is ['lm_head']"),
    "tokens": (edit_config(trainable_token_indices=[1]), "trainable_token_indices is [1]"),
    "replication": (edit_config(layer_replication=[[0, 2]]), "layer_replication is [[0, 2]]"),
    "later feature": (edit_config(use_magic=True), "use_magic is True; only plain LoRA is merged"),
    "pissa": (edit_config(init_lora_weights="pissa_niter_16"), "init_lora_weights is 'pissa_niter_16', which changed"),
    "olora": (edit_config(init_lora_weights="OLoRA"), "init_lora_weights is 'OLoRA', which changed"),
    "loftq": (edit_config(init_lora_weights="loftq"), "path_initial_model_for_weight_conversion"),
    "shape of A": (edit_tensors({f"{Q0}.lora_A.weight": torch.ones(4, 95)}), "lora_A.weight: shape [4, 95], but rank"),
    "shape of B": (edit_tensors({f"{Q0}.lora_B.weight": torch.ones(4)}), "lora_B.weight: shape [4], but rank"),
    "half": (edit_tensors({}, remove=(f"{Q0}.lora_B.weight",)), f"{Q0}.lora_A.weight: its lora_B is missing"),
    "other half": (edit_tensors({}, remove=(f"{Q0}.lora_A.weight",)), f"{Q0}.lora_B.weight: its lora_A is missing"),
    "twice": (edit_tensors({f"{Q0}.lora_A.default.weight": torch.ones(4, 96)}), "lora_A.weight: the same as"),
    "nan": (edit_tensors({f"{Q0}.lora_A.weight": torch.full((4, 96), torch.nan)}), "384 of 384 values are NaN"),
    "inf": (edit_tensors({f"{Q0}.lora_B.weight": torch.full((192, 4), torch.inf)}), "768 of 768 values are NaN"),
    "integers": (edit_tensors({f"{Q0}.lora_A.weight": torch.ones(4, 96, dtype=torch.int8)}), "weight: dtype I8"),
    "magnitude": (edit_tensors({f"{Q0}.lora_magnitude_vector": torch.ones(192)}), "magnitude_vector: unknown key"),
    "bias of B": (edit_tensors({f"{Q0}.lora_B.bias": torch.ones(192)}), "lora_B.bias: unknown key"),
    "other adapter": (edit_tensors({f"{Q0}.lora_A.two.weight": torch.ones(4, 96)}), "lora_A.two.weight: unknown key"),
    "no such layer": (
        edit_tensors({f"{Q0.replace('0', '3')}.lora_A.weight": torch.ones(4, 96)}),
        "LlamaForCausalLM has no linear layer model.layers.3.self_attn.q_proj",
    ),
    "norm": (
        edit_tensors({"base_model.model.model.norm.lora_A.weight": torch.ones(4, 96)}),
        "has no linear layer model.norm",
    ),
    "embedding": (
        edit_tensors({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 256)}),
        "adapters of the embedding are not merged",
    ),
    "trained copy": (
        edit_tensors({"base_model.model.lm_head.base_layer.weight": torch.ones(256, 96)}),
        "base_layer.weight: differs from lm_head.weight",
    ),
    "resized copy": (
        edit_tensors({"base_model.model.model.embed_tokens.weight": torch.ones(257, 96)}),
        "embed_tokens.weight: differs from model.embed_tokens.weight",
    ),
    "tied lm_head": (tie, "lm_head.lora_A.weight: lm_head is tied to the embedding"),
    "empty": (
        lambda c: save_file({}, c / "adapter" / "adapter_model.safetensors"),
        "holds no lora_A and lora_B",
    ),
    "overflow": (
        lambda c: (
            edit_config(lora_alpha=3e38)(c),
            edit_tensors({f"{Q0}.lora_A.weight": torch.ones(4, 96), f"{Q0}.lora_B.weight": torch.ones(192, 4) * 9})(c),
        ),
        "in F32 after the adapter was merged and the masks were folded in",
    ),
}


@pytest.mark.parametrize(("break_it", "message"), BAD_ADAPTERS.values(), ids=BAD_ADAPTERS.keys())
def test_bad_adapter_is_refused_and_leaves_nothing(ckpt, tmp_path, capsys, break_it, message):
    break_it(ckpt)
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert message in captured.err and "convert-pruned: " in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_every_problem_of_an_adapter_is_reported_at_once(ckpt, tmp_path, capsys):
    edit_config(use_dora=True, lora_alpha=None, alpha_pattern=[1], rank_pattern={"(": "4"})(ckpt)
    edit_tensors(
        {
            f"{Q0}.lora_A.weight": torch.ones(5, 95),
            f"{Q0.replace('q_', 'k_')}.lora_A.weight": torch.full((4, 96), torch.nan),
            "extra": torch.ones(1),
        },
        remove=(f"{Q0.replace('q_', 'v_')}.lora_B.weight",),
    )(ckpt)
    save_file({"head_z": torch.ones(6)}, ckpt / "pruning_masks.safetensors")
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    error = capsys.readouterr().err
    for message in (
        "use_dora is True",
        "lora_alpha is None",
        "alpha_pattern is [1]",
        "rank_pattern['('] is '4'",
        "rank_pattern['(']: no regular expression",
        "shape [5, 95]",
        "values are NaN",
        "extra: unknown key",
        "v_proj.lora_A.weight: its lora_B is missing",
        "head_z: unknown key",
    ):
        assert message in error


def test_pickled_adapters_are_never_read(ckpt, tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    (ckpt / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(Payload(), ckpt / "adapter" / "adapter_model.bin")
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    assert "pickled weights are never read; save the adapter as safetensors" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
