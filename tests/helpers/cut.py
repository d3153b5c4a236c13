"""Models whose heads and channels were cut out of the tensors, and the dense model that computes the same."""

import copy
import sys
import types
from collections.abc import Sequence

import torch
from helpers.tiny import HEAD_DIM, prompts
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

LLM_PRUNER = "LLMPruner.models.hf_llama.modeling_llama"
Kept = list[list[int]]  # by layer


def rows(heads: Sequence[int]) -> list[int]:
    """The rows of a projection that belong to these heads."""
    return [head * HEAD_DIM + row for head in heads for row in range(HEAD_DIM)]


def cut_weights(model: PreTrainedModel, kv_heads: Kept, channels: Kept) -> dict[str, torch.Tensor]:
    """The weights without the other KV heads, their query heads, and the other FFN channels."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return weights | cut_tensors(model, kv_heads, channels)


def cut_tensors(model: PreTrainedModel, kv_heads: Kept, channels: Kept) -> dict[str, torch.Tensor]:
    """Those of `cut_weights` that are cut."""
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    weights, found = model.state_dict(), {}
    for layer, (heads, width) in enumerate(zip(kv_heads, channels, strict=True)):
        queries = [head * group + member for head in heads for member in range(group)]
        kept = {"self_attn.q_proj": rows(queries), "self_attn.k_proj": rows(heads)}
        kept |= {"self_attn.v_proj": rows(heads), "mlp.gate_proj": width, "mlp.up_proj": width}
        for module, indices in kept.items():
            for part in ("weight", "bias"):
                name = f"model.layers.{layer}.{module}.{part}"
                if name in weights:
                    found[name] = weights[name][indices].clone()
        for module, columns in (("self_attn.o_proj", rows(queries)), ("mlp.down_proj", width)):
            name = f"model.layers.{layer}.{module}.weight"
            found[name] = weights[name][:, columns].clone()
    return found


def zeroed(model: PreTrainedModel, kv_heads: Kept, channels: Kept) -> PreTrainedModel:
    """The dense model in which the other heads and channels reach nothing."""
    model = copy.deepcopy(model)
    make_zero(model, kv_heads, channels)
    return model


def make_zero(model: PreTrainedModel, kv_heads: Kept, channels: Kept) -> None:
    """Makes zero, in the model itself, what the other heads and channels go into."""
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    for layer, heads, width in zip(model.model.layers, kv_heads, channels, strict=True):
        queries = [head * group + member for head in heads for member in range(group)]
        for module, columns in ((layer.self_attn.o_proj, rows(queries)), (layer.mlp.down_proj, width)):
            kept = torch.zeros(module.weight.shape[1])
            kept[columns] = 1
            module.weight.mul_(kept)


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


def config_like(model, *left_out: str, **changes) -> dict:
    """The attributes of a configuration of that time: sizes, and what JSON cannot say."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys += ("num_key_value_heads", "rms_norm_eps", "hidden_act", "max_position_embeddings", "tie_word_embeddings")
    config = {key: getattr(model.config, key) for key in keys if key not in left_out}
    rope = {"rope_theta": model.config.rope_parameters["rope_theta"], "rope_scaling": None}
    odd = {"torch_dtype": torch.float16, "id2label": {0: "a"}, "_name_or_path": "base", "pruned_heads": {}}
    return config | rope | odd | changes


def half(model):
    """The model with weights that half precision can say, in float32; its rotary tables stay what they are."""
    for parameter in model.parameters():
        parameter.copy_(parameter.half())
    return model


def upto(*counts: int) -> list[list[int]]:
    return [list(range(count)) for count in counts]


def channel_wise(project: Project, model: PreTrainedModel, hidden: int) -> tuple[nn.Module, PreTrainedModel]:
    """LLM-Pruner's channel-wise result, with the first `hidden` dimensions of a Mistral; the model that computes it.

    Mistral computes what Llama does, and takes any hidden size.
    """
    weights = {}
    for name, tensor in model.state_dict().items():
        along_rows = name.endswith(("o_proj.weight", "down_proj.weight")) or tensor.dim() == 1
        weights[name] = tensor[:hidden] if along_rows else tensor[:, :hidden]
    config = config_like(model, "num_key_value_heads", hidden_size=hidden)
    halves = {name: tensor.half() for name, tensor in weights.items()}
    pickled = project.model(halves, config, head_dim=HEAD_DIM, hidden_size=model.config.hidden_size)
    expected = MistralForCausalLM(MistralConfig(**(model.config.to_dict() | {"hidden_size": hidden}))).eval()
    expected.load_state_dict(weights)
    return pickled, expected
