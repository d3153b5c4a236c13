"""Which experts a token goes to, and with which weights: vLLM's routers, asked so that all platforms compute the same.

vLLM 0.32 drops some settings without a word where others are absent. On CPUs (`CPURouter`) a correction bias and a
scaling factor count with groups of experts alone, and sigmoid without groups fails. On GPUs (`FusedTopKRouter`) a
scaling factor is lost where there are neither groups nor a correction bias. All of it is right where experts are in
groups, and one group of all experts chooses as no group does. So whatever is more than a softmax is asked for in
groups.

gpt-oss takes the softmax of the top-k logits alone. That is the softmax of all, divided by the sum of the top-k:
`renormalize`. A bias of the router's linear layer is part of its logits.
"""

from typing import Any, Literal

import torch
from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter
from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router

from pruned_vllm.common.errors import InputError

Scoring = Literal["softmax", "sigmoid"]


def build_router(top_k: int, num_experts: int, **settings: Any) -> FusedMoERouter:
    """A router of one layer; its `select_experts` gives float32 weights and ids [tokens, top_k].

    Args:
        settings: those of `router_arguments`, which also says what is refused.
    """
    return create_fused_moe_router(
        top_k=top_k, global_num_experts=num_experts, **router_arguments(top_k, num_experts, **settings)
    )


def router_arguments(
    top_k: int,
    num_experts: int,
    *,
    renormalize: bool,
    scoring: Scoring = "softmax",
    num_expert_group: int = 1,
    topk_group: int = 1,
    correction_bias: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
) -> dict[str, Any]:
    """What vLLM's expert layer and its maker of routers call the settings of a router.

    Args:
        renormalize: whether the weights of a token's experts are divided by their sum.
        scoring: what makes a score of a logit; weights are scores.
        num_expert_group: groups of equally many consecutive experts.
        topk_group: groups that a token's experts are chosen from: those with the highest sum of their two best scores
            where there is a correction bias, else with the best score.
        correction_bias: float32 [num_experts], added to scores where experts and groups are chosen, not to weights.
        routed_scaling_factor: multiplies the weights.

    Raises:
        InputError: groups and experts do not go together, which happens where whole experts were removed.
    """
    is_plain = scoring == "softmax" and correction_bias is None and routed_scaling_factor == 1
    if is_plain and num_expert_group == 1:
        return {"renormalize": renormalize}
    size, rest = divmod(num_experts, num_expert_group)
    problems = []
    if rest:
        problems.append(f"{num_experts} experts are not {num_expert_group} groups of equally many")
    if size < 2:
        problems.append(f"groups have {size} experts, and vLLM compares groups by their two best")
    if topk_group * size < top_k:
        problems.append(f"{topk_group} groups of {size} experts have not the {top_k} that a token goes to")
    if problems:
        raise InputError("vLLM's routers cannot choose among these experts:", problems)
    return {
        "renormalize": renormalize,
        "use_grouped_topk": True,
        "num_expert_group": num_expert_group,
        "topk_group": topk_group,
        "scoring_func": scoring,
        "e_score_correction_bias": correction_bias,
        "routed_scaling_factor": routed_scaling_factor,
    }
