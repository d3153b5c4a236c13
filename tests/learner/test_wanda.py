"""Wanda's scores of heads, channels and experts' channels, against sums written out in float64."""

import pytest
import torch
from helpers.experts import down_of, product_of, router_of
from helpers.learning import task_of
from helpers.tiny import HEAD_DIM, NUM_EXPERTS, SOFTMAX_MOE, tiny_model

from learner.methods import baselines, reap, wanda
from learner.methods.method import Task
from learner.settings import WandaSettings
from pruned_vllm.common.errors import InputError


def task_on(model, tied: bool = False, sequences: int = 6, **target) -> Task:
    tokens = torch.randint(256, (10 * 32,), generator=torch.Generator().manual_seed(5))
    settings = WandaSettings(calibration_sequences=sequences, sequence_length=32)
    return task_of(model, settings, target or 0.5, tied=tied, tokens=tokens)


def inputs_of(model, modules: dict) -> dict[str, torch.Tensor]:
    """What modules read in a float64 pass over the sequences that `task_on` deals: [tokens, features] by name."""
    seen = {}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0].flatten(0, -2)}))
    model(task_on(model).blocks.next_batch(6))
    return seen


def scores_of_columns(weight: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """sum_i |W_ij| ||X_j||, with one product for each weight."""
    return (weight.abs() * features.norm(dim=0)).sum(0)


@pytest.mark.parametrize("tied", [False, True])
def test_heads_and_channels(tied):
    model = tiny_model("qwen3", 6, 3, 40)
    found = wanda.scores(task_on(model, tied))
    exact = tiny_model("qwen3", 6, 3, 40).double()
    for index, layer in enumerate(exact.model.layers):
        seen = inputs_of(exact, {"o": layer.self_attn.o_proj, "down": layer.mlp.down_proj})
        heads = scores_of_columns(layer.self_attn.o_proj.weight, seen["o"])
        heads = heads.view(-1, HEAD_DIM * (2 if tied else 1)).sum(1)
        channels = scores_of_columns(layer.mlp.down_proj.weight, seen["down"])
        torch.testing.assert_close(found["head"][index].double(), heads, rtol=1e-4, atol=0)
        torch.testing.assert_close(found["channel"][index].double(), channels, rtol=1e-4, atol=0)


@pytest.mark.parametrize("model_type", SOFTMAX_MOE)
def test_channels_of_experts_over_the_tokens_they_get(model_type):
    model = tiny_model(model_type, 6, 6, 24)
    found = wanda.scores(task_on(model))["expert"]
    exact = tiny_model(model_type, 6, 6, 24).double()
    exact.set_experts_implementation("eager")  # the default has no float64
    for index, layer in enumerate(exact.model.layers):
        tokens = inputs_of(exact, {"mlp": layer.mlp})["mlp"]
        router = router_of(layer.mlp)
        chosen = torch.nn.functional.linear(tokens, router.weight, getattr(router, "bias", None)).topk(2).indices
        for expert in range(NUM_EXPERTS):
            routed = torch.stack([token for token, experts in zip(tokens, chosen, strict=True) if expert in experts])
            features = product_of(layer.mlp.experts, expert, routed)
            assert 0 < len(routed) < len(tokens)
            expected = scores_of_columns(down_of(layer.mlp.experts, expert), features)
            torch.testing.assert_close(found[index].view(NUM_EXPERTS, -1)[expert].double(), expected, rtol=1e-4, atol=0)


def test_a_channel_of_small_weights_that_is_much_used_survives():
    """It reads a feature that is always large; its weights alone, which magnitude sees, are the smallest."""
    model = tiny_model("llama", 6, 6, 40)
    layer = model.model.layers[1]
    layer.post_attention_layernorm.weight[0] = 1000
    model.model.embed_tokens.weight[:, 0] = 1
    for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
        projection.weight[:, 0] = 0
        projection.weight[7] = torch.eye(96)[0] * 0.1
    layer.mlp.down_proj.weight[:, 7] *= 0.5
    task = task_on(model, head=0.5, channel=0.8)
    kept, by_magnitude = wanda.learn(task).values, baselines.magnitude(task).values
    assert kept["channel"][1, 7] == 1 and by_magnitude["channel"][1, 7] == 0
    assert kept["head"].sum(1).tolist() == [3, 3, 3] and kept["channel"].sum(1).tolist() == [8, 8, 8]
    assert not torch.equal(kept["channel"][0], by_magnitude["channel"][0])


def test_short_texts_are_seen_once():
    model = tiny_model("llama", 6, 6, 40, num_hidden_layers=1)
    all_blocks, more = wanda.scores(task_on(model, sequences=10)), wanda.scores(task_on(model, sequences=128))
    for kind, expected in all_blocks.items():
        assert torch.equal(more[kind], expected)


@pytest.mark.parametrize("method", [wanda.learn, reap.learn, baselines.magnitude])
def test_scores_that_are_no_numbers_are_refused(method):
    model = tiny_model("qwen3_moe", 6, 3, 24)
    model.model.layers[1].mlp.experts.down_proj.fill_(torch.nan)
    with pytest.raises(InputError, match="Units cannot be told apart") as error:
        method(task_on(model, head=0, expert=0.5))
    assert error.value.problems[0].startswith("layer 1: ") and "of the kind expert are NaN" in str(error.value)
