"""Models whose heads and channels were cut out of the tensors, and the dense model that computes the same."""

import copy
import sys
import types

import torch
from helpers.tiny import HEAD_DIM, prompts
from torch import nn
from transformers import PreTrainedModel

Kept = list[list[int]]  # by layer


def rows_of(heads: list[int], width: int = HEAD_DIM) -> list[int]:
    return [head * width + row for head in heads for row in range(width)]


def cut_weights(model: PreTrainedModel, kv_heads: Kept, channels: Kept) -> dict[str, torch.Tensor]:
    """The weights without the other KV heads, their query heads, and the other FFN channels."""
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer, (heads, width) in enumerate(zip(kv_heads, channels, strict=True)):
        queries = [head * group + member for head in heads for member in range(group)]
        kept = {"self_attn.q_proj": rows_of(queries), "self_attn.k_proj": rows_of(heads)}
        kept |= {"self_attn.v_proj": rows_of(heads), "mlp.gate_proj": width, "mlp.up_proj": width}
        for module, rows in kept.items():
            for part in ("weight", "bias"):
                name = f"model.layers.{layer}.{module}.{part}"
                if name in weights:
                    weights[name] = weights[name][rows]
        for module, columns in (("self_attn.o_proj", rows_of(queries)), ("mlp.down_proj", width)):
            name = f"model.layers.{layer}.{module}.weight"
            weights[name] = weights[name][:, columns]
    return weights


def zeroed(model: PreTrainedModel, kv_heads: Kept, channels: Kept) -> PreTrainedModel:
    """The dense model in which the other heads and channels reach nothing."""
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    model = copy.deepcopy(model)
    for layer, heads, width in zip(model.model.layers, kv_heads, channels, strict=True):
        queries = [head * group + member for head in heads for member in range(group)]
        for module, columns in ((layer.self_attn.o_proj, rows_of(queries)), (layer.mlp.down_proj, width)):
            kept = torch.zeros(module.weight.shape[1])
            kept[columns] = 1
            module.weight.mul_(kept)
    return model


@torch.no_grad()
def check_same_logits(model: nn.Module, other: nn.Module) -> None:
    for prompt in prompts():
        tokens = torch.tensor([prompt])
        torch.testing.assert_close(model(tokens).logits, other(tokens).logits, rtol=1e-4, atol=1e-4)


class Project:
    """Classes of a module that is there only while `entered`: a pickle of their objects outlives their code.

    Args:
        monkeypatch: of the test.
        module: what the classes say that they come from.
        architecture: the name of the class of the whole model.
    """

    def __init__(self, monkeypatch, module: str, architecture: str) -> None:
        self._monkeypatch, self._module, self._names = monkeypatch, module, {"": architecture}
        parents = [".".join(module.split(".")[:end]) for end in range(1, module.count(".") + 2)]
        for name in parents:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        self._classes: dict[str, type] = {}

    def kind(self, name: str, base: type = nn.Module, **attributes) -> type:
        """A class of this module."""
        if name not in self._classes:
            self._classes[name] = type(name, (base,), {"__module__": self._module, **attributes})
            setattr(sys.modules[self._module], name, self._classes[name])
        return self._classes[name]

    def model(self, weights: dict[str, torch.Tensor], config: dict, **attention) -> nn.Module:
        """Modules that hold the weights under their names, a configuration, and attributes of attention."""
        whole = self.kind(self._names[""])()
        whole.config = self.kind("Config", object)()
        whole.config.__dict__.update(config)
        for name, tensor in weights.items():
            *path, leaf = name.split(".")
            part = whole
            for step in path:
                if not hasattr(part, step):
                    part.add_module(step, self.kind("Attention" if step == "self_attn" else "Part")())
                part = getattr(part, step)
            part.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        for part in whole.modules():
            if type(part).__name__ == "Attention":
                part.__dict__.update(attention)
        return whole

    def forget(self) -> None:
        """Takes the module away, as on the machine of somebody who has not installed the project."""
        self._monkeypatch.delitem(sys.modules, self._module)
