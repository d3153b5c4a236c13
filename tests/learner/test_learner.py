"""DDP's equations, what magnitudes choose, and learn-masks as a command."""

import json
import math
import subprocess
import sys

import pytest
import torch
from helpers.learning import run, task_of
from helpers.tiny import tiny_model
from safetensors.torch import load_file, save_file

from learner.methods import baselines
from learner.methods.ddp import annealed_mu, penalty
from learner.methods.ddp import learn as learn_ddp
from learner.methods.gates import relu, retention
from learner.model.units import Units
from learner.settings import DDPSettings
from pruned_vllm.formats.fingerprint import Fingerprint


def test_mask_is_relu_forward_and_identity_backward():
    z = torch.tensor([-0.1, 0.0, 0.3, 5.0], requires_grad=True)
    m = relu(z)
    m.backward(torch.arange(4.0))
    assert m.tolist() == torch.tensor([0.0, 0.0, 0.3, 5.0]).tolist()
    assert z.grad.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("mu", [0.5, 0.05])
def test_retention_has_the_values_of_equation_12(mu):
    z = torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.5, 2.0, 40.0], dtype=torch.float64) * mu
    expected = torch.tensor([0, 0, 0.178, 0.5, 0.822, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(retention(z, mu), expected, atol=5e-4, rtol=0)


def test_retention_moves_where_it_is_saturated():
    z = torch.tensor([1.0, -0.1], dtype=torch.float64, requires_grad=True)
    retention(z, 0.5).sum().backward()

    def unclamped(
        z, mu=0.5
    ):  # 1.2 sigmoid(ln(11) (max(z, 0) - mu) / mu) - 0.1, differentiated as if z were not clamped
        v = 1 / (1 + math.exp(-math.log(11) * (max(z, 0) - mu) / mu))
        return 1.2 * math.log(11) / mu * v * (1 - v)

    torch.testing.assert_close(z.grad, torch.tensor([unclamped(1.0), unclamped(-0.1)], dtype=torch.float64))
    assert z.grad[0] == pytest.approx(0.44, abs=0.01)


def test_mu_falls_with_the_square_root():
    settings = DDPSettings()
    assert annealed_mu(0, settings) == 0.5 and annealed_mu(1, settings) == pytest.approx(0.05)
    assert annealed_mu(0.25, settings) == pytest.approx(0.5 - 0.45 * 0.5)


def test_penalty_and_its_multipliers_ascend_by_the_violation():
    s = torch.tensor([[1.0, 0.5, 0.0, 0.9]])
    multipliers = torch.tensor([[-2.0], [3.0], [0.5]], requires_grad=True)
    loss = penalty(s.mean(1), (s * (1 - s)).mean(1), 0.5, multipliers)
    loss.backward()
    violation, uncertainty = 0.6 - 0.5, (0 + 0.25 + 0 + 0.09) / 4
    assert loss.item() == pytest.approx(-2 * violation + 3 * violation**2 + 0.5 * uncertainty)
    torch.testing.assert_close(multipliers.grad[:, 0], torch.tensor([violation, violation**2, uncertainty]))


def test_ddp_prunes_experts_and_freezes_the_rest():
    model = tiny_model("qwen2_moe", 6, 6, 40, mlp_only_layers=[0])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    task = task_of(model, DDPSettings(steps=150, batch_size=4))
    values, units = learn_ddp(task).values, task.units
    assert set(values) == {"head", "channel", "expert"}
    kept, wanted = int((values["expert"] > 0).sum()), units.kept("expert", 0.5)
    assert abs(kept - wanted) <= 0.01 * units.count("expert") + 1
    assert values["expert"].shape == (2, 96) and values["expert"].unique().numel() > 30
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_magnitude_keeps_the_heaviest_units():
    model = tiny_model("llama", 12, 6, 40)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 64:96] *= 30
        model.model.layers[0].self_attn.k_proj.weight[32:64] *= 30
        model.model.layers[2].mlp.down_proj.weight[:, 7] *= 30
    values = baselines.magnitude(task_of(model, sparsity=0.8, tied=True)).values
    assert values["head"][0].tolist() == values["head"][1].tolist() == [0, 1, 0, 0, 0, 0]
    assert values["channel"][2, 7] == 1 and values["channel"].sum(1).tolist() == [8, 8, 8]


def test_magnitude_keeps_the_heaviest_channels_of_experts():
    model = tiny_model("mixtral", 12, 6, 10)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, :, 7] *= 30
        model.model.layers[1].mlp.experts.gate_up_proj[3, 10 + 4] *= 30  # up
        model.model.layers[1].mlp.experts.gate_up_proj[0, 5] *= 30  # gate
    values = baselines.magnitude(task_of(model, sparsity={"head": 0.5, "expert": 0.9}, tied=True)).values
    assert values["expert"].sum(1).tolist() == [4, 4, 4] and values["head"].sum(1).tolist() == [3, 3, 3]
    assert values["expert"][1].view(4, 10)[[2, 3, 0], [7, 4, 5]].tolist() == [1, 1, 1]


def learned(sparsity: float = 0.5, **settings) -> tuple[dict, Units]:
    task = task_of(
        tiny_model("llama", 6, 6, 40), DDPSettings(**{"steps": 150, "batch_size": 4} | settings), sparsity, tied=True
    )
    return learn_ddp(task).values, task.units


@pytest.mark.parametrize("target", [0.25, 0.5])
def test_ddp_meets_its_budget_with_soft_masks(target):
    values, units = learned(target)
    for kind, m in values.items():
        kept, wanted = int((m > 0).sum()), units.kept(kind, target)
        assert abs(kept - wanted) <= 0.01 * units.count(kind), f"{kind}: {kept} kept, {wanted} wanted"
        assert m.min() == 0 and m.shape == (3, units.widths[kind])
    assert values["channel"].unique().numel() > 30, "masks are values, not zeros and ones"


def test_ddp_is_deterministic_and_micro_batches_do_not_change_it():
    first, second, split = learned(steps=20), learned(steps=20), learned(steps=20, micro_batch_size=1)
    for kind in ("head", "channel"):
        assert torch.equal(first[0][kind], second[0][kind])
        torch.testing.assert_close(first[0][kind], split[0][kind], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", ["ddp", "magnitude", "random"])
def test_learn_masks_writes_a_masked_checkpoint(word_model, capsys, method):
    text, model, ckpt = word_model / "text.txt", word_model / "model", word_model / "ckpt"
    small = ["--steps", 60, "--batch-size", 2, "--sequence-length", 32] if method == "ddp" else []
    arguments = [model, ckpt, "--method", method, "--data", text, "--eval-data", text, *small]
    assert run(*arguments) == 0
    assert "masked perplexity" in capsys.readouterr().out
    told = json.loads((ckpt / "pruning.json").read_text())
    budget = told.pop("budget")
    assert told == {
        "format_version": 1,
        "method": method,
        "channel_mask_site": "product",
        "base_model": str(model),
        "lora_adapter": None,
        "base_fingerprint": str(Fingerprint.from_directory(model)),
    }
    masks = load_file(ckpt / "pruning_masks.safetensors")
    assert len(masks) == 6 and all(mask.dtype == torch.float32 for mask in masks.values())
    results = json.loads((ckpt / "learning.json").read_text())["results"]
    assert results["channel_sparsity"] == pytest.approx(0.5, abs=0.011)
    sizes = {name: results[name] for name in ("parameters", "bytes", "ideal_speedup", "padded_ideal_speedup")}
    achieved = {name: results[name] for name in ("head_sparsity", "channel_sparsity")}
    assert budget == {"target": {"sparsity": 0.5}, "achieved": achieved, "at": "decode:8:1024:256", **sizes}
    assert results["masked_perplexity"] != results["dense_perplexity"]
    assert run(*arguments) == 2
    assert "exists" in capsys.readouterr().err
    (ckpt / "notes.txt").write_text("mine")
    assert run(*arguments, "--overwrite") == 0 and (ckpt / "notes.txt").read_text() == "mine"
    (ckpt / "pruning.json").write_text("{}")
    assert run(*arguments, "--overwrite") == 2 and "  - pruning.json" in capsys.readouterr().err
    assert (ckpt / "pruning.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--mu-start", "0"], None),
        (["--learning-rate", "nan"], None),
        (["--sequence-length", "1"], "the loss is nan at step 1"),
        (["--device", "abacus"], "device abacus cannot be used"),
        (["--method", "random", "--mu-start", "0.5"], "random has no --mu-start"),
        (["--gate", "sigmoid"], None),
        (["--eval-data", "{text}"], "--eval-data has 2 tokens; at least 128"),
        (["--data"], None),
        (["--sparsity", "1"], None),
        (["--sequence-length", "100000"], "more than the 256 positions"),
        (["--data", "{text}"], "fewer than one block"),
        (["--dtype", "int3"], "cannot be loaded"),
    ],
)
def test_learn_masks_refuses_bad_input(word_model, capsys, change, message):
    (word_model / "short.txt").write_text("1 2")
    change = [argument.format(text=word_model / "short.txt") for argument in change]
    arguments = [word_model / "model", word_model / "ckpt", "--data", word_model / "text.txt", *change]
    try:
        assert run(*arguments) == 2
    except SystemExit as usage_error:
        assert usage_error.code == 2 and message is None
    else:
        assert message in capsys.readouterr().err
    assert not (word_model / "ckpt").exists()


def test_learn_masks_refuses_what_is_no_model(word_model, capsys):
    assert run(word_model / "nothing", word_model / "ckpt", "--data", word_model / "text.txt") == 2
    assert "is neither a directory nor a model that can be downloaded" in capsys.readouterr().err


def test_learn_masks_refuses_what_transformers_lacks(tmp_path, capsys):
    tiny_model("deepseek", 6, 3, 40).save_pretrained(tmp_path / "model")
    assert run(tmp_path / "model", tmp_path / "ckpt", "--method", "random") == 2
    assert "Transformers has no DeepseekForCausalLM" in capsys.readouterr().err


def test_learn_masks_refuses_a_model_that_lacks_weights(word_model, capsys):
    path = word_model / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert run(word_model / "model", word_model / "ckpt", "--method", "random") == 2
    assert "model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err


def test_learn_masks_never_replaces_a_model(word_model, capsys):
    model = word_model / "model"
    assert run(model, model, "--method", "random", "--overwrite") == 2
    assert "was not written by this command" in capsys.readouterr().err and (model / "model.safetensors").exists()


def test_learner_and_converter_work_without_vllm():
    code = "import sys, learner.learn, converter.convert, converter.table; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, pruned_vllm; assert not {'torch', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
