"""Masks of hidden dimensions: the smaller model computes what the masked one computes."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from helpers.hidden import hidden_masks, hidden_z
from helpers.masked import RAGGED, convert_pruned, keep
from helpers.quantized import nearest, padded, widened
from helpers.tiny import MOE_CONFIGS, expert_masks, masks_for, prompts, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from converter import plan
from converter.checkpoint import Checkpoint
from converter.source import HiddenMask, Source
from learner.model.masking import apply_masks
from pruned_vllm.formats.config import dense_geometry
from pruned_vllm.formats.masked import layer_masks
from pruned_vllm.hf import load_pruned


def embedding_and_outputs(z: torch.Tensor) -> HiddenMask:
    return HiddenMask(embedding=z, outputs=z)


def divided_by_150(z: torch.Tensor) -> HiddenMask:
    return HiddenMask(embedding=z, outputs=z, norm_divisor=150)


def seen_by_norms(z: torch.Tensor) -> HiddenMask:
    return HiddenMask(outputs=z, norms=z, norm_sees_kept=True)


@dataclass(frozen=True)
class Case:
    """A model of hidden size 96, unless `config` says another, the mask of its dimensions, and the size that is left.

    Attributes:
        kept: values of the mask that are not 0; None for ones.
        masks: of heads, channels and experts.
    """

    mask: Callable[[torch.Tensor], HiddenMask]
    hidden_size: int
    kept: int | None
    model_type: str = "llama"
    heads: tuple[int, int] = (6, 6)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    tied: bool = False  # what is written

    def make(self) -> tuple:
        """The model, and the mask of its hidden dimensions."""
        model = tiny_model(self.model_type, *self.heads, 40, **{"rms_norm_eps": 0.05} | self.config)
        size = model.config.hidden_size
        return model, self.mask(torch.ones(size) if self.kept is None else hidden_z(size, self.kept))


BIASES = {"attention_bias": True, "mlp_bias": True}
NO_HEADS = masks_for([[0] * 6, [1, 0, 2.5, 0, 1, 1], [1] * 6], [keep(40, 7), torch.zeros(40), keep(40, *range(9))])
HALF = masks_for([[1, 0, 0, 1, 0, 1]] * 3, [torch.cat((torch.linspace(0.1, 1, 8), torch.zeros(32)))] * 3)
MIXTRAL = expert_masks(tiny_model("mixtral", 6, 3, 40), [[17, 0, 40, 5], [0, 0, 0, 0], [1, 2, 3, 4]])
TIED = {"tie_word_embeddings": True}

CASES = {
    "odd, padded to what Llama takes": Case(embedding_and_outputs, 72, 71),
    "heads that do not divide": Case(embedding_and_outputs, 55, 52, heads=(5, 5), config={"hidden_size": 95}),
    "even, nothing padded": Case(embedding_and_outputs, 60, 60),
    "odd, nothing padded": Case(embedding_and_outputs, 71, 71, "mistral"),
    "one dimension": Case(embedding_and_outputs, 1, 1, "mistral"),
    "padded to the size before": Case(embedding_and_outputs, 96, 95),
    "soft, nothing cut": Case(embedding_and_outputs, 96, 96),
    "norms divide by a constant": Case(divided_by_150, 72, 71),
    "norms divide by a constant, no mask": Case(lambda _: HiddenMask(norm_divisor=150), 96, None),
    "outputs alone": Case(lambda z: HiddenMask(outputs=z), 96, 71),
    "embedding alone": Case(lambda z: HiddenMask(embedding=z), 96, 71),
    "norms see what they keep": Case(seen_by_norms, 72, 71),
    "norms see what they keep, size before": Case(seen_by_norms, 96, 95),
    "norms see what they keep, tied": Case(seen_by_norms, 72, 71, config=TIED, tied=True),
    "tied, soft": Case(embedding_and_outputs, 72, 71, config=TIED),
    "tied, zeros and ones": Case(lambda z: embedding_and_outputs((z != 0).float()), 72, 71, config=TIED, tied=True),
    "ragged layers": Case(divided_by_150, 72, 71, masks=RAGGED),
    "biases": Case(divided_by_150, 72, 71, masks=RAGGED, config=BIASES),
    "biases that survive": Case(embedding_and_outputs, 72, 71, masks=NO_HEADS, config=BIASES),
    "grouped queries": Case(
        divided_by_150, 72, 67, heads=(6, 2), masks=masks_for([[1, 0, 2, 0, 0, 3], [0, 0, 0, 1, 1, 0]], [])
    ),
    "biases of q, k and v": Case(divided_by_150, 71, 71, "qwen2", masks=RAGGED),
    "norms of q and k": Case(divided_by_150, 71, 71, "qwen3", masks=RAGGED),
    "norms of q and k, biases": Case(divided_by_150, 71, 71, "qwen3", masks=RAGGED, config={"attention_bias": True}),
    "experts": Case(divided_by_150, 71, 71, "mixtral", (6, 3), MIXTRAL),
    "shared experts": Case(divided_by_150, 71, 71, "qwen2_moe", (6, 3)),
    "norm of all heads together": Case(lambda _: HiddenMask(norm_divisor=150), 192, None, "olmoe"),
}


def convert(tmp_path: Path, monkeypatch, case: Case, *args) -> tuple:
    """Runs the command on a source with the masks of a case; returns the exit code, the model and its hidden mask."""
    model, mask = case.make()
    model.save_pretrained(tmp_path / "dense")
    weights = Checkpoint.from_directory(tmp_path / "dense")
    dense = dense_geometry(tmp_path / "dense", weights.config)
    masks = layer_masks(case.masks, len(dense.layers))
    source = Source(weights, "test", dense, dense.layers, masks, hidden=mask)
    monkeypatch.setattr(plan, "read_source", lambda request, name: source)
    return convert_pruned(tmp_path / "dense", tmp_path / "out", *args), model, mask


@pytest.mark.parametrize("name", CASES)
def test_smaller_model_is_the_masked_model(tmp_path, monkeypatch, name):
    case = CASES[name]
    code, model, mask = convert(tmp_path, monkeypatch, case)
    assert code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == case.hidden_size and config["head_dim"] == 32
    assert bool(config.get("tie_word_embeddings")) == case.tied
    assert_is_the_masked_model(load_pruned(tmp_path / "out", dtype=torch.float32), model, mask, case.masks)


def assert_is_the_masked_model(pruned, model, mask: HiddenMask, masks: dict[str, torch.Tensor]) -> None:
    """Equal up to the rounding of float32; the masked model is computed in float64, where PyTorch can (not experts)."""
    tokens = torch.tensor(prompts()[-1:])
    with torch.no_grad():
        found = pruned(tokens).logits.double().log_softmax(-1)
        model.double() if model.config.model_type not in MOE_CONFIGS else None
        with apply_masks(model, masks), hidden_masks(model, mask):
            expected = model(tokens).logits.log_softmax(-1)
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_uniform_results_are_stock_models(tmp_path, monkeypatch, model_type):
    """The stock classes take another hidden size where nothing else differs from layer to layer."""
    case = Case(divided_by_150, 72 if model_type == "llama" else 71, 71, model_type, masks=HALF)
    code, model, mask = convert(tmp_path, monkeypatch, case)
    assert code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__] and config["num_attention_heads"] == 3
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_is_the_masked_model(stock, model, mask, HALF)


def test_qwen2_with_another_hidden_size_is_no_stock_model(tmp_path, monkeypatch):
    """vLLM's Qwen2 takes hidden_size / num_attention_heads for head_dim."""
    case = Case(embedding_and_outputs, 100, 100, "qwen2", config={"hidden_size": 192})
    assert convert(tmp_path, monkeypatch, case)[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["PrunedQwen2ForCausalLM"]


@pytest.mark.parametrize(("alignment", "size"), [(1, 66), (8, 72), (16, 96), (64, 192)])
def test_hidden_size_is_padded_to_the_alignment(tmp_path, monkeypatch, alignment, size):
    """And to a multiple of the six heads, but never beyond the size before."""
    case = Case(divided_by_150, size, 65, config={"hidden_size": 192})
    code, model, mask = convert(tmp_path, monkeypatch, case, "--align", alignment)
    assert code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == size
    if alignment == 8:
        assert_is_the_masked_model(load_pruned(tmp_path / "out", dtype=torch.float32), model, mask, {})


@pytest.mark.parametrize("name", ["norms of q and k, biases", "shared experts"])
def test_what_is_left_can_be_quantized_in_one_go(tmp_path, monkeypatch, name):
    case = CASES[name]
    assert convert(tmp_path, monkeypatch, case)[0] == 0
    floats = load_file(tmp_path / "out" / "model.safetensors")
    assert convert(tmp_path, monkeypatch, case, "--quantize", "w8a8-int8", "--overwrite")[0] == 0
    values, quantized = widened(tmp_path / "out")
    assert floats.keys() == values.keys() and len(quantized) > 10
    for tensor, before in floats.items():
        before = padded(before, values[tensor].shape)
        expected = nearest(before, "w8a8-int8", None) if tensor in quantized else before
        torch.testing.assert_close(values[tensor], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_factors_of_a_tensor_are_multiplied_in_float32(tmp_path, monkeypatch, dtype):
    """o_proj has factors for its rows, and with grouped queries for its columns."""
    heads = [0.7, 0, 0.9, 1.3, 1, 1]
    case = Case(embedding_and_outputs, 71, 71, "mistral", (6, 3), masks_for([heads] * 3, []))
    model, mask = case.make()
    monkeypatch.setattr(Case, "make", lambda self: (model.to(dtype), mask))
    assert convert(tmp_path, monkeypatch, case)[0] == 0
    rows, columns = mask.outputs.nonzero().view(-1), torch.tensor(heads).repeat_interleave(32)
    expected = model.model.layers[1].self_attn.o_proj.weight.float() * mask.outputs[:, None] * columns
    (file,) = (tmp_path / "out").glob("*.safetensors")
    found = load_file(file)["model.layers.1.self_attn.o_proj.weight"]
    torch.testing.assert_close(found, expected[rows][:, columns != 0].to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("case", "message"),
    {
        "nothing left": (Case(embedding_and_outputs, 0, 0), "removes every dimension"),
        "olmoe": (Case(embedding_and_outputs, 0, 71, "olmoe"), "one norm for all heads"),
        "gemma3": (Case(embedding_and_outputs, 0, 71, "gemma3_text"), "normalises what sublayers add"),
        "eps": (Case(divided_by_150, 0, 71, config={"rms_norm_eps": -1.0}), "rms_norm_eps is -1.0"),
    }.values(),
    ids=["nothing left", "olmoe", "gemma3", "eps"],
)
def test_masks_that_cannot_be_applied_are_refused(tmp_path, monkeypatch, capsys, case, message):
    assert convert(tmp_path, monkeypatch, case)[0] == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
