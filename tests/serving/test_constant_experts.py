"""Experts that output a constant, beside others: what the ranks compute together, each token sent to one of them."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pruned_vllm.serving.ragged_moe import RaggedExperts

HIDDEN = 32
WIDTHS = (5, 0, 7, 0, 0)  # the second and the last one are constants, the fourth one adds zeros


@pytest.mark.parametrize("widths", [WIDTHS, (0,) * 5], ids=["some", "no expert has channels"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_constants_are_added_once_with_the_weight_of_the_router(monkeypatch, widths, ranks):
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    constants = {1: random(HIDDEN), 4: random(HIDDEN)}
    weights = {
        expert: {"w1": random(width, HIDDEN), "w3": random(width, HIDDEN), "w2": random(HIDDEN, width)}
        for expert, width in enumerate(widths)
        if width
    }
    x, topk_ids = random(20, HIDDEN), torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(20)])
    topk_weights = torch.rand(20, 2, generator=generator)
    stored = [(f"{expert}.w2.bias", value) for expert, value in constants.items()]
    stored += [(f"{expert}.{name}.weight", value) for expert, parts in weights.items() for name, value in parts.items()]

    found = torch.zeros_like(x)
    for rank in range(ranks):
        monkeypatch.setattr("pruned_vllm.serving.ragged_moe.get_tensor_model_parallel_rank", lambda rank=rank: rank)
        vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
            compilation_config=SimpleNamespace(static_forward_context={}),
        )
        experts = RaggedExperts(vllm_config, widths, HIDDEN, "experts", has_constants=True)
        loaded = set(experts.load_weights(iter(stored)))
        assert loaded == {name for name, _ in experts.named_parameters()}
        found += experts.compute(x, topk_weights, topk_ids)

    expected = torch.zeros_like(x)
    for token, (chosen, of_chosen) in enumerate(zip(topk_ids.tolist(), topk_weights, strict=True)):
        for expert, weight in zip(chosen, of_chosen, strict=True):
            if expert in weights:
                gate, up, down = (weights[expert][name] for name in ("w1", "w3", "w2"))
                expected[token] += weight * (down @ (F.silu(gate @ x[token]) * (up @ x[token])))
            elif expert in constants:
                expected[token] += weight * constants[expert]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
