"""convert-pruned: what it writes and what it refuses."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers.masked import (
    CHANNELS0,
    HEADS0,
    RAGGED,
    convert_pruned,
    edit_json,
    edit_masks,
    edit_weights,
    keep,
    overflow,
)
from helpers.tiny import masks_for, tiny_model, write_masked
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from learner.model.masking import apply_masks
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.hf.loading import load_pruned

# The same number in every layer, different units: a stock architecture can say it.
UNIFORM = masks_for(
    [[1, 0, 2, 0, 0, 0.5], [0, 1, 1, 0, 4, 0], [0.1, 0, 0, 0, 1, 7]],
    [keep(40, *range(8)), keep(40, *range(30, 38)), keep(40, *range(5, 13)) * -2],
)


def test_writes_a_complete_model_directory(ckpt, tmp_path, capsys):
    (ckpt / "tokenizer.json").write_text("{}")
    (ckpt / "chat_template.jinja").write_text("hello")
    (ckpt / "modeling_evil.py").write_text("raise SystemExit")
    edit_json(ckpt / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Model"})
    out = tmp_path / "deep" / "out"
    assert convert_pruned(ckpt, out, "--max-shard-size", "100KB") == 0
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["PrunedLlamaForCausalLM"]
    assert "auto_map" not in config, "it names code that is not there and does not know the new shapes"
    assert config["model_type"] == "llama" and config["num_attention_heads"] == 6 and config["head_dim"] == 32
    assert config["per_layer_config"] == {
        "0": {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 17},
        "1": {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 1},
        "2": {"intermediate_size": 20},
    }
    assert config["pruning"]["method"] == "test" and config["pruning"]["format_version"] == 1
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    expected = ModelGeometry.from_config(config).tensor_shapes()
    found = {}
    for shard in shards:
        with safe_open(out / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert found == expected
    assert index["metadata"]["total_size"] == sum(4 * torch.Size(shape).numel() for shape in expected.values())
    names = {path.name for path in out.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md"} <= names
    assert "modeling_evil.py" not in names and "pruning_masks.safetensors" not in names
    assert "| 1 | 1 | 1 | 1 |" in (out / "README.md").read_text()
    assert out.stat().st_mode == ckpt.stat().st_mode
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {(ckpt / "config.json").stat().st_mode & 0o777}
    assert "vllm serve" in capsys.readouterr().out


@pytest.mark.parametrize("site", ["product", "gate_and_up"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3"])
def test_uniform_results_run_on_stock_hugging_face(tmp_path, model_type, site):
    model = tiny_model(model_type, 6, 6, 40)
    write_masked(tmp_path / "ckpt", model, UNIFORM, site)
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(stock) is type(model)
    assert stock.config.num_attention_heads == 3 and stock.config.intermediate_size == 8
    tokens = torch.arange(50)[None]
    with torch.no_grad(), apply_masks(model, UNIFORM, site):
        torch.testing.assert_close(stock(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_uniform_heads_that_llama_refuses_stay_llama(tmp_path):
    """Transformers and vLLM choose the tokenizer by model_type, see test_tokenizers.py."""
    model = tiny_model("llama", 6, 6, 40)
    masks = masks_for([[1, 1, 0, 1, 1, 1]] * 3, [torch.ones(40)] * 3)
    write_masked(tmp_path / "ckpt", model, masks)
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 0
    pruned = load_pruned(tmp_path / "out", dtype=torch.float32)
    assert type(pruned).__name__ == "PrunedLlamaForCausalLM" and pruned.config.model_type == "llama"
    tokens = torch.arange(50)[None]
    with torch.no_grad(), apply_masks(model, masks):
        torch.testing.assert_close(pruned(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folds_in_float32_and_casts_once(tmp_path, dtype):
    model = tiny_model("llama", 6, 6, 40).to(dtype)
    mask = torch.linspace(0.1, 7.9, 40)
    write_masked(tmp_path / "ckpt", model, masks_for([], []) | {"model.layers.0.mlp.channel_mask": mask})
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 0
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    tensors, layer = load_file(shard), model.model.layers[0].mlp
    assert torch.equal(
        tensors["model.layers.0.mlp.up_proj.weight"], (layer.up_proj.weight.float() * mask[:, None]).to(dtype)
    )
    assert torch.equal(tensors["model.layers.0.mlp.gate_proj.weight"], layer.gate_proj.weight)


def test_masks_only_checkpoint_takes_weights_from_its_base_model(tmp_path, ckpt):
    masks_only = tmp_path / "masks"
    masks_only.mkdir()
    for name in ("pruning_masks.safetensors", "pruning.json"):
        (masks_only / name).write_bytes((ckpt / name).read_bytes())
    assert convert_pruned(masks_only, tmp_path / "out") == 2
    assert convert_pruned(masks_only, tmp_path / "out", "--base-model", ckpt) == 0
    info = json.loads((masks_only / "pruning.json").read_text())
    (masks_only / "pruning.json").write_text(json.dumps(info | {"base_model": "../ckpt"}))
    assert convert_pruned(masks_only, tmp_path / "out2") == 0
    other = tmp_path / "other"
    tiny_model("llama", 6, 6, 40, seed=1).save_pretrained(other)
    assert (
        convert_pruned(ckpt, tmp_path / "out3", "--base-model", other) == 0
    )  # counts before the weights beside the masks
    (shard,) = (tmp_path / "out3").glob("*.safetensors")
    assert torch.equal(
        load_file(shard)["model.norm.weight"], load_file(other / "model.safetensors")["model.norm.weight"]
    )
    assert (tmp_path / "out2" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_dry_run_prints_the_plan_and_writes_nothing(ckpt, tmp_path, capsys):
    assert convert_pruned(ckpt, tmp_path / "out", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert (
        "FFN channels of 40" in " ".join(printed.split())
        and " 17 " in printed
        and "PrunedLlamaForCausalLM" in printed
        and "KV heads: 18 before, 11 after" in printed
    )
    assert not (tmp_path / "out").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def add_index(ckpt: Path, file: str) -> None:
    names = load_file(ckpt / "model.safetensors")
    (ckpt / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))


BAD_INPUTS = {
    "no checkpoint": (lambda c: c.rename(c.with_name("gone")), "does not exist"),
    "no mask file": (lambda c: (c / "pruning_masks.safetensors").unlink(), "pruning_masks.safetensors is missing"),
    "no pruning.json": (lambda c: (c / "pruning.json").unlink(), "pruning.json is missing"),
    "damaged json": (lambda c: (c / "pruning.json").write_text("{"), "not valid JSON"),
    "json list": (lambda c: (c / "pruning.json").write_text("[]"), "must hold a JSON object"),
    "format version": (lambda c: edit_json(c / "pruning.json", format_version=2), "format_version is 2; it must be 1"),
    "mask site": (lambda c: edit_json(c / "pruning.json", channel_mask_site="down"), "channel_mask_site is 'down'"),
    "method": (lambda c: edit_json(c / "pruning.json", method="a\nb: c"), "it must be one word"),
    "pruning key": (lambda c: edit_json(c / "pruning.json", extra=1), "unknown key 'extra'"),
    "lora": (lambda c: edit_json(c / "pruning.json", lora_adapter="gone"), "ckpt/gone, the lora_adapter of"),
    "mask shape": (lambda c: edit_masks(c, **{HEADS0: torch.ones(7)}), "shape [7], the model needs [6]"),
    "mask rank": (lambda c: edit_masks(c, **{HEADS0: torch.ones(1, 6)}), "shape [1, 6], the model needs [6]"),
    "mask nan": (lambda c: edit_masks(c, **{HEADS0: torch.full((6,), torch.nan)}), "6 of 6 values are NaN"),
    "mask inf": (lambda c: edit_masks(c, **{CHANNELS0: keep(40, 3) * torch.inf}), "values are NaN or infinite"),
    "mask integer": (lambda c: edit_masks(c, **{HEADS0: torch.ones(6, dtype=torch.int64)}), "dtype I64"),
    "mask key": (lambda c: edit_masks(c, head_z=torch.ones(6)), "head_z: unknown key"),
    "mask layer": (lambda c: edit_masks(c, **{HEADS0.replace("0", "3"): torch.ones(6)}), "head_mask: unknown key"),
    "masks truncated": (lambda c: truncate(c / "pruning_masks.safetensors"), "truncated or no safetensors"),
    "architecture": (
        lambda c: edit_json(c / "config.json", architectures=["GPT2LMHeadModel"], model_type="gpt2"),
        "GPT2LMHeadModel",
    ),
    "quantized": (lambda c: edit_json(c / "config.json", quantization_config={"bits": 4}), "is quantized"),
    "pruned already": (
        lambda c: edit_json(c / "config.json", per_layer_config={"0": {"intermediate_size": 20}}),
        "is pruned already",
    ),
    "model_type list": (lambda c: edit_json(c / "config.json", model_type=["llama"]), "not supported"),
    "layers list": (lambda c: edit_json(c / "config.json", per_layer_config=[1]), "per_layer_config is a list"),
    "layer number": (lambda c: edit_json(c / "config.json", per_layer_config={"0": 5}), "5 is no mapping of sizes"),
    "head_dim": (lambda c: edit_json(c / "config.json", head_dim="32"), "head_dim is '32'; it must be a whole number"),
    "odd head_dim": (
        lambda c: edit_json(c / "config.json", head_dim=3, num_attention_heads=64, num_key_value_heads=64),
        "head_dim is 3; it must be even",
    ),
    "eps text": (lambda c: edit_json(c / "config.json", rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6'; it must be"),
    "eps null": (lambda c: edit_json(c / "config.json", rms_norm_eps=None), "rms_norm_eps is None; it must be"),
    "eps nan": (lambda c: edit_json(c / "config.json", rms_norm_eps=torch.nan), "rms_norm_eps is nan; it must be"),
    "eps of 400 digits": (lambda c: edit_json(c / "config.json", rms_norm_eps=10**400), "more than 30 digits"),
    "yarn without factor": (
        lambda c: edit_json(c / "config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        "config.json: Transformers refuses rope_parameters, max_position_embeddings",
    ),
    "positions text": (
        lambda c: edit_json(c / "config.json", max_position_embeddings="256"),
        "config.json: Transformers refuses rope_parameters, max_position_embeddings",
    ),
    "tied string": (lambda c: edit_json(c / "config.json", tie_word_embeddings="false"), "must be true or false"),
    "tied without embedding": (
        lambda c: (
            edit_json(c / "config.json", tie_word_embeddings=True),
            edit_weights(c, {}, remove=("model.embed_tokens.weight",)),
        ),
        "model.embed_tokens.weight [256, 96]: missing",
    ),
    "index entry": (lambda c: add_index(c, ["model.safetensors"]), "files outside of its directory"),
    "config size": (lambda c: edit_json(c / "config.json", intermediate_size=41), "config.json says [41, 96]"),
    "shard truncated": (lambda c: truncate(c / "model.safetensors"), "truncated or no safetensors"),
    "shard garbage": (lambda c: (c / "model.safetensors").write_bytes(b"\xff" * 5000), "truncated or no safetensors"),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), "names no base_model"),
    "tensor missing": (
        lambda c: edit_weights(c, {}, remove=("model.layers.2.mlp.up_proj.weight",)),
        "model.layers.2.mlp.up_proj.weight [40, 96]: missing",
    ),
    "tensor unknown": (lambda c: edit_weights(c, {"model.extra": torch.ones(3)}), "model.extra [3]: not a tensor of"),
    "tensor dtype": (
        lambda c: edit_weights(c, {"model.norm.weight": torch.ones(96, dtype=torch.int8)}),
        "model.norm.weight: dtype I8",
    ),
    "tensor nan": (
        lambda c: edit_weights(c, {"model.norm.weight": torch.full((96,), torch.nan)}),
        "model.norm.weight: 96 values are NaN or infinite in F32; check",
    ),
    "fold overflows": (lambda c: overflow(c), "values are NaN or infinite in F32 after the masks were"),
    "index outside": (lambda c: add_index(c, "../elsewhere.safetensors"), "files outside of its directory"),
    "index absolute": (lambda c: add_index(c, "/etc/passwd"), "files outside of its directory"),
    "index beside a single file": (lambda c: add_index(c, "pruning_masks.safetensors"), "has both model.safetensors"),
    "index empty": (lambda c: (c / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
}


@pytest.mark.parametrize(("break_it", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_is_refused_and_leaves_nothing(ckpt, tmp_path, capsys, break_it, message):
    break_it(ckpt)
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert message in captured.err and "convert-pruned: " in captured.err
    assert not [path.name for path in tmp_path.iterdir() if path.name not in ("ckpt", "gone")]


def test_pickled_weights_are_never_read(ckpt, tmp_path, capsys):
    (ckpt / "model.safetensors").unlink()
    edit_json(ckpt / "pruning.json", base_model=".")

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    torch.save(Payload(), ckpt / "pytorch_model.bin")
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    assert "pickled weights are never read" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


def test_every_problem_is_reported_at_once(ckpt, tmp_path, capsys):
    edit_masks(ckpt, **{HEADS0: torch.ones(7), CHANNELS0: torch.full((40,), torch.nan), "extra": torch.ones(1)})
    edit_weights(ckpt, {"model.norm.weight": torch.ones(95)}, remove=("lm_head.weight",))
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    error = capsys.readouterr().err
    for message in (
        "shape [7]",
        "40 of 40 values are NaN",
        "extra: unknown",
        "[95]",
        "lm_head.weight [256, 96]: missing",
    ):
        assert message in error


def test_tied_lm_head_must_equal_the_embedding(tmp_path, capsys):
    model = tiny_model("llama", 6, 6, 40, tie_word_embeddings=True)
    write_masked(tmp_path / "ckpt", model, RAGGED)
    edit_weights(tmp_path / "ckpt", {"lm_head.weight": model.model.embed_tokens.weight.clone()})
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 0
    edit_weights(tmp_path / "ckpt", {"lm_head.weight": model.model.embed_tokens.weight + 1})
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out2") == 2
    assert "lm_head.weight: differs from model.embed_tokens.weight" in capsys.readouterr().err
