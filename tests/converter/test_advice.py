"""What convert-pruned says about serving, and what it copies beside the weights."""

import json
import shlex

import pytest
import torch
from helpers.masked import convert_pruned, edit_json, keep
from helpers.tiny import HEAD_DIM, masks_for, tiny_model, write_masked

from converter.advice import CPU_HEAD_DIMS

WARNING = "convert-pruned: warning: "


def test_an_invalid_generation_config_is_copied_as_it_is(ckpt, tmp_path):
    """Of Vicuna and early Llama-2; Transformers reads it, but refuses to write it."""
    text = '{"temperature": 0.9, "top_p": 0.6}\n\n'
    (ckpt / "generation_config.json").write_text(text)
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    assert (tmp_path / "out" / "generation_config.json").read_text() == text


def test_companions_that_cannot_be_copied_are_refused_with_all_other_problems(ckpt, tmp_path, capsys):
    (ckpt / "tokenizer.json").symlink_to("/etc/passwd")
    (ckpt / "modules.json").write_text("[1]")
    (ckpt / "pruning_masks.safetensors").unlink()
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    error = capsys.readouterr().err
    for message in ("is a symlink to /etc/passwd", "holds no list of modules", "pruning_masks.safetensors is missing"):
        assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


@pytest.mark.parametrize(
    ("auto_map", "options"),
    [
        ({"AutoTokenizer": ["tokenization_x.X", None]}, "--tokenizer {ckpt} --trust-remote-code"),
        ({"AutoTokenizer": [None, "org/name--tokenization_x.X"]}, "--trust-remote-code"),
    ],
)
def test_a_tokenizer_that_is_code_is_named(ckpt, tmp_path, capsys, auto_map, options):
    (ckpt / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    (ckpt / "tokenization_x.py").write_text("raise SystemExit")
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    captured = capsys.readouterr()
    command = f"vllm serve {tmp_path / 'out'} {options.format(ckpt=ckpt)}"
    assert f"Serve it: {command}\n" in captured.out
    assert f"{WARNING}the tokenizer is code of the dense model (" in captured.err
    assert not list((tmp_path / "out").glob("*.py"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"vllm serve <this directory> {options.format(ckpt='<the dense model>')}\n" in card


def test_what_may_be_uploaded_names_no_place_on_this_machine(ckpt, tmp_path):
    (ckpt / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}))
    edit_json(ckpt / "config.json", _name_or_path=str(tmp_path / "secret"))
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    tiny_model("llama", 3, 3, 40).save_pretrained(tmp_path / "base")
    torch.save({"intermediate_z": torch.ones(3, 1, 1, 40), "head_z": torch.ones(3, 1, 3, 1)}, tmp_path / "zs_s1.pt")
    assert convert_pruned(tmp_path / "zs_s1.pt", tmp_path / "out2", "--base-model", tmp_path / "base") == 0
    for path in (*(tmp_path / "out").iterdir(), *(tmp_path / "out2").iterdir()):
        assert str(tmp_path).encode() not in path.read_bytes(), path


def test_a_tokenizer_of_mistral_common_is_named(ckpt, tmp_path, capsys):
    (ckpt / "tekken.json").write_text("{}")
    assert convert_pruned(ckpt, tmp_path / "plain") == 0
    assert "--tokenizer-mode" not in capsys.readouterr().out
    (ckpt / "consolidated.safetensors").write_text("")
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert captured.out.rstrip().endswith("--tokenizer-mode mistral") and "mistral-common" in captured.err


@pytest.mark.parametrize("mode", ["hf", "mistral"])
def test_vllm_reads_directories_of_mistral_so(tmp_path, mode):
    from vllm.tokenizers.registry import resolve_tokenizer_args

    (tmp_path / "tekken.json").write_text("{}")
    if mode == "mistral":
        (tmp_path / "consolidated.safetensors").write_text("")
    assert resolve_tokenizer_args(str(tmp_path))[0] == mode


@pytest.mark.parametrize(("head_dim", "warned"), [(HEAD_DIM, False), (100, True), (48, True), (64, False)])
def test_a_head_dim_that_cpus_do_not_serve_is_named(tmp_path, capsys, head_dim, warned):
    model = tiny_model("llama", 6, 6, 40, head_dim=head_dim)
    masks = masks_for([[1, 0, 1, 1, 1, 1]], [keep(40, *range(17))])
    write_masked(tmp_path / "ckpt", model, masks)
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 0
    assert (
        f"{WARNING}head_dim is {head_dim}; vLLM's attention on CPUs takes 32, 64," in capsys.readouterr().err
    ) == warned


def test_the_head_dims_are_those_of_vllm():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(CPU_HEAD_DIMS) == CPUAttentionBackend.get_supported_head_sizes()


def test_a_list_that_has_more_entries_than_layers_is_refused(tmp_path, capsys):
    model = tiny_model("qwen3", 6, 6, 40)
    write_masked(tmp_path / "ckpt", model, {"model.layers.0.mlp.channel_mask": torch.ones(40)})
    edit_json(tmp_path / "ckpt" / "config.json", layer_types=["full_attention"] * 5)
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 2
    assert "layer_types has 5 entries, but num_hidden_layers is 3" in capsys.readouterr().err


def test_the_command_can_be_pasted_into_a_shell(ckpt, tmp_path, capsys):
    """Names may come from others: pruning.json names the dense model."""
    masks, dense, out = tmp_path / "masks", tmp_path / "masks" / "model; touch pwned", tmp_path / "my model"
    masks.mkdir()
    for name in ("pruning.json", "pruning_masks.safetensors"):
        (ckpt / name).rename(masks / name)
    ckpt.rename(dense)
    edit_json(masks / "pruning.json", base_model=dense.name)
    (dense / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_x.X", null]}}')
    assert convert_pruned(masks, out) == 0
    command = capsys.readouterr().out.rpartition("Serve it: ")[2]
    assert shlex.split(command) == ["vllm", "serve", str(out), "--tokenizer", str(dense), "--trust-remote-code"]
