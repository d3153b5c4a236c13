"""convert-pruned inspect: what a path is, its sizes, what serving needs; told from headers alone."""

import json
import math
import shutil

import pytest
import torch
from helpers.imports import stored
from helpers.masked import RAGGED, convert_pruned, edit_json, edit_weights, ragged_checkpoint
from helpers.tiny import MOE_CONFIGS, NUM_LAYERS, expert_masks, masks_for, tiny_model, write_masked
from safetensors.torch import load_file

from converter import cli
from converter.checkpoint import Checkpoint
from converter.inspection_keys import CONTEXT, JSON_KEYS
from converter.serving_needs import serving_needs
from pruned_vllm.common.padding import PAD
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.serving.sharding import shard_layer


@pytest.fixture
def inspect(capsys):
    """Runs the command with --json and returns the object that it printed."""

    def run(*args) -> dict:
        capsys.readouterr()
        assert cli.main(["inspect", *map(str, args), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def tensors_of(directory) -> dict[str, torch.Tensor]:
    (file,) = (path for path in directory.glob("*.safetensors") if "mask" not in path.name)
    return load_file(file)


def step_bytes(tensors: dict[str, torch.Tensor], batch_size: int, kv_bytes: int) -> int:
    """Counted from the tensors themselves: all of them once, of the embedding one row for each sequence."""
    embedding = tensors["model.embed_tokens.weight"]
    weights = sum(tensor.nbytes for tensor in tensors.values()) - embedding.nbytes
    return weights + batch_size * (embedding[0].nbytes + CONTEXT * kv_bytes)


def step_flops(tensors: dict[str, torch.Tensor], query_rows: int) -> int:
    """Two for each number in a matrix but the embedding's, and four for each row of q and token of context."""
    matrices = [tensor.numel() for name, tensor in tensors.items() if tensor.dim() == 2 and "embed" not in name]
    return 2 * sum(matrices) + 4 * query_rows * CONTEXT


def test_a_converted_model(ckpt, tmp_path, inspect):
    out = tmp_path / "out"
    assert convert_pruned(ckpt, out) == 0
    found = inspect(out)
    dense, pruned = tensors_of(ckpt), tensors_of(out)
    assert (found["kind"], found["format"], found["method"]) == ("converted", None, "test")
    assert [layer["num_attention_heads"] for layer in found["layers"]] == [4, 1, 6]
    assert [layer["num_key_value_heads"] for layer in found["layers"]] == [4, 1, 6]
    assert [layer["intermediate_size"] for layer in found["layers"]] == [17, 1, 20]
    assert found["distinct_shapes"] == 3 and found["dtypes"] == ["F32"]
    assert found["widths"] == {"count": 3, "multiples": {"8": 0, "16": 0, "64": 0}}
    for side, tensors, heads in (("dense", dense, 18), ("pruned", pruned, 11)):
        assert found["parameters"][side] == sum(tensor.numel() for tensor in tensors.values())
        assert found["bytes"][side] == sum(tensor.nbytes for tensor in tensors.values())
        assert found["kv_cache_bytes_per_token"][side] == 2 * heads * 32 * 4
    for index, layer in enumerate(found["layers"]):
        of_layer = [tensor for name, tensor in pruned.items() if name.startswith(f"model.layers.{index}.")]
        assert layer["parameters"] == sum(tensor.numel() for tensor in of_layer)
        assert layer["bytes"] == sum(tensor.nbytes for tensor in of_layer)
    assert list(found["ideal_speedup"]) == ["1", "8", "64"]
    for size, speedup in found["ideal_speedup"].items():
        before, after = (
            step_bytes(tensors, int(size), 2 * heads * 32 * 4) for tensors, heads in ((dense, 18), (pruned, 11))
        )
        assert speedup["bytes"] == pytest.approx(before / after)
        assert speedup["flops"] == pytest.approx(step_flops(dense, 18 * 32) / step_flops(pruned, 11 * 32))
    assert found["serving"]["architecture"] == "PrunedLlamaForCausalLM" and found["serving"]["needs_plugin"]
    assert found["serving"]["largest_tensor_parallel_size"] == 6
    assert found["serving"]["even_tensor_parallel_sizes"] == [1]


def test_the_keys_are_those_of_the_help(ckpt, inspect, capsys):
    documented = [key for keys in JSON_KEYS for key in keys.split(", ")]
    assert list(inspect(ckpt)) == documented
    with pytest.raises(SystemExit):
        cli.main(["inspect", "--help"])
    help_text = capsys.readouterr().out
    assert all(keys in " ".join(help_text.split()) for keys in JSON_KEYS)


def same_sizes(found: dict) -> dict:
    kept = ("model_type", "parameters", "bytes", "kv_cache_bytes_per_token", "layers", "serving", "ideal_speedup")
    return {key: found[key] for key in kept}


GQA = masks_for([[1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1], [0] * 4 + [1] * 8, [0] * 12], [])


@pytest.mark.parametrize(
    "case",
    {
        "uneven groups, a layer without attention": lambda: (tiny_model("llama", 12, 3, 40), GQA),
        "biases that survive": lambda: (tiny_model("llama", 12, 3, 40, attention_bias=True, mlp_bias=True), GQA),
        "experts": lambda: (
            model := tiny_model("qwen3_moe", 6, 3, 40, mlp_only_layers=[1]),
            expert_masks(model, [[17, 0, 24, 5], [8, 8, 8, 8]], [11]),
        ),
        "half precision": lambda: (tiny_model("qwen2", 6, 6, 40).bfloat16(), RAGGED),
    }.items(),
    ids=lambda case: case[0],
)
def test_an_input_has_the_sizes_that_it_is_converted_to(tmp_path, inspect, case):
    model, masks = case[1]()
    ckpt, out = write_masked(tmp_path / "ckpt", model, masks), tmp_path / "out"
    before = {path: path.stat().st_mtime_ns for path in ckpt.rglob("*")}
    found = inspect(ckpt)
    assert (found["kind"], found["format"]) == ("pruned", "masked")
    assert {path: path.stat().st_mtime_ns for path in ckpt.rglob("*")} == before
    assert convert_pruned(ckpt, out) == 0
    assert same_sizes(found) == same_sizes(inspect(out))


def test_equal_layers_are_a_stock_model_that_forgot_what_it_was(tmp_path, inspect):
    masks = masks_for([[1, 1, 0, 1, 0, 0]] * 3, [torch.arange(40) < 16] * 3)
    ckpt = write_masked(tmp_path / "ckpt", tiny_model("llama", 6, 6, 40), masks)
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    found, before = inspect(tmp_path / "out"), inspect(ckpt)
    assert found["kind"] == "converted" and not found["serving"]["needs_plugin"]
    assert found["serving"]["architecture"] == "LlamaForCausalLM"
    assert (
        found["serving"]["even_tensor_parallel_sizes"] == [1] and found["serving"]["largest_tensor_parallel_size"] == 1
    )
    assert (
        found["ideal_speedup"] == {"1": None, "8": None, "64": None} and "sizes before pruning" in found["unknown"][0]
    )
    assert found["parameters"] == before["parameters"], "the number of parameters before is noted in config.json"
    assert found["widths"]["multiples"] == {"8": 3, "16": 3, "64": 0}


def test_layers_that_the_files_have_no_more(tmp_path, inspect):
    model = tiny_model("llama", 6, 6, 40)
    model.save_pretrained(tmp_path / "in")
    before = {name: tensor.clone() for name, tensor in stored(tmp_path / "in").items()}
    edit_weights(tmp_path / "in", {}, tuple(name for name in before if name.startswith("model.layers.2.")))
    found = inspect(tmp_path / "in", "--from", "shapes")
    assert found["parameters"]["dense"] == sum(tensor.numel() for tensor in before.values())
    assert found["bytes"]["dense"] == sum(tensor.nbytes for tensor in before.values())
    assert found["kv_cache_bytes_per_token"]["dense"] == 1.5 * found["kv_cache_bytes_per_token"]["pruned"]
    assert found["ideal_speedup"]["1"]["flops"] > 1.1


def test_a_stock_model(tmp_path, inspect, capsys):
    tiny_model("qwen3", 6, 3, 48).save_pretrained(tmp_path / "model")
    found = inspect(tmp_path / "model")
    assert (found["kind"], found["format"], found["method"]) == ("stock", "zeros", None)
    assert found["ideal_speedup"]["1"] is None and found["parameters"]["dense"] == found["parameters"]["pruned"]
    assert found["serving"]["even_tensor_parallel_sizes"] == [1, 3, 6]
    assert cli.main(["inspect", str(tmp_path / "model")]) == 0
    assert "whose layers have the sizes that its config.json says" in capsys.readouterr().out


@pytest.mark.parametrize("model_type", MOE_CONFIGS)
def test_experts(tmp_path, inspect, model_type):
    model = tiny_model(model_type, 4, 4, 24)
    with_experts = NUM_LAYERS - (model_type == "deepseek")
    widths = [[7, 24, 0, 12]] * with_experts
    write_masked(tmp_path / "ckpt", model, expert_masks(model, widths))
    found = inspect(tmp_path / "ckpt")
    assert [layer["expert_intermediate_sizes"] for layer in found["layers"][-with_experts:]] == widths
    notes = " ".join(found["serving"]["notes"])
    assert "is refused for them" in notes and "Expert and data parallelism are refused" in notes
    most = 2 if hasattr(model.config, "linear_num_key_heads") else 4  # key heads of linear attention are not padded
    assert found["serving"]["largest_tensor_parallel_size"] == most


LAYERS = {
    "multi-head": LayerGeometry((1,) * 6, 48),
    "grouped": LayerGeometry((2,) * 4, 64),
    "one KV head": LayerGeometry((6,), 60),
    "uneven": LayerGeometry((3, 1, 2), 48),
    "odd width": LayerGeometry((1,) * 4, 17),
    "no attention": LayerGeometry((), 12),
    "no MLP": LayerGeometry((1,) * 4, 0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_even_sizes_are_those_that_the_plugin_does_not_pad(name):
    layer = LAYERS[name]
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 8}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 64, "head_dim": 8}
    geometry = ModelGeometry.from_config(config).with_layers((layer,))
    needs = serving_needs(geometry, "PrunedLlamaForCausalLM")
    assert needs.largest_tensor_parallel_size == max(1, layer.num_attention_heads)
    for size in range(1, needs.largest_tensor_parallel_size + 1):
        layout = shard_layer(layer, size)
        padded = PAD in (*layout.query_index, *layout.kv_index, *layout.channel_index)
        if layer.has_even_groups:
            assert (size in needs.even_tensor_parallel_sizes) == (not padded), size
        elif size in needs.even_tensor_parallel_sizes:
            assert not padded, size


def test_no_weight_is_loaded(ckpt, tmp_path, inspect, monkeypatch):
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: pytest.fail(f"{name} was loaded"))
    assert inspect(ckpt)["kind"] == "pruned" and inspect(tmp_path / "out")["kind"] == "converted"


def test_a_model_of_140_gigabytes(tmp_path, inspect):
    """Only the headers are there; the rest of the files are holes."""
    config = {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "vocab_size": 32000}
    config |= {"num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shards: dict[str, dict] = {}
    for name, shape in ModelGeometry.from_config(config).tensor_shapes().items():
        header = shards.setdefault(f"model-{'.'.join(name.split('.')[:3])}.safetensors", {})
        start = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        end = start + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    for shard, header in shards.items():
        text = json.dumps(header).encode()
        with (tmp_path / shard).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
    weight_map = {name: shard for shard, header in shards.items() for name in header}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = inspect(tmp_path)
    assert found["parameters"]["pruned"] == 68_976_648_192 and found["bytes"]["pruned"] == 2 * 68_976_648_192
    assert found["kv_cache_bytes_per_token"]["pruned"] == 2 * 80 * 8 * 128 * 2
    assert found["serving"]["even_tensor_parallel_sizes"] == [1, 2, 4, 8, 16, 32, 64]


def test_for_people(ckpt, tmp_path, capsys):
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    for path in (ckpt, tmp_path / "out"):
        capsys.readouterr()
        assert cli.main(["inspect", str(path)]) == 0
        text = capsys.readouterr().out
        assert "KV cache: 2,816 bytes per token; 4,608 before pruning (61.1%)." in text
        assert "Ideal speedup of decoding" in text and "vLLM with the plugin pruned-vllm" in text


def test_a_directory_called_inspect(tmp_path, monkeypatch):
    ragged_checkpoint(tmp_path / "inspect")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["./inspect", "out"]) == 0 and (tmp_path / "out" / "config.json").is_file()
    assert cli.main(["inspect", "inspect"]) == 0


def test_what_cannot_be_inspected_ends_with_a_message(ckpt, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    edit_json(tmp_path / "out" / "config.json", hidden_size=64)
    shutil.copytree(ckpt, tmp_path / "bad")
    edit_json(tmp_path / "bad" / "pruning.json", channel_mask_site="nowhere")
    wrong = {
        "absent": "does not exist",
        "empty": "in none of the formats",
        "out": "do not fit its config.json",
        "bad": "channel_mask_site is 'nowhere'",
    }
    for name, message in wrong.items():
        assert cli.main(["inspect", str(tmp_path / name)]) == 2, name
        assert message in capsys.readouterr().err


def test_an_input_is_not_drawn_into(ckpt, capsys):
    assert cli.main(["inspect", str(ckpt), "--plot"]) == 2
    assert "add --plot when you convert it" in capsys.readouterr().err and not (ckpt / "report").exists()
