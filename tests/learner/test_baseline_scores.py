"""Scores of FLAP, LLM-Pruner (Taylor) and ShortGPT (depth), against their formulas written out in float64."""

from dataclasses import replace

import pytest
import torch
from helpers.experts import down_of, product_of, router_of
from helpers.learning import task_of
from helpers.tiny import HEAD_DIM, NUM_EXPERTS, converted, prompts, tiny_model
from torch.func import functional_call

from learner.data.reading import BlockSampler
from learner.methods import depth, flap, taylor
from learner.model.masking import apply_masks
from learner.settings import CalibrationSettings
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import read_config
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.hf import load_pruned

SEQUENCES = 6
SETTINGS = CalibrationSettings(calibration_sequences=SEQUENCES, sequence_length=32)
KINDS = {"llama": (6, 3, 40), "phi3": (6, 3, 40), "qwen3_moe": (6, 3, 24)}


def exact_model(name: str):
    model = tiny_model(name, *KINDS[name]).double()
    if name == "qwen3_moe":
        model.set_experts_implementation("eager")  # the default has no float64
    return model


def sequences_of(model) -> torch.Tensor:
    return task_of(model).blocks.next_batch(SEQUENCES)


def standardized(features: torch.Tensor, size: int) -> torch.Tensor:
    return ((features - features.mean()) / features.std()).view(-1, size).mean(1)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_flap_is_the_variance_times_the_squared_norm(name):
    found, exact, seen = flap.scores(task_of(tiny_model(name, *KINDS[name]), SETTINGS)), exact_model(name), {}
    for index, layer in enumerate(exact.model.layers):
        modules = {"head": layer.self_attn.o_proj, "mlp": layer.mlp}
        if name == "llama":
            modules["channel"] = layer.mlp.down_proj
        for kind, module in modules.items():
            module.register_forward_pre_hook(
                lambda _, args, key=(kind, index): seen.update({key: args[0].flatten(0, -2)})
            )
    exact(sequences_of(exact))
    for index, layer in enumerate(exact.model.layers):
        weight = layer.self_attn.o_proj.weight
        heads = seen["head", index].var(dim=0) * torch.stack([column.norm() ** 2 for column in weight.T])
        torch.testing.assert_close(found["head"][index].double(), standardized(heads, HEAD_DIM), rtol=1e-4, atol=1e-5)
        if name == "llama":
            weight = layer.mlp.down_proj.weight
            channels = seen["channel", index].var(dim=0) * torch.stack([column.norm() ** 2 for column in weight.T])
            torch.testing.assert_close(
                found["channel"][index].double(), standardized(channels, 1), rtol=1e-4, atol=1e-5
            )
            continue
        tokens = seen["mlp", index]
        chosen, scores = torch.nn.functional.linear(tokens, router_of(layer.mlp).weight).topk(2).indices, []
        for expert in range(NUM_EXPERTS):
            products = product_of(layer.mlp.experts, expert, tokens[(chosen == expert).any(1)])
            scores.append(products.var(dim=0) * down_of(layer.mlp.experts, expert).norm(dim=0) ** 2)
        expected = standardized(torch.cat(scores), 1)
        torch.testing.assert_close(found["expert"][index].double(), expected, rtol=1e-4, atol=1e-5)


def test_flap_removes_what_never_changes_and_lets_layers_differ():
    """A channel of the largest weights that is the same for every token is a constant; Wanda would keep it."""
    model = tiny_model("llama", *KINDS["llama"])
    mlp = model.model.layers[1].mlp
    mlp.gate_proj.weight[7], mlp.up_proj.weight[7] = 0, 0
    mlp.down_proj.weight[:, 7] = 50
    values = flap.learn(task_of(model, SETTINGS, 0.5)).values
    assert values["channel"][1, 7] == 0
    assert values["channel"].sum() == 60 and values["head"].sum() == 9
    assert len(set(values["channel"].sum(1).tolist())) > 1


def test_taylor_tells_units_apart_in_float16():
    """Where gradients of a mean over all tokens would be too small for it."""
    found = {}
    for dtype in (torch.float32, torch.float16):
        model = tiny_model("llama", *KINDS["llama"])
        for weight in model.model.layers.parameters():
            if weight.ndim > 1:
                weight.mul_(0.02)
        task = task_of(model.to(dtype), CalibrationSettings(calibration_sequences=4, sequence_length=256))
        blocks = BlockSampler(torch.randint(256, (1024,), generator=torch.Generator().manual_seed(5)), 256, 0)
        found[dtype] = taylor.scores(replace(task, blocks=blocks))
    for kind, scores in found[torch.float32].items():
        torch.testing.assert_close(found[torch.float16][kind], scores, rtol=0.01, atol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_taylor_sums_gradients_times_weights_over_what_goes_together(name, tied):
    model = tiny_model(name, *KINDS[name])
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    found = taylor.scores(task_of(model, SETTINGS, tied=tied))
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]) and parameter.grad is None and not parameter.requires_grad, key

    exact = exact_model(name)
    weights = {key: parameter.clone().requires_grad_() for key, parameter in exact.named_parameters()}
    tokens = sequences_of(exact)
    logits = functional_call(exact, weights, (tokens,)).logits.log_softmax(-1)
    loss = -logits[:, :-1].gather(-1, tokens[:, 1:, None]).mean() * tokens.shape[1]
    gradients = torch.autograd.grad(loss, list(weights.values()))
    products = {
        key: (weight * gradient).abs() for (key, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
    for index in range(len(exact.model.layers)):
        prefix = f"model.layers.{index}."
        if name == "phi3":
            query, key, value = products[f"{prefix}self_attn.qkv_proj.weight"].split([192, 96, 96])
        else:
            query, key, value = (products[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv")
        output = products[f"{prefix}self_attn.o_proj.weight"]
        heads = [
            query[32 * head : 32 * head + 32].sum()
            + output[:, 32 * head : 32 * head + 32].sum()
            + (key + value)[32 * (head // 2) : 32 * (head // 2) + 32].sum() * (0.5 if tied else 1)
            for head in range(6)
        ]
        heads = torch.stack(heads).view(3, 2).sum(1) if tied else torch.stack(heads)
        torch.testing.assert_close(found["head"][index].double(), heads, rtol=2e-3, atol=0)
        if name == "qwen3_moe":
            gate, up = products[f"{prefix}mlp.experts.gate_up_proj"].chunk(2, dim=1)
            down = products[f"{prefix}mlp.experts.down_proj"]
            kind, expected = "expert", (gate.sum(2) + up.sum(2) + down.sum(1)).flatten()
        else:
            rows = "gate_up_proj" if name == "phi3" else None
            gate, up = (
                products[f"{prefix}mlp.{rows}.weight"].chunk(2)
                if rows
                else (products[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up"))
            )
            down = products[f"{prefix}mlp.down_proj.weight"]
            kind, expected = "channel", gate.sum(1) + up.sum(1) + down.sum(0)
        torch.testing.assert_close(found[kind][index].double(), expected, rtol=2e-3, atol=1e-6)


def quiet(model, *indices: int):
    """Makes these layers change their input little."""
    for index in indices:
        model.model.layers[index].self_attn.o_proj.weight *= 1e-3
        mlp = model.model.layers[index].mlp
        down = mlp.experts.down_proj if hasattr(mlp, "experts") else mlp.down_proj.weight
        down *= 1e-3
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_block_influence(name):
    found, exact = depth.influence(task_of(tiny_model(name, *KINDS[name]), SETTINGS)), exact_model(name)
    states = exact.model(sequences_of(exact), output_hidden_states=True).hidden_states
    last = {}
    exact.model.layers[-1].register_forward_hook(lambda _, args, output: last.update(output=output))
    exact(sequences_of(exact))
    states = [*states[:-1], last["output"]]  # Transformers gives what the last norm makes of it
    for index, (before, after) in enumerate(zip(states, states[1:], strict=False)):
        cosines = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        torch.testing.assert_close(found[index].double(), 1 - cosines.mean(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "sparsity", "gone"),
    [("llama", 1 / 3, (1,)), ("llama", 0.6, (0, 2)), ("llama", 0.0, ()), ("qwen3_moe", 0.4, (2,))],
)
def test_depth_removes_whole_layers_that_are_then_not_run(tmp_path, name, sparsity, gone):
    model = quiet(tiny_model(name, *KINDS[name]), *gone)
    task = task_of(model, SETTINGS, sparsity)
    learned = depth.learn(task)
    for kind, values in learned.values.items():
        assert values.shape == task.units.shape(kind)
        expected = [0 if index in gone else values.shape[1] for index in range(3)]
        assert values.sum(1).tolist() == expected, kind
    masks = {key: mask.clone() for key, mask in task.units.to_masks(learned.values).items()}
    tokens = torch.tensor(prompts()[-1:])
    with apply_masks(model, masks), torch.no_grad():
        expected = model(tokens).logits
    out = converted(tmp_path, model, masks)
    layers = ModelGeometry.from_config(read_config(out)).layers
    assert [index for index, layer in enumerate(layers) if not layer.num_attention_heads] == list(gone)
    with torch.no_grad():
        torch.testing.assert_close(load_pruned(out)(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "sparsity", "message"),
    [
        ("llama", {"head": 0.2, "channel": 0.5}, "heads and channels together"),
        ("qwen2_moe", 0.5, "reach only a part of layers 0, 1, 2"),  # shared experts
        ("qwen3_next", 0.5, "reach only a part of layers"),
    ],
)
def test_depth_refuses_layers_that_it_cannot_remove_whole(name, sparsity, message):
    with pytest.raises(InputError, match=message):
        depth.learn(task_of(tiny_model(name, 6, 3, 24), SETTINGS, sparsity))
