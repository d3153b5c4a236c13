"""Models without some of their experts: the oracle for what is dropped, and files as REAP and MoNE leave them."""

import torch
import torch.nn.functional as F
from helpers.deepseek import Router
from helpers.experts import router_of
from helpers.masked import edit_json, edit_weights
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.formats.masked import EXPERT_MASK


def restrict_to_experts_with_channels(model: PreTrainedModel, masks: dict[str, torch.Tensor]) -> PreTrainedModel:
    """`model`, from now on with routers that give minus infinity to experts whose masks are all 0."""
    for index, layer in enumerate(model.model.layers):
        if (mask := masks.get(EXPERT_MASK.format(index))) is not None:
            router_of(layer.mlp).register_forward_hook(_restricted(model.config, (mask == 0).all(1)))
    return model


def _restricted(config, dropped: torch.Tensor):
    renormalise = config.model_type in ("mixtral", "qwen3_5_moe_text", "gpt_oss") or config.norm_topk_prob
    factor = getattr(config, "routed_scaling_factor", None) or 1

    def route(gate: nn.Module, args: tuple[torch.Tensor], output: tuple) -> tuple:
        logits = F.linear(args[0], gate.weight, getattr(gate, "bias", None)).masked_fill(dropped, -torch.inf)
        bias = getattr(gate, "e_score_correction_bias", None)
        scores = logits.softmax(-1) if bias is None else logits.sigmoid()
        ranking = scores if bias is None else (scores + bias).masked_fill(dropped, -torch.inf)
        chosen = ranking.topk(config.num_experts_per_tok).indices
        weights = scores.gather(-1, chosen)
        assert not dropped[chosen].any()
        if renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * factor
        if isinstance(gate, Router):
            return chosen, weights, None
        return logits.flatten(0, -2), weights.flatten(0, -2), chosen.flatten(0, -2)

    return route


def keep_experts(directory, model: PreTrainedModel, kept: list[list[int]], silent: tuple[tuple[int, int], ...] = ()):
    """Leaves of a saved model, and of `model` itself, these experts of each layer, numbered anew, as REAP does.

    Args:
        silent: (layer, expert), numbered as before: its tensors are gone, but its row of the router stays.
    """
    names, tensors, remove = FAMILIES[model.config.model_type].experts, load_file(directory / "model.safetensors"), []
    changes = {}
    for index, experts in enumerate(kept):
        prefix = f"model.layers.{index}."
        for router in names.router_tensors:
            changes[prefix + router] = tensors[prefix + router][experts].clone()
        remove += [name for name in tensors if name.startswith(f"{prefix}{names.module}.experts.")]
        for place, expert in enumerate(experts):
            if (index, expert) not in silent:
                for before, after in zip(names.modules_of(expert), names.modules_of(place), strict=True):
                    changes[f"{prefix}{after}.weight"] = tensors[f"{prefix}{before}.weight"]
        mlp = model.model.layers[index].mlp
        for module, name in ((mlp.gate, "weight"), (mlp.experts, "gate_up_proj"), (mlp.experts, "down_proj")):
            parameter = getattr(module, name)[experts].clone()
            if name == "down_proj":
                parameter[torch.tensor([(index, expert) in silent for expert in experts])] = 0
            setattr(module, name, nn.Parameter(parameter, requires_grad=False))
            module.num_experts = len(experts)
        if names.correction_bias is not None:
            mlp.gate.e_score_correction_bias = mlp.gate.e_score_correction_bias[experts].clone()
    edit_weights(directory, changes, tuple(name for name in remove if name not in changes))


ROUTER_SEMANTICS = {
    "preserve_logical_expert_ids": True,
    "preserve_router_weights": True,
    "renormalize_after_substitution": False,
}


def write_mone(directory, model: PreTrainedModel, replaced: dict[int, list[int]], declared: bool = False) -> None:
    """Saves `model` with constants in place of these experts of layers, in either form, and makes it compute that."""
    model.save_pretrained(directory)
    names, remove, constants = FAMILIES[model.config.model_type].experts, [], {}
    targets = {}
    for index, experts in replaced.items():
        module, values = model.model.layers[index].mlp.experts, torch.randn(len(experts), model.config.hidden_size)
        module.down_proj[experts] = 0
        module.register_forward_hook(_adds(experts, values))
        prefix, replacements = f"model.layers.{index}.{names.module}", {}
        for expert, value in zip(experts, values, strict=True):
            remove += [f"model.layers.{index}.{name}.weight" for name in names.modules_of(expert)]
            name = f"{prefix}.constants.{expert}" if declared else f"{prefix}.experts.{expert}.approx_value"
            constants[name] = value.clone()
            replacements[str(expert)] = {"format": "constant-v1", "tensors": {"value": name}}
        layout = {"num_logical_experts": 4, "weight_layout": "compact_retained_experts"}
        targets[f"{prefix}.experts"] = {**layout, "replacements": replacements}
    edit_weights(directory, constants, tuple(remove))
    substitution = {"version": 1, "router_semantics": ROUTER_SEMANTICS, "targets": targets}
    if declared:
        compression = {"quant_method": "compressed-tensors", "transform_config": {"expert_substitution": substitution}}
        edit_json(directory / "config.json", compression_config=compression)
    else:
        listed = {str(index): experts for index, experts in replaced.items()}
        edit_json(directory / "config.json", approximate_experts=listed)


def _adds(experts: list[int], values: torch.Tensor):
    def add(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        _, chosen, weights = args
        for expert, value in zip(experts, values, strict=True):
            output = output + (weights * (chosen == expert)).sum(-1, keepdim=True) * value
        return output

    return add
