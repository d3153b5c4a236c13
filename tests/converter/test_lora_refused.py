"""convert-pruned refuses a LoRA adapter that it cannot merge exactly: all problems at once, and nothing is left."""

import math
import os
import time
from pathlib import Path

import pytest
import torch
from helpers.lora import adapted_checkpoint
from helpers.masked import convert_pruned, edit_json
from safetensors.torch import load_file, save_file

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def ckpt(tmp_path) -> Path:
    return adapted_checkpoint(tmp_path / "ckpt")


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
    "pattern group": (edit_config(alpha_pattern={"(q|k)_proj": 1}), "alpha_pattern['(q|k)_proj'] is no name"),
    "pattern set": (edit_config(alpha_pattern={"[z-a]_proj": 1}), "alpha_pattern['[z-a]_proj'] is no name of modules"),
    "pattern repeats": (edit_config(rank_pattern={".*0.*q.*": 4}), "at most 2 of * and +; write the names out"),
    "pattern empty": (edit_config(rank_pattern={"": 4}), "rank_pattern[''] is no name of modules"),
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
    "long": (edit_config(use_magic="x" * 1_000_000), "xxx ...; only plain LoRA is merged"),
    "long names": (edit_config(rank_pattern={"x" * 300: 0.5, "x" * 301: 4}), "xxx ...] is 0.5; it must be a whole"),
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


@pytest.mark.parametrize(
    "pattern", ["(w*)*x", "(.|.)*x", "((q|q)+)+_", "(?:a?){30}a{30}", "(.*)*(.*)*(.*)*x", ".*" * 30 + "x"]
)
def test_patterns_that_take_for_ever_are_never_run(ckpt, tmp_path, capsys, pattern):
    edit_config(rank_pattern={pattern: 4})(ckpt)
    started = time.perf_counter()
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    assert time.perf_counter() - started < 20 and "is no name of modules" in capsys.readouterr().err


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
        "rank_pattern['('] is no name of modules",
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
