"""learn-masks --plan: its arithmetic against what PyTorch keeps, and its advice against itself."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.learning import geometry_of, run
from helpers.tiny import MOE_CONFIGS, tiny_model

from learner import cli, memory
from learner.job import METHODS, Job
from learner.model import loss
from learner.model.masking import apply_masks
from learner.model.units import Units
from learner.plan import Devices
from learner.settings import DDPSettings
from pruned_vllm.common.errors import InputError

SIZES = {"hidden_size": 256, "num_hidden_layers": 4}
GB = 10**9


def kept(model, tokens: torch.Tensor) -> int:
    """Bytes that autograd keeps of a forward pass with masks, beside the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    units = Units.from_geometry(geometry_of(model))
    values = {kind: torch.ones(units.shape(kind), requires_grad=True) for kind in units.layers}
    with apply_masks(model, units.to_masks(values)), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = loss.run_without_head(model, tokens)  # held: what goes may leave its place to others
    assert outputs.last_hidden_state.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen3_moe", "qwen2_moe"])
def test_activations_are_those_that_autograd_keeps(model_type, dtype):
    config = {"moe_intermediate_size": 96} if model_type in MOE_CONFIGS else {}
    model = tiny_model(model_type, 8, 4, 640, **SIZES, **config).to(dtype).requires_grad_(False)
    tokens = torch.randint(256, (4, 64))
    job = Job("model", data=["text"], weights="whole", settings=DDPSettings(kd_weight=0))
    found = memory.needs(geometry_of(model), job, dtype.itemsize, tokens.numel(), 1, on_gpu=True).device["activations"]
    assert found == pytest.approx(kept(model, tokens), rel=0.2)


def test_the_loss_is_the_one_that_is_computed():
    assert memory.LOGITS_AT_ONCE == loss.LOGITS_AT_ONCE


@pytest.fixture
def large(tmp_path):
    """A directory with nothing but the config.json of a model of 8 billion parameters."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 512,
        "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_plan(large, capsys, method):
    if method == "reap":
        assert run(large, "--method", method, "--plan", "1x80GB") == 0  # experts are looked for when it learns
        return
    assert run(large, "--method", method, "--plan", "1x4000GB") == 0
    shown = capsys.readouterr().out
    assert "8.03 billion parameters in bfloat16" in shown and "It fits: " in shown
    if METHODS[method].reads_text:
        assert re.search(r"\d+ x 512 tokens", shown), "no more than the model has positions"


@pytest.mark.parametrize("devices", ["80GB", "24GB", "4x24GiB"])
def test_what_it_advises_fits(large, capsys, devices):
    arguments = [large, "--plan", devices, "--dtype", "float32", "--batch-size", 256, "--micro-batch-size", 64]
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    assert "It does not fit: " in shown
    advice = re.findall(r"^  (--.*?)  \(", shown.partition("It would with")[2], re.MULTILINE)
    assert advice
    for options in advice:
        assert run(*arguments, *options.split()) == 0
        assert "It fits: " in capsys.readouterr().out, options


def test_no_weights_and_no_pytorch_are_needed(large):
    code = "import sys; from learner import cli; code = cli.main(sys.argv[1:]); assert 'torch' not in sys.modules; "
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(code)", str(large), "--plan"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "on each device" in done.stdout


@pytest.mark.parametrize("text", ["80", "0x80GB", "eight", "8x80TB"])
def test_devices_that_say_nothing_are_refused(text):
    with pytest.raises(InputError, match="say how many devices"):
        Devices.parse(text)


def test_devices():
    assert Devices.parse("8x80GB") == Devices(8, 80 * GB)
    assert Devices.parse("1.5GiB") == Devices(1, 1.5 * (1 << 30))


LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
QWEN3_32B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "head_dim": 128,
    "vocab_size": 151936,
}
RECIPES = {"8B": ({}, "1x80GB"), "32B": (QWEN3_32B, "2x80GB"), "70B": (LLAMA_70B, "8x80GB")}


@pytest.mark.parametrize("size", RECIPES)
def test_the_recipes_in_the_readme_fit(large, capsys, size):
    changes, devices = RECIPES[size]
    config = json.loads((large / "config.json").read_text()) | changes | {"max_position_embeddings": 8192}
    (large / "config.json").write_text(json.dumps(config))
    readme = (Path(cli.__file__).parent / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in readme.splitlines() if line.startswith(f"| {size} | {devices[0]} x ")]
    options = row.partition("--data ...")[2].partition("`")[0].split()
    assert run(large, *options, "--plan", devices) == 0
    total = float(re.search(r"It fits: ([\d.]+) GB", capsys.readouterr().out)[1])
    assert f"| {total:.0f} GB |" in row


def test_the_output_may_stand_anywhere_and_is_left_out_for_a_plan_alone(large, capsys):
    assert run(large, "--plan", "80GB", "--dtype", "float32", "ckpt") == 0
    assert run("--plan", "80GB", large) == 0
    with pytest.raises(SystemExit):
        run(large, "--data", "text")
    assert "the following arguments are required: CKPT" in capsys.readouterr().err
