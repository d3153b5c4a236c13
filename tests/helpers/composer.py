"""What LLM-Shearing writes: checkpoints of Composer, with masks; and the masks that it computes from them."""

import math
import re
from pathlib import Path

import torch
from helpers.l0 import Shape
from helpers.llama import Rules

IN_BLOCK = {
    **{"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.out_proj"},
    **{"self_attn.q_proj": "attn.wq", "self_attn.k_proj": "attn.wk", "self_attn.v_proj": "attn.wv"},
}
WHOLE = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.output",
}


def composer_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as LLM-Shearing names them, and what else its state_dict has."""
    renamed = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        new = f"model.transformer.blocks.{block[1]}.{IN_BLOCK.get(block[2], block[2])}" if block else WHOLE[module]
        renamed[f"{new}.weight"] = tensor
        if new.endswith("wq"):
            renamed[new.replace("wq", "rotary_emb.inv_freq")] = torch.ones(4)
    return renamed


def with_masks(model, masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state_dict = composer_names(model.state_dict())
    state_dict |= {f"model.l0_module.masks.{kind}.z_loga": mask for kind, mask in masks.items()}
    return state_dict | {"model.l0_module.lambdas.lambda_1_head": torch.tensor(0.1)}


def log_alphas(shape: Shape, kinds=("head", "intermediate", "hidden", "layer")) -> dict[str, torch.Tensor]:
    """The first and the last of each are beyond the bounds that the project clamps them to."""
    generator = torch.Generator().manual_seed(2)
    layers = (shape.num_layers,)
    sizes = {"head": (*layers, shape.num_heads), "intermediate": (*layers, shape.width), "hidden": (shape.hidden_size,)}
    sizes |= {"layer": layers, "head_layer": layers, "mlp": layers}
    found = {kind: torch.randn(sizes[kind], generator=generator) * 1.5 for kind in kinds}
    for mask in found.values():
        mask.view(-1)[0], mask.view(-1)[-1] = 9, -6
    return found


def kept_mask(log_alpha: torch.Tensor, kept: int | None) -> torch.Tensor:
    """The mask of one row, as `Mask._deterministic_z` says: `kept` units, or as many as are expected."""
    x = log_alpha.double().clamp(math.log(0.01), math.log(100))
    if kept is None:
        kept = len(x) - round(len(x) - (1 - torch.sigmoid(2 / 3 * math.log(0.1 / 1.1) - x)).sum().item())
    mask = torch.sigmoid(x * 1.5 * 0.8)
    mask[x.argsort(descending=True)[kept:]] = 0
    return mask.float()


def kept_masks(masks: dict[str, torch.Tensor], kept: dict[str, int]) -> dict[str, torch.Tensor]:
    """The masks of the log alphas; `kept` by kind, as far as the run has a target."""
    return {
        kind: torch.stack([kept_mask(row, kept.get(kind)) for row in mask])
        if mask.dim() > 1
        else kept_mask(mask, kept.get(kind))
        for kind, mask in masks.items()
    }


def rules_of(zs: dict[str, torch.Tensor], embedding: bool) -> Rules:
    """What composer_llama.py computes with masks [layers, units], [layers] and [dimensions]."""
    hidden = zs.get("hidden")
    rules = Rules(both=False, outputs=hidden, norms=hidden, summed=None if hidden is None else hidden != 0)
    if embedding:
        rules.embedding = hidden
    rules.heads, rules.channels = (dict(enumerate(zs[kind])) for kind in ("head", "intermediate"))
    attention, mlp = (zs.get(kind, zs.get("layer")) for kind in ("head_layer", "mlp"))
    if attention is not None:
        rules.attention, rules.mlp = dict(enumerate(attention.tolist())), dict(enumerate(mlp.tolist()))
    return rules


class DictConfig:
    """As OmegaConf pickles one: its nodes are in `_content`."""

    def __init__(self, content: dict):
        self._metadata, self._parent = None, None
        self._content = {
            key: DictConfig(value) if isinstance(value, dict) else AnyNode(value) for key, value in content.items()
        }


class AnyNode:
    def __init__(self, value):
        self._val = value


def save_checkpoint(directory: Path, state_dict: dict, name: str = "latest-rank0.pt") -> Path:
    """A checkpoint as Composer saves one, with the state of the training."""
    directory.mkdir(exist_ok=True)
    state = {"model": state_dict, "optimizers": {"AdamW": {"step": 3, "exp_avg": torch.ones(2)}}, "run_name": "pruning"}
    torch.save({"state": state, "rng": [{"python": (3, (1, 2), None)}]}, directory / name)
    return directory / name
