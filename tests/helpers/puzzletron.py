"""What Puzzletron writes: layers of different sizes, in a file for each sublayer, and the sizes in config.json."""

import copy
import json
from collections import defaultdict

from helpers.imports import silence
from helpers.tiny import tiny_model
from safetensors.torch import save_file

DENSE = {"llama": (6, 3, 512), "qwen3": (6, 3, 64), "mistral": (6, 6, 64), "qwen3_moe": (6, 3, 64)}


def heterogeneous(model_type, layers, **config):
    """A model of stock layers, each made from a config of its own."""
    heads, kv_heads, width = DENSE[model_type]
    model = tiny_model(model_type, heads, kv_heads, width, num_hidden_layers=len(layers), **config)
    for index, (kv_heads, width) in enumerate(layers):
        old, own = model.model.layers[index], copy.deepcopy(model.config)
        own.num_key_value_heads, own.intermediate_size = kv_heads or heads, width or 1
        new = type(old)(own, index).requires_grad_(False)
        for name, parameter in new.named_parameters():
            parameter.uniform_(0.5, 1.5) if name.endswith("norm.weight") else parameter.normal_(std=0.15)
        if not kv_heads:
            silence(new.self_attn)
        if not width:
            silence(new.mlp)
        model.model.layers[index] = new.eval()
    return model


def write_subblocks(directory, model, layers, without=()):
    """As Model-Optimizer's checkpoint_utils_hf.py: a file for each sublayer, with its norm; none of what does nothing.

    Args:
        without: endings of names of tensors that are left out.
    """
    files = defaultdict(dict)
    for name, tensor in model.state_dict().items():
        if without and name.endswith(tuple(without)):
            continue
        if not name.startswith("model.layers."):
            files["embeddings" if "embed_tokens" in name else "lm_head"][name] = tensor
            continue
        index = int(name.split(".")[2])
        kind = "attention" if ".self_attn." in name or ".input_layernorm." in name else "ffn"
        if layers[index][kind == "ffn"]:
            files[f"block_{index}_{kind}"][name] = tensor
    (directory / "subblocks_safetensors").mkdir(parents=True)
    weight_map = {}
    for stem, tensors in files.items():
        file = f"subblocks_safetensors/{stem}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    (directory / "config.json").write_text(json.dumps(config, default=str))


def block(kv_heads, width, attention, ffn):
    nothing = {"replace_with_linear": False, "sparsify": None}
    return {
        "attention": {**nothing, **(attention(kv_heads) if kv_heads else {"no_op": True})},
        "ffn": {**nothing, **(ffn(width) if width else {"no_op": True})},
        "parallel_blocks": None,
    }


def num_kv_heads(kv_heads):
    return {"num_key_value_heads": kv_heads, "no_op": False, "llama4": None, "mamba": None, "weights_precision": "bf16"}


def intermediate(width):
    return {"intermediate_size": width, "no_op": False, "moe": None, "hidden_act": "silu"}


def overrides(layers, key=str):
    entries = {}
    for index, (kv_heads, width) in enumerate(layers):
        skip = ["attention"] * (not kv_heads) + ["mlp"] * (not width)
        entry = {"skip": skip} if skip else {}
        entry |= {"num_key_value_heads": kv_heads} if kv_heads else {}
        entries[key(index)] = entry | ({"intermediate_size": width} if width else {})
    return entries
