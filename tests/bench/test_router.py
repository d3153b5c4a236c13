"""The load of experts that the benchmarks print, counted in another way."""

import pytest
import torch
from helpers.tiny import NUM_EXPERTS, tiny_model

from bench.experts.router import balancing_loss, describe_load, expert_load


def test_balancing_loss_is_least_where_every_layer_is_even():
    even, single = 9 * torch.eye(4).repeat(8, 1), 9 * torch.eye(4)[:1].repeat(32, 1)
    assert balancing_loss((even, even), 1).item() == pytest.approx(1)
    collapsed = [9 * torch.eye(4)[i : i + 1].repeat(32, 1) for i in range(4)]  # even only over all layers together
    assert balancing_loss(tuple(collapsed), 1).item() == balancing_loss((single,), 1).item() > 3.9


def test_load_counts_the_experts_that_tokens_went_to():
    model, chosen = tiny_model("qwen3_moe", 6, 3, 40, mlp_only_layers=[1]), []
    tokens = torch.randint(256, (20 * 128 + 5,), generator=torch.Generator().manual_seed(5))
    for index in (0, 2):
        model.model.layers[index].mlp.gate.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
    load = expert_load(model, tokens)
    for layer, seen in zip(load, (chosen[::2], chosen[1::2]), strict=True):
        counts = torch.zeros(NUM_EXPERTS).double()
        for expert in torch.cat(seen).flatten().tolist():
            counts[expert] += 1
        assert counts.sum() == 20 * 128 * 2 and layer == pytest.approx((counts / counts.sum()).tolist())
    assert "even: 25.00" in describe_load(load)
