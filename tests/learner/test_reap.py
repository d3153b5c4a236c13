"""REAP's scores against the sum written out in float64, which experts go, and the way to a served model."""

import json

import pytest
import torch
from helpers.dropped import restrict_to_experts_with_channels
from helpers.experts import output_of, product_of, router_of
from helpers.learning import run, task_of
from helpers.tiny import NUM_EXPERTS, SOFTMAX_MOE, byte_tokenizer, prompts, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from converter.convert import convert
from converter.plan import make_plan
from learner.methods import reap
from learner.model.masking import apply_masks
from learner.settings import ReapSettings
from pruned_vllm.common.errors import InputError
from pruned_vllm.hf import load_pruned

SEQUENCES = 6


def settings(**changes) -> ReapSettings:
    return ReapSettings(calibration_sequences=SEQUENCES, sequence_length=32, **changes)


@pytest.mark.parametrize("model_type", SOFTMAX_MOE)
def test_scores(model_type):
    """The mean over an expert's tokens of its weight times the norm of its output."""
    config = {"mlp_only_layers": [0]} if model_type == "qwen3_moe" else {}
    found = reap.scores(task_of(tiny_model(model_type, 6, 3, 24, **config), settings()))
    exact = tiny_model(model_type, 6, 3, 24, **config).double()
    exact.set_experts_implementation("eager")  # the default has no float64
    layers = [layer for layer in exact.model.layers if hasattr(layer.mlp, "experts")]
    seen = {}
    for index, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(
            lambda module, args, index=index: seen.update({index: args[0].flatten(0, -2)})
        )
    exact(task_of(exact).blocks.next_batch(SEQUENCES))
    assert found.shape == (len(layers), NUM_EXPERTS)
    for index, layer in enumerate(layers):
        router = router_of(layer.mlp)
        logits = torch.nn.functional.linear(seen[index], router.weight, getattr(router, "bias", None))
        weights, chosen = logits.softmax(-1).topk(2)
        if model_type in ("mixtral", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "gpt_oss"):
            weights = weights / weights.sum(-1, keepdim=True)
        for expert in range(NUM_EXPERTS):
            terms = []
            for token, experts, of_experts in zip(seen[index], chosen, weights, strict=True):
                for one, weight in zip(experts, of_experts, strict=True):
                    if one == expert:
                        product = product_of(layer.mlp.experts, expert, token[None])
                        terms.append(weight * output_of(layer.mlp.experts, expert, product).norm())
            assert 0 < len(terms) < len(seen[index])
            torch.testing.assert_close(found[index, expert].double(), sum(terms) / len(terms), rtol=1e-4, atol=0)


SCORES = torch.tensor([[5.0, 1, 4, 2, 3, 0], [50.0, 10, 40, 20, 30, 0], [0.5, 0.1, 0.4, 0.2, 0.3, 0]])


@pytest.mark.parametrize(
    ("sparsity", "budget", "least", "expected"),
    [
        (0.5, "layer", 2, [[0, 2, 4]] * 3),
        (0.5, "global", 2, [[0, 2], [0, 1, 2, 3, 4], [0, 2]]),  # the last layer keeps those that are protected
        (2 / 3, "layer", 2, [[0, 2]] * 3),
        (2 / 3, "global", 2, [[0, 2]] * 3),
        (2 / 3, "global", 1, [[0], [0, 2, 3, 4], [0]]),
        (0.0, "layer", 2, [list(range(6))] * 3),
    ],
)
def test_which_experts_stay(sparsity, budget, least, expected):
    kept = reap.kept_experts(SCORES, sparsity, budget, least)
    assert [row.nonzero().view(-1).tolist() for row in kept] == expected


@pytest.mark.parametrize(("budget", "numbers"), [("layer", "2 of 6 experts in each layer"), ("global", "6 of 18")])
def test_fewer_experts_than_a_token_is_sent_to_are_refused(budget, numbers):
    with pytest.raises(InputError, match=f"{numbers}.*choose 3"):
        reap.kept_experts(SCORES, 2 / 3, budget, 3)


def test_an_expert_that_no_token_is_sent_to_has_no_score():
    model = tiny_model("qwen3_moe", 6, 3, 24, num_experts=5)
    for layer in model.model.layers:
        weight = layer.mlp.gate.weight
        weight[2], weight[3], weight[4] = 0, -weight[0], -weight[1]  # of each pair, one is chosen
    found = reap.scores(task_of(model, settings()))
    assert (found[:, 2] == 0).all() and (found[:, [0, 1, 3, 4]] > 0).all()


@pytest.fixture
def dense(tmp_path):
    model = tiny_model("qwen3_moe", 6, 3, 40, num_experts=6)
    model.model.layers[1].mlp.experts.down_proj *= 100
    model.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(" ".join(str(i * i % 256) for i in range(3000)))
    return tmp_path / "dense"


@pytest.mark.parametrize(("budget", "counts"), [("layer", [3, 3, 3]), ("global", [2, 5, 2])])
def test_learned_masks_become_a_model_with_fewer_experts(dense, tmp_path, capsys, budget, counts):
    ckpt, out, text = (tmp_path / name for name in ("ckpt", "out", "text.txt"))
    options = ["--method", "reap", "--budget", budget, "--calibration-sequences", 8, "--sequence-length", 32]
    assert run(dense, ckpt, *options, "--data", text, "--eval-data", text) == 0
    printed = capsys.readouterr().out
    assert f"Next: convert-pruned {ckpt} OUT --drop-empty-experts" in printed
    masks = load_file(ckpt / "pruning_masks.safetensors")
    assert all(key.endswith("experts.channel_mask") for key in masks)
    kept = [mask.any(1).tolist() for mask in masks.values()]
    assert all(bool(row.all()) == bool(row.any()) for mask in masks.values() for row in mask), "part of an expert"
    assert list(map(sum, kept)) == counts, "those of the second layer are the largest of all"

    convert(make_plan(ckpt, drop_empty_experts=True), out)
    assert (json.loads((out / "config.json").read_text())["architectures"] == ["Qwen3MoeForCausalLM"]) == (
        budget == "layer"
    )
    model, tokens = AutoModelForCausalLM.from_pretrained(dense).eval(), torch.tensor(prompts()[-1:])
    with torch.no_grad(), apply_masks(model, masks):
        expected = restrict_to_experts_with_channels(model, masks)(tokens).logits
        torch.testing.assert_close(load_pruned(out)(tokens).logits, expected, rtol=1e-4, atol=1e-4)


REFUSED = {
    "no experts": ("llama", [], "reap removes whole experts, and"),
    "heads": ("qwen3_moe", ["--head-sparsity", 0.5], "reap removes no heads; leave out --head-sparsity"),
    "a budget of each expert": ("qwen3_moe", ["--budget", "expert"], "--budget must be global or layer"),
    "too few": ("qwen3_moe", ["--sparsity", 0.9], "leaves 0 of 4 experts in each layer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused(tmp_path, capsys, name):
    model_type, options, message = REFUSED[name]
    tiny_model(model_type, 6, 3, 24).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("one two three " * 200)
    short = ["--calibration-sequences", 2, "--sequence-length", 16]
    arguments = ["--method", "reap", "--data", tmp_path / "text.txt", *short, *options]
    assert run(tmp_path / "dense", tmp_path / "ckpt", *arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "ckpt").exists()
