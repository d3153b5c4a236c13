"""learn-masks on a model whose class comes with the checkpoint (tests/remote_code/), to convert-pruned and vLLM."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import deepseek
from helpers.losses import cross_entropy
from helpers.tiny import byte_tokenizer, expert_masks, masks_for, oracle, prompts, tiny_model
from peft import PeftModel
from safetensors.torch import load_file

from converter.convert import convert
from converter.plan import make_plan
from learner import cli
from learner.job import Job
from learner.model.dense import load_dense
from learner.model.masking import apply_masks

TOKENS = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(3))
TRAINING = ["--steps", 20, "--batch-size", 2, "--sequence-length", 32]
CALIBRATION = ["--calibration-sequences", 8, "--sequence-length", 32]
RUNS = {
    "ddp": ["--method", "ddp", *TRAINING],
    "ddp, recomputed activations": ["--method", "ddp", *TRAINING, "--gradient-checkpointing"],
    "maskprune": ["--method", "maskprune", *TRAINING],
    "wanda": ["--method", "wanda", *CALIBRATION],
    "magnitude": ["--method", "magnitude"],
}


def write_code(directory: Path) -> None:
    """Lays code beside the config.json of a model of helpers/deepseek.py, and makes that one of Transformers 4."""
    code = Path(deepseek.__file__).parent / "remote_code"
    for path in (Path(deepseek.__file__), *code.glob("*.py")):
        shutil.copy(path, directory)
    config = json.loads((directory / "config.json").read_text())
    del config["rope_parameters"], config["transformers_version"]
    config["auto_map"] = {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    }
    config |= {"rope_theta": 10000, "rope_scaling": None, "use_cache": True}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture
def dense(tmp_path) -> Path:
    """A balancing loss as large as the others, so that its gradients would show."""
    tiny_model("deepseek", 6, 6, 40, aux_loss_alpha=10.0).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    write_code(tmp_path / "dense")
    return tmp_path / "dense"


def learn_masks(dense: Path, *arguments) -> int:
    text = dense.parent / "text.txt"
    text.write_text(" ".join(str(i * i % 256) for i in range(3000)))
    return cli.main([str(argument) for argument in (dense, dense.parent / "ckpt", "--data", text, *arguments)])


def masked_model(ckpt: Path):
    """The dense model and the masks that a learned checkpoint speaks of."""
    pruning = json.loads((ckpt / "pruning.json").read_text())
    model, masks = deepseek.load(Path(pruning["base_model"])), load_file(ckpt / "pruning_masks.safetensors")
    if pruning["lora_adapter"]:
        model = PeftModel.from_pretrained(model, ckpt / pruning["lora_adapter"]).merge_and_unload()
    return model, masks


@torch.no_grad()
def greedy(model, prompt: list[int], count: int = 6) -> tuple[list[int], torch.Tensor]:
    """The continuation, and the log-probabilities of all positions that it was chosen at or before."""
    tokens = list(prompt)
    for _ in range(count):
        log_probabilities = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        tokens.append(log_probabilities[-1].argmax().item())
    return tokens[len(prompt) :], log_probabilities


@pytest.mark.parametrize("run", RUNS)
def test_converted_model_is_the_learned_model(dense, tmp_path, run):
    assert learn_masks(dense, "--trust-remote-code", *RUNS[run]) == 0
    convert(make_plan(tmp_path / "ckpt"), tmp_path / "out")
    model, masks = masked_model(tmp_path / "ckpt")
    experts = torch.stack([mask for name, mask in masks.items() if "experts" in name])
    assert 0.4 < (experts == 0).float().mean() < 0.6
    if "ddp" in run:
        assert experts.unique().numel() > 60, "masks of experts were learned"
    pruned = deepseek.load(tmp_path / "out")
    for prompt in prompts():
        continuation, log_probabilities = greedy(pruned, prompt)
        tokens, expected = oracle(model, masks, "product", prompt, continuation)
        assert continuation == tokens
        torch.testing.assert_close(log_probabilities, expected, rtol=0, atol=1e-4)


@pytest.mark.slow  # test_moe_serving.py serves what the same masks leave of the same model
def test_served_model_is_the_learned_model(dense, tmp_path):
    from helpers.serving import assert_serves_the_masked_model

    assert learn_masks(dense, "--trust-remote-code", *RUNS["ddp"]) == 0
    convert(make_plan(tmp_path / "ckpt"), tmp_path / "out")
    assert_serves_the_masked_model(tmp_path / "out", *masked_model(tmp_path / "ckpt"))


def test_code_of_the_checkpoint_computes_what_it_should(dense):
    """Rotary frequencies, which are in no file, and masks' gradients, without those of the balancing loss."""
    model = load_dense(Job(str(dense), "magnitude", trust_remote_code=True), "cpu").model
    assert all(type(part).__module__.startswith("transformers_modules.") for part in (model, model.config))
    reference = deepseek.load(dense)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=TOKENS).logits, reference(TOKENS).logits)
    for layer in reference.model.layers[1:]:
        layer.mlp.gate.alpha = 0.0
    masks = masks_for([[1.0] * 6] * 3, [torch.ones(40)]) | expert_masks(reference, [[24] * 4] * 2)

    def gradients(model) -> tuple[torch.Tensor, ...]:
        learned = {name: mask.clone().requires_grad_() for name, mask in masks.items()}
        with apply_masks(model.train(), learned):
            return torch.autograd.grad(cross_entropy(model(input_ids=TOKENS).logits, TOKENS), learned.values())

    for name, found, expected in zip(masks, gradients(model), gradients(reference), strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=name)


REFUSED = {
    "code is not allowed": (["--method", "ddp"], "Transformers has no DeepseekForCausalLM; if the checkpoint brings"),
    "tyr": (["--method", "tyr", "--trust-remote-code"], "tyr prunes layers as Transformers computes them"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_weights_are_read(dense, tmp_path, capsys, name):
    arguments, message = REFUSED[name]
    (dense / "model.safetensors").unlink()
    (dense / "modeling_deepseek.py").write_text("raise RuntimeError('this ran')")
    assert learn_masks(dense, *arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "ckpt").exists()
