"""Writes a converted checkpoint from a plan."""

import json
import shutil
from pathlib import Path

from tqdm import tqdm

from converter.model_card import model_card
from converter.plan import Plan
from converter.writer import ShardWriter
from pruned_vllm.command import atomic_directory
from pruned_vllm.errors import InputError

# Everything a tokenizer, a chat template or a licence may consist of. Not *.py: no code is carried along.
COPIED_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def convert(plan: Plan, out: Path, *, overwrite: bool = False, max_shard_bytes: int = 5_000_000_000) -> None:
    """Writes the converted model to the directory `out`, which appears whole or not at all.

    Args:
        plan: from `converter.plan.make_plan`.
        max_shard_bytes: size of a shard; this much memory is needed, plus the largest tensor in float32.

    Raises:
        InputError: `out` exists, lies where the weights are, there is too little disk, or a value overflows.
        OSError: the disk cannot be written.
    """
    _check_place(plan, out)
    with atomic_directory(out, overwrite=overwrite, marker="config.json") as directory:
        shapes = plan.pruned.tensor_shapes()
        writer = ShardWriter(directory, max_shard_bytes)
        for name, shape in tqdm(shapes.items(), desc="converting", unit=" tensors"):
            tensor = plan.checkpoint.read(name)
            if name in plan.cuts:
                tensor = plan.cuts[name].apply(tensor)
            if tuple(tensor.shape) != shape:
                raise AssertionError(f"{name}: cut to {list(tensor.shape)}, the geometry says {list(shape)}")
            if bad := int((~tensor.isfinite()).sum()):
                raise InputError(
                    f"{name}: {bad} values are NaN or infinite in {plan.checkpoint.dtypes[name]} after the masks were "
                    "folded in; check the weights, or store them in a dtype with a larger range"
                )
            writer.add(name, tensor)
        writer.finish()
        _write_json(directory / "config.json", plan.config())
        for pattern in COPIED_FILES:
            for file in plan.checkpoint.directory.glob(pattern):
                if file.is_file():
                    shutil.copy(file, directory)
        (directory / "README.md").write_text(model_card(plan), encoding="utf-8")


def _check_place(plan: Plan, out: Path) -> None:
    weights, target = plan.checkpoint.directory.resolve(), out.resolve()
    if target == weights or target in weights.parents:
        raise InputError(f"{out} contains the dense weights that are to be converted; choose another directory")
    existing = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if plan.num_bytes > free:
        raise InputError(f"{out} needs {plan.num_bytes:,} bytes, but its disk has {free:,} left")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
