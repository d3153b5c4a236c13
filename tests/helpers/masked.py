"""A masked checkpoint for the tests of convert-pruned, and ways to spoil it."""

import json
from pathlib import Path

import torch
from helpers.tiny import masks_for, tiny_model, write_masked
from safetensors.torch import load_file, save_file

from converter import cli


def keep(width: int, *kept: int) -> torch.Tensor:
    mask = torch.zeros(width)
    mask[list(kept)] = 1
    return mask


RAGGED = masks_for(
    [[1, 0, 2.5, 0, 1, 1], [0, 0, 0, 0.3, 0, 0], [1, 1, 1, 1, 1, -0.5]],
    [keep(40, *range(17)), keep(40, 39), keep(40, *range(0, 40, 2))],
)
HEADS0, CHANNELS0 = "model.layers.0.self_attn.head_mask", "model.layers.0.mlp.channel_mask"


def ragged_checkpoint(directory: Path) -> Path:
    """A small Llama with other sizes in every layer once it is converted."""
    return write_masked(directory, tiny_model("llama", 6, 6, 40), RAGGED)


def convert_pruned(*args) -> int:
    """Runs the command, exact widths unless the arguments say otherwise; returns its exit code."""
    return cli.main(["--align", "1", *map(str, args)])


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_masks(ckpt: Path, **changes) -> None:
    path = ckpt / "pruning_masks.safetensors"
    save_file(load_file(path) | changes, path)


def edit_weights(ckpt: Path, changes: dict, remove: tuple = ()) -> None:
    path = ckpt / "model.safetensors"
    tensors = {name: tensor for name, tensor in (load_file(path) | changes).items() if name not in remove}
    save_file(tensors, path, metadata={"format": "pt"})


def overflow(ckpt: Path) -> None:
    """Makes a folded weight too large for its dtype, which shows only while it is written."""
    edit_masks(ckpt, **{CHANNELS0: torch.full((40,), 3e38)})
    edit_weights(ckpt, {"model.layers.0.mlp.up_proj.weight": torch.full((40, 96), 2.0)})
