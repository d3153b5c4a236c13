"""Models as other projects leave them, written by hand, and the comparison with what they must compute.

The oracle is a stock Hugging Face model in which what was pruned is zero, or missing.
"""

from pathlib import Path

import torch
from helpers.cut import cut_tensors, make_zero
from helpers.masked import convert_pruned, edit_json, edit_weights
from helpers.tiny import HEAD_DIM, prompts, tiny_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

from pruned_vllm.hf.loading import load_pruned


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.tensor(prompts()[-1:])).logits


def assert_converts(source: Path, out: Path, expected: torch.Tensor, *args) -> PreTrainedModel:
    """Converts through the command, and compares logits; returns the converted model."""
    assert convert_pruned(source, out, *args) == 0
    pruned = load_pruned(out, dtype=torch.float32)
    torch.testing.assert_close(logits(pruned), expected, rtol=1e-4, atol=1e-4)
    return pruned


def sizes(model: PreTrainedModel) -> list[tuple[int, int, int]]:
    """Query heads, KV heads and FFN channels of every layer, as the weights have them."""
    found = []
    for layer in model.model.layers:
        weights = {name: parameter.shape for name, parameter in layer.named_parameters()}
        heads, kv_heads = (weights.get(f"self_attn.{name}_proj.weight", (0,))[0] // HEAD_DIM for name in ("q", "k"))
        found.append((heads, kv_heads, weights.get("mlp.gate_proj.weight", (0,))[0]))
    return found


def cut(model: PreTrainedModel, kv_heads: list[list[int]], channels: list[int]) -> dict[str, torch.Tensor]:
    """Makes zero in `model` what is not kept, and returns the tensors of what is.

    Args:
        kv_heads: those that stay in each layer, with all their query heads.
        channels: how many stay in each layer, the first ones.
    """
    first = [list(range(width)) for width in channels]
    tensors = cut_tensors(model, kv_heads, first)
    make_zero(model, kv_heads, first)
    return tensors


def silence(module: torch.nn.Module) -> None:
    """Makes attention or an MLP add nothing."""

    def zeros(_module, _args, output):
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    module.register_forward_hook(zeros)


def replace_weights(directory: Path, tensors: dict[str, torch.Tensor], keep_empty: bool) -> None:
    """Puts tensors into a saved model; those without rows or columns are removed unless they are to stay empty.

    A sublayer that goes takes its norms with it, but leaves the bias that it ends in.
    """
    remove = []
    if not keep_empty:
        for name in [name for name, tensor in tensors.items() if not tensor.numel()]:
            remove.append(name)
            layer, _, rest = name.partition(".self_attn." if ".self_attn." in name else ".mlp.")
            norms = ("post_attention_layernorm",)
            if ".self_attn." in name:
                norms = ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm")
            remove += [f"{layer}.{norm}.weight" for norm in norms]
    edit_weights(directory, tensors, tuple(remove))


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def write_flap(directory, geometry, biased=range(3), keep_empty=False):
    """FLAP's result: biases of o_proj and down_proj alone, of which config.json knows nothing."""
    model_type, heads, kv_heads, kept, channels = geometry
    model = tiny_model(model_type, heads, kv_heads, 40, attention_bias=True, mlp_bias=True)
    last = [f"model.layers.{index}.{name}.bias" for index in biased for name in ("self_attn.o_proj", "mlp.down_proj")]
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias") and name not in last:
            parameter.zero_()
    model.save_pretrained(directory)
    tensors = {name: tensor for name, tensor in cut(model, kept, channels).items() if not name.endswith(".bias")}
    replace_weights(directory, tensors, keep_empty)
    others = [name for name in stored(directory) if name.endswith("_proj.bias") and name not in last]
    edit_weights(directory, {}, tuple(others))
    edit_json(directory / "config.json", attention_bias=False, mlp_bias=False)
    return model


def dropped(model, lines):
    for layer, line in zip(model.model.layers, lines, strict=True):
        for part in line.split("+"):
            if part != "none":
                silence(layer.self_attn if part == "attn" else layer.mlp)
    return model


def write_list(directory, lines, name="layer_drop_config.txt"):
    directory.mkdir(exist_ok=True)
    (directory / name).write_text("\n".join(lines) + "\n")
    return directory


def kill_hidden(model: PreTrainedModel, dimensions: list[int]) -> None:
    """Makes hidden dimensions zero in the embedding and in all that is added to it."""
    model.model.embed_tokens.weight[:, dimensions] = 0
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight[dimensions] = 0
            if projection.bias is not None:
                projection.bias[dimensions] = 0
