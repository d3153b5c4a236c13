"""Routers of experts: vLLM's, against their definitions, written out token by token."""

import inspect
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.router import router_factory

from pruned_vllm.common.errors import InputError
from pruned_vllm.serving.moe_router import build_router, router_arguments

TOP_K, EXPERTS, TOKENS = 3, 12, 40
GROUPS = ({}, {"num_expert_group": 4, "topk_group": 2}, {"num_expert_group": 2, "topk_group": 1})
TABLE = [
    {"renormalize": renormalize, "scoring": scoring, "routed_scaling_factor": factor, "has_bias": has_bias, **groups}
    for renormalize in (False, True)
    for scoring in ("softmax", "sigmoid")
    for factor in (1.0, 2.5)
    for has_bias in (False, True)
    for groups in GROUPS
]


def label(settings: dict[str, Any]) -> str:
    return "-".join(map(str, settings.values()))


def expected_choice(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    renormalize: bool,
    scoring: str = "softmax",
    routed_scaling_factor: float = 1.0,
    num_expert_group: int = 1,
    topk_group: int = 1,
) -> dict[int, float]:
    """One token's experts with their weights, as Transformers' GLM-4.5, DeepSeek and Ernie 4.5 have them."""
    scores = (logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()).tolist()
    ranking = scores if bias is None else [score + more for score, more in zip(scores, bias.tolist(), strict=True)]
    size = len(scores) // num_expert_group
    groups = [range(start, start + size) for start in range(0, len(scores), size)]
    best = 1 if bias is None else 2
    groups.sort(key=lambda group: -sum(sorted((ranking[expert] for expert in group), reverse=True)[:best]))
    candidates = [expert for group in groups[:topk_group] for expert in group]
    chosen = sorted(candidates, key=lambda expert: -ranking[expert])[:TOP_K]
    total = sum(scores[expert] for expert in chosen) if renormalize else 1.0
    return {expert: routed_scaling_factor * scores[expert] / total for expert in chosen}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("settings", TABLE, ids=label)
def test_experts_and_weights(settings, dtype):
    torch.manual_seed(0)
    settings = dict(settings)
    # Far enough from each other that bfloat16 keeps their order.
    logits = torch.stack([torch.linspace(-3, 3, EXPERTS)[torch.randperm(EXPERTS)] for _ in range(TOKENS)]).to(dtype)
    bias = torch.randn(EXPERTS) if settings.pop("has_bias") else None  # as large as the scores: it decides often
    router = build_router(TOP_K, EXPERTS, correction_bias=bias, **settings)
    weights, ids = router.select_experts(torch.zeros(TOKENS, 8, dtype=dtype), logits)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    for token in range(TOKENS):
        expected = expected_choice(logits[token].double(), bias, **settings)
        found = dict(zip(ids[token].tolist(), weights[token].tolist(), strict=True))
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-2)


def test_the_softmax_of_the_top_logits_alone():
    """gpt-oss' router: the softmax of all, divided by the sum of what was chosen, is the same."""
    logits = torch.randn(TOKENS, EXPERTS)
    weights, ids = build_router(TOP_K, EXPERTS, renormalize=True).select_experts(torch.zeros(TOKENS, 8), logits)
    torch.testing.assert_close(weights, logits.gather(1, ids.long()).softmax(-1))
    assert torch.equal(ids.long().sort(-1).values, logits.topk(TOP_K).indices.sort(-1).values)


@pytest.mark.parametrize("settings", TABLE, ids=label)
def test_no_setting_is_lost_on_gpus(settings, monkeypatch):
    """The router that vLLM makes for a GPU has every setting; `FusedTopKRouter` has no place for some."""
    monkeypatch.setattr(router_factory.current_platform, "is_cpu", lambda: False)
    settings = dict(settings)
    bias = torch.zeros(EXPERTS) if settings.pop("has_bias") else None
    router = build_router(TOP_K, EXPERTS, correction_bias=bias, **settings)
    assert router.renormalize == settings["renormalize"]
    assert getattr(router, "scoring_func", "softmax") == settings["scoring"]
    assert getattr(router, "routed_scaling_factor", 1.0) == settings["routed_scaling_factor"]
    assert getattr(router, "e_score_correction_bias", None) is bias
    assert getattr(router, "num_expert_group", 1) == settings.get("num_expert_group", 1)
    assert getattr(router, "topk_group", 1) == settings.get("topk_group", 1)


@pytest.mark.parametrize("settings", TABLE, ids=label)
def test_vllms_expert_layer_takes_the_same_arguments(settings):
    settings = {name: value for name, value in settings.items() if name != "has_bias"}
    arguments = router_arguments(TOP_K, EXPERTS, **settings)
    assert arguments.keys() <= inspect.signature(FusedMoEFactory).parameters.keys()


@pytest.mark.parametrize(
    ("top_k", "experts", "settings", "problem"),
    [
        (2, 11, {"num_expert_group": 4, "topk_group": 2}, "11 experts are not 4 groups of equally many"),
        (2, 4, {"num_expert_group": 4, "topk_group": 2}, "groups have 1 experts, and vLLM compares groups by"),
        (1, 1, {"scoring": "sigmoid"}, "groups have 1 experts, and vLLM compares groups by"),
        (5, 8, {"num_expert_group": 4, "topk_group": 2}, "2 groups of 2 experts have not the 5 that a token goes to"),
    ],
)
def test_groups_and_experts_that_do_not_go_together(top_k, experts, settings, problem):
    with pytest.raises(InputError, match=problem):
        build_router(top_k, experts, renormalize=True, **settings)
