"""Writes a converted checkpoint from a plan."""

import shutil
from pathlib import Path

import torch

from converter.plan import Plan
from converter.table import model_card
from converter.writer import ShardWriter
from pruned_vllm.common.directories import atomic_directory
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import write_json
from pruned_vllm.common.progress import progress_bar
from pruned_vllm.formats.companions import copy_companions

WRITER = "convert-pruned"  # whose output only this command replaces


def convert(plan: Plan, out: Path, *, overwrite: bool = False, max_shard_bytes: int = 5_000_000_000) -> None:
    """Writes the converted model to the directory `out`, which appears whole or not at all.

    Args:
        plan: from `converter.plan.make_plan`.
        max_shard_bytes: size of a shard; this much memory is needed, plus the largest tensor in float32 (twice
            with an adapter).

    Raises:
        InputError: `out` exists, holds the masks or the weights, there is too little disk, or a value overflows.
        OSError: the disk cannot be written.
    """
    _check_place(plan, out)
    with atomic_directory(out, writer=WRITER, overwrite=overwrite) as directory:
        shapes, changes = plan.pruned.tensor_shapes(), plan.source.changes
        writer = ShardWriter(directory, max_shard_bytes)
        for name, shape in progress_bar(shapes.items(), desc="converting", unit=" tensors"):
            tensor, done = plan.checkpoint.read(name), []
            dtype = plan.dtype or tensor.dtype
            if changes is not None and name in changes.names:
                tensor = changes.merge(name, tensor)
                done.append("the adapter was merged")
            if name in plan.cuts:
                # What is written in more digits keeps those that the fold computes.
                tensor = plan.cuts[name].apply(tensor.to(torch.promote_types(tensor.dtype, dtype)))
                done.append("the masks were folded in")
            tensor = tensor.to(dtype)
            if plan.dtype is not None:
                done.append(f"it was cast to {str(dtype).removeprefix('torch.')}")
            if tuple(tensor.shape) != shape:
                raise AssertionError(f"{name}: cut to {list(tensor.shape)}, the geometry says {list(shape)}")
            if bad := int((~tensor.isfinite()).sum()):
                after = f" after {' and '.join(done)}" if done else ""
                stored = plan.checkpoint.tensors[name].dtype
                raise InputError(
                    f"{name}: {bad} values are NaN or infinite in {stored}{after}; check the weights, "
                    "or store them in a dtype with a larger range"
                )
            writer.add(name, tensor)
        writer.finish()
        write_json(directory / "config.json", plan.config())
        if plan.source.companions is not None:
            copy_companions(plan.source.companions, directory)
        (directory / "README.md").write_text(model_card(plan), encoding="utf-8")


def _check_place(plan: Plan, out: Path) -> None:
    target = out.resolve()
    for used in {path.resolve(): None for path in plan.source.inputs}:
        if target == used or target in used.parents:
            raise InputError(f"{out} contains {used}, which is to be converted; choose another directory")
    existing = next(parent for parent in target.parents if parent.exists())
    needed, free = plan.bytes_of(plan.pruned), shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(f"{out} needs {needed:,} bytes, but its disk has {free:,} left")
