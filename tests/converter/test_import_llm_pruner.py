"""Whole pickled models, of LLM-Pruner and others: a converted one computes what the dense model with zeros computes."""

import json
import os

import pytest
import torch
from helpers.cut import (
    LLM_PRUNER,
    Project,
    channel_wise,
    check_same_logits,
    config_like,
    cut_weights,
    half,
    upto,
    zeroed,
)
from helpers.lora import CONFIG as ADAPTER
from helpers.masked import convert_pruned, edit_json
from helpers.tiny import byte_tokenizer, tiny_model
from helpers.torch_files import FORMATS
from safetensors.torch import save_file

from converter.importers import recognised
from pruned_vllm.hf.loading import load_pruned

FLAP = "models.hf_llama.modeling_llama"


CASES = {  # family, heads, KV heads, width; KV heads and channels that stay; attributes of attention
    "block": ("llama", 6, 6, 40, [[0, 1, 2, 3, 4, 5], [1, 2, 5], [0, 4]], upto(40, 30, 17), {"head_dim": 32}),
    "global": ("llama", 6, 6, 40, upto(6, 6, 6), [[3], list(range(0, 40, 2)), [39, 38]], {"head_dim": 32}),
    "groups": ("llama", 6, 3, 40, [[0, 2], [1], [0, 1, 2]], upto(40, 20, 40), {"head_dim": 32}),
    "mistral": ("mistral", 8, 2, 40, [[0], [1], [0, 1]], upto(8, 40, 1), {"head_dim": 32}),
    "qwen": ("qwen2", 6, 3, 40, [[0, 2], [1], [2]], upto(8, 40, 1), {"head_dim": 32}),
    "one head": ("llama", 1, 1, 8, [[0], [0], [0]], upto(1, 3, 8), {"head_dim": 32}),
    "heads alone": ("llama", 6, 6, 40, upto(3, 3, 3), upto(40, 40, 40), {"num_heads": 3}),
    "head_dim of the configuration": ("llama", 3, 3, 40, upto(1, 2, 3), upto(40, 40, 40), {}),
}


@pytest.mark.parametrize(("case", "container"), list(zip(CASES, [*FORMATS] * 4, strict=True)))
def test_block_wise_and_global_pruning(tmp_path, monkeypatch, case, container, capsys):
    family, heads, kv_heads, width, kept_heads, channels, attention = CASES[case]
    model = half(tiny_model(family, heads, kv_heads, width))
    project = Project(monkeypatch, LLM_PRUNER, type(model).__name__)
    left_out = ("num_key_value_heads",) if heads == kv_heads else ()  # old configurations have no such key
    weights = {name: tensor.half() for name, tensor in cut_weights(model, kept_heads, channels).items()}
    pickled = project.model(weights, config_like(model, *left_out), **attention)
    file = tmp_path / "prune_log" / "pytorch_model.bin"
    file.parent.mkdir()
    torch.save({"model": pickled, "tokenizer": project.kind("Tokenizer", object)()}, file, **FORMATS[container])
    project.forget()
    assert recognised(file.parent) == {"llm-pruner": f"{file.name} is a pickled {LLM_PRUNER}.{type(model).__name__}"}
    assert convert_pruned(file.parent, tmp_path / "out", "--dtype", "float32") == 0
    check_same_logits(load_pruned(tmp_path / "out", dtype=torch.float32), zeroed(model, kept_heads, channels))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pruning"]["method"] == "llm-pruner" and config["model_type"] == family
    assert not {"torch_dtype", "id2label", "_name_or_path", "pruned_heads"} & set(config)
    printed = capsys.readouterr().out
    assert "Nothing in it was run" in printed and "The tokenizer in pytorch_model.bin is an object" in printed
    assert "No LoRA adapter lies beside pytorch_model.bin" in printed


@pytest.mark.parametrize("hidden", [72, 70, 1], ids=["divisible", "odd", "one"])
def test_channel_wise_pruning_cuts_the_hidden_states(tmp_path, monkeypatch, hidden, capsys):
    """The norms are over the dimensions that are left, whatever their number was; heads keep their size."""
    model = half(tiny_model("mistral", 6, 6, 40))
    before = model.num_parameters()
    pickled, expected = channel_wise(Project(monkeypatch, LLM_PRUNER, "LlamaForCausalLM"), model, hidden)
    torch.save({"model": pickled, "tokenizer": None}, tmp_path / "pytorch_model.bin")
    assert convert_pruned(tmp_path / "pytorch_model.bin", tmp_path / "out", "--dtype", "float32") == 0
    check_same_logits(load_pruned(tmp_path / "out", dtype=torch.float32), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["head_dim"] == 32
    printed = capsys.readouterr().out
    assert f"The hidden size was 96 before pruning and is {hidden} in all layers." in printed
    assert f"Parameters: {before:,} before" in printed


def test_a_module_of_installed_transformers(tmp_path, capsys):
    """As llama3.py of LLM-Pruner and DDP save: the stock class, cut in place, here with tied embeddings."""
    model = half(tiny_model("llama", 6, 3, 40, tie_word_embeddings=True))
    kept_heads, channels = [[0, 2], [1], [0, 1, 2]], upto(40, 20, 3)
    expected = zeroed(model, kept_heads, channels)
    for name, tensor in cut_weights(model, kept_heads, channels).items():
        *path, leaf = name.split(".")
        if name != "lm_head.weight":
            setattr(model.get_submodule(".".join(path)), leaf, torch.nn.Parameter(tensor, requires_grad=False))
    torch.save(model, tmp_path / "pruned.pt")
    assert recognised(tmp_path) == {
        "llm-pruner": "pruned.pt is a pickled transformers.models.llama.modeling_llama.LlamaForCausalLM"
    }
    assert convert_pruned(tmp_path / "pruned.pt", tmp_path / "out") == 0
    check_same_logits(load_pruned(tmp_path / "out", dtype=torch.float32), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pruning"]["method"] == "shapes", "nothing says that LLM-Pruner wrote it"
    assert "The tokenizer in" not in capsys.readouterr().out


def test_flap_leaves_biases_where_nothing_else_is_left(tmp_path, monkeypatch):
    model = half(tiny_model("llama", 6, 6, 40, attention_bias=True, mlp_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias") and "o_proj" not in name and "down_proj" not in name:
            parameter.zero_()
    kept_heads, channels = [[1, 3], [], [5]], [[], [2, 7], list(range(40))]
    weights = {
        name: tensor.half()
        for name, tensor in cut_weights(model, kept_heads, channels).items()
        if "o_proj" in name or "down_proj" in name or not name.endswith("_proj.bias")
    }
    project = Project(monkeypatch, FLAP, "LlamaForCausalLM")
    pickled = project.model(weights, config_like(model), head_dim=32)
    for layer, heads in enumerate(kept_heads):
        pickled.get_submodule(f"model.layers.{layer}.self_attn").num_heads = torch.tensor(len(heads))
    torch.save(pickled, tmp_path / "pruned_model.pt")
    project.forget()
    assert convert_pruned(tmp_path, tmp_path / "out", "--dtype", "float32") == 0
    check_same_logits(load_pruned(tmp_path / "out", dtype=torch.float32), zeroed(model, kept_heads, channels))


HEADS, CHANNELS = [[0, 1, 2], [1, 2, 5], [0, 4]], upto(40, 30, 17)


@pytest.fixture
def pruned(tmp_path, monkeypatch):
    """A model that was pruned by blocks and pickled in a directory, and the dense one with zeros."""
    model = half(tiny_model("llama", 6, 6, 40))
    project = Project(monkeypatch, LLM_PRUNER, "LlamaForCausalLM")
    weights = {name: tensor.half() for name, tensor in cut_weights(model, HEADS, CHANNELS).items()}
    directory = tmp_path / "pruned"
    directory.mkdir()
    pickled = project.model(weights, config_like(model), head_dim=32)
    torch.save({"model": pickled, "tokenizer": None}, directory / "pytorch_model.bin")
    return directory, pickled, zeroed(model, HEADS, CHANNELS), project


def test_the_base_model_gives_configuration_and_tokenizer(tmp_path, pruned):
    directory, _, expected, _ = pruned
    base = tmp_path / "base"
    tiny_model("llama", 6, 6, 40, rms_norm_eps=0.3).save_pretrained(base)
    edit_json(base / "config.json", torch_dtype="bfloat16")  # as Transformers called it before 5
    byte_tokenizer().save_pretrained(base)
    assert convert_pruned(directory, tmp_path / "out", "--dtype", "float32", "--base-model", base) == 0
    expected.config.rms_norm_eps = 0.3
    for part in expected.modules():
        if hasattr(part, "variance_epsilon"):
            part.variance_epsilon = 0.3
    check_same_logits(load_pruned(tmp_path / "out", dtype=torch.float32), expected)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert convert_pruned(directory, tmp_path / "out2", "--base-model", base) == 0
    config = json.loads((tmp_path / "out2" / "config.json").read_text())
    assert config["dtype"] == "float16" and "torch_dtype" not in config, "the weights are those of the pickled model"


def test_a_base_model_of_another_architecture(tmp_path, pruned, capsys):
    tiny_model("mistral", 6, 6, 40).save_pretrained(tmp_path / "base")
    assert convert_pruned(pruned[0], tmp_path / "out", "--base-model", tmp_path / "base") == 2
    assert "is a LlamaForCausalLM, that of --base-model is not" in capsys.readouterr().err


def test_a_tokenizer_beside_the_model_goes_along_and_other_files_do_not(tmp_path, pruned):
    directory = pruned[0]
    (directory / "LICENSE.txt").write_text("of something else")
    assert convert_pruned(directory / "pytorch_model.bin", tmp_path / "out") == 0
    assert not (tmp_path / "out" / "LICENSE.txt").exists()
    byte_tokenizer().save_pretrained(directory)
    assert convert_pruned(directory / "pytorch_model.bin", tmp_path / "out2") == 0
    assert (tmp_path / "out2" / "tokenizer.json").exists()


def adapter(directory, pickled, *, safe: bool = False) -> dict[str, torch.Tensor]:
    """An adapter of LLM-Pruner's post-training on the pruned sizes; what it adds to each weight."""
    generator, tensors, added = torch.Generator().manual_seed(3), {}, {}
    for name, weight in pickled.state_dict().items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            a = torch.randn(4, weight.shape[1], generator=generator).mul(0.15).half()
            b = torch.randn(weight.shape[0], 4, generator=generator).mul(0.15).half()
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
            added[name] = b.float() @ a.float() * 2
    (directory / "adapter_config.json").write_text(json.dumps(ADAPTER | {"r": 4, "lora_alpha": 8, "enable_lora": None}))
    if safe:
        save_file(tensors, directory / "adapter_model.safetensors")
    else:
        torch.save(tensors, directory / "adapter_model.bin")
    return added


@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_beside_the_model_is_merged(tmp_path, pruned, capsys, safe):
    directory, pickled, expected, _ = pruned
    added = adapter(directory, pickled, safe=safe)
    for layer, (heads, channels) in enumerate(zip(HEADS, CHANNELS, strict=True)):
        rows = [head * 32 + row for head in heads for row in range(32)]
        for module in ("q_proj", "k_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{module}"
            expected.get_submodule(name).weight[rows] += added[f"{name}.weight"]
        for module in ("gate_proj", "up_proj"):
            name = f"model.layers.{layer}.mlp.{module}"
            expected.get_submodule(name).weight[channels] += added[f"{name}.weight"]
        for name, columns in (
            (f"model.layers.{layer}.self_attn.o_proj", rows),
            (f"model.layers.{layer}.mlp.down_proj", channels),
        ):
            expected.get_submodule(name).weight[:, columns] += added[f"{name}.weight"]
    assert convert_pruned(directory, tmp_path / "out", "--dtype", "float32") == 0
    check_same_logits(load_pruned(tmp_path / "out", dtype=torch.float32), expected)
    printed = capsys.readouterr().out
    assert "LoRA adapter: rank 4, merged into 21 weights" in printed and "No LoRA adapter" not in printed


class Runs:
    def __init__(self, function, *arguments) -> None:
        self._called = function, arguments

    def __reduce__(self):
        return self._called


def test_nothing_in_the_pickle_is_run(tmp_path, pruned, capsys):
    directory, pickled, expected, _ = pruned
    canary = tmp_path / "canary"
    pickled.config.sliding_window = Runs(os.system, f"touch {canary}")
    pickled.config.rope_scaling = {"factor": Runs(eval, f"open({str(canary)!r}, 'w')")}
    pickled.config.max_position_embeddings = 1 << 70
    content = {"model": pickled, "tokenizer": Runs(os.system, f"touch {canary}"), "x": Runs(exec, "1 / 0")}
    torch.save(content, directory / "pytorch_model.bin")
    assert convert_pruned(directory, tmp_path / "out", "--dtype", "float32") == 2
    assert "cannot have, as max_position_embeddings; give the dense model's with --base-m" in capsys.readouterr().err
    tiny_model("llama", 6, 6, 40).save_pretrained(tmp_path / "base")
    args = ("--dtype", "float32", "--base-model", tmp_path / "base")
    assert convert_pruned(directory, tmp_path / "out", *args) == 0
    check_same_logits(load_pruned(tmp_path / "out", dtype=torch.float32), expected)
    assert not canary.exists()


def save(change):
    """Changes the pickled model and saves it again."""

    def spoil(directory, pickled, project):
        changed = change(pickled, project)
        torch.save(pickled if changed is None else changed, directory / "pytorch_model.bin")

    return spoil


def replace_forward(pickled, project):
    project.kind("Attention").dummy_forward = lambda self, x: x
    part = pickled.get_submodule("model.layers.1.self_attn")
    part.forward = part.dummy_forward


def add_hook(pickled, project):
    pickled.get_submodule("model.layers.1.mlp").register_forward_hook(project.kind("Hook", object)())


def rename(pickled, project):
    pickled.__class__ = project.kind("BloomForCausalLM")


def other_head_dim(pickled, project):
    pickled.get_submodule("model.layers.1.self_attn").head_dim = 16


def no_matrix(pickled, project):
    pickled.get_submodule("model.layers.1.self_attn.q_proj").weight = torch.nn.Parameter(torch.tensor(1.0))


def tie(pickled, project):
    pickled.config.tie_word_embeddings = True


def both_adapters(directory, pickled, project):
    adapter(directory, pickled)
    adapter(directory, pickled, safe=True)


def wrong_adapter(directory, pickled, project):
    adapter(directory, pickled)
    weights = torch.load(directory / "adapter_model.bin")
    weights["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"] = torch.ones(40, 4)
    torch.save(weights, directory / "adapter_model.bin")


REFUSED = {
    "forward": (save(replace_forward), "the forward pass of model.layers.1.self_attn and 0 more"),
    "forward, what to do": (save(replace_forward), "give its layer_drop_config.txt with --from depth"),
    "hook": (save(add_hook), "the forward pass of model.layers.1.mlp"),
    "class": (save(rename), "a pickled 'BloomForCausalLM' is not supported; supported: LlamaForCausalLM"),
    "no configuration": (save(lambda model, _: model.__dict__.pop("config") and None), "has no configuration"),
    "sizes missing": (save(lambda model, _: delattr(model.config, "vocab_size")), "vocab_size"),
    "head_dim": (save(other_head_dim), "model.layers.1.self_attn: 16"),
    "no matrix": (save(no_matrix), "model.layers.1.self_attn.q_proj.weight: shape []; a weight has two dimensions"),
    "tied": (save(tie), "lm_head.weight differs from model.embed_tokens.weight"),
    "both adapters": (both_adapters, "holds both adapter_model.safetensors and adapter_model.bin"),
    "wrong adapter": (wrong_adapter, "layers.1.mlp.up_proj.lora_B.weight: shape [40, 4]"),
    "several": (
        lambda directory, model, _: torch.save(model, directory / "b.pt"),
        "holds several pickled models: b.pt",
    ),
    "other weights too": (
        lambda directory, *_: save_file({"model.norm.weight": torch.ones(96)}, directory / "model.safetensors"),
        "holds weights as safetensors as well as the pickled model pytorch_model.bin, and they may differ; give that",
    ),
    "none": (lambda directory, *_: (directory / "pytorch_model.bin").unlink(), "holds no pickled model; give the file"),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
def test_models_that_are_refused(tmp_path, pruned, capsys, spoil, message):
    directory, pickled, _, project = pruned
    spoil(directory, pickled, project)
    assert convert_pruned(directory, tmp_path / "out", "--from", "llm-pruner") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_file_without_a_model(tmp_path, capsys):
    torch.save({"a": 1}, tmp_path / "a.pt")
    assert convert_pruned(tmp_path / "a.pt", tmp_path / "out", "--from", "llm-pruner") == 2
    assert "a.pt holds no pickled model, but a dictionary with 'a'" in capsys.readouterr().err


def test_a_directory_of_evopress_is_not_taken_for_one(pruned):
    directory = pruned[0]
    assert "llm-pruner" in recognised(directory)
    (directory / "layer_drop_config.txt").write_text("none\nattn\nmlp\n")
    assert "llm-pruner" not in recognised(directory)
