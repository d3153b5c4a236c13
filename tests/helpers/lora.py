"""A masked checkpoint with a LoRA adapter, for the tests of convert-pruned."""

import json
from pathlib import Path

import torch
from helpers.tiny import masks_for, tiny_model, write_masked
from safetensors.torch import save_file
from transformers import PreTrainedModel

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "megatron_core": "megatron.core"}
PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
MODULES = [f"model.layers.{index}.{name}" for index in range(3) for name in PROJECTIONS]


def channels(*kept: int) -> torch.Tensor:
    mask = torch.zeros(40)
    mask[list(kept)] = torch.linspace(-1.3, 2, len(kept))  # none is 0
    return mask


# Three heads and eight channels in every layer, with soft values: a stock architecture can say what is left.
UNIFORM = masks_for(
    [[1, 0, 2, 0, 0, 0.5], [0, 1, 1, 0, 4, 0], [0.1, 0, 0, 0, 1, 7]],
    [channels(*range(8)), channels(*range(30, 38)), channels(*range(5, 13))],
)


def adapted_checkpoint(directory: Path) -> Path:
    """UNIFORM masks and an adapter on every projection of a small Llama."""
    model = tiny_model("llama", 6, 6, 40)
    write_masked(directory, model, UNIFORM, "gate_and_up", lora_adapter="adapter")
    write_adapter(directory, model, MODULES)
    return directory


def write_adapter(
    ckpt: Path, model: PreTrainedModel, modules: list[str], ranks: dict | None = None, dtype=torch.float32, **config
) -> dict[str, torch.Tensor]:
    """Saves a random adapter as PEFT does; returns its tensors. `ranks` are the ones that are not 4 (or `r`)."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for module in modules:
        rank = (ranks or {}).get(module, config.get("r", 4))
        rows, columns = model.get_submodule(module).weight.shape
        for half, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            value = torch.randn(shape, generator=generator).mul(0.15).to(dtype)
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = value
    (ckpt / "adapter").mkdir()
    save_file(tensors, ckpt / "adapter" / "adapter_model.safetensors")
    (ckpt / "adapter" / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return tensors
