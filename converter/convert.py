"""Writes a converted checkpoint from a plan."""

import shutil
from collections.abc import Callable
from pathlib import Path

from converter.plan import Plan
from converter.streaming import write_tensors
from converter.table import model_card
from converter.verify import check_conversion
from pruned_vllm.common.directories import atomic_directory
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import write_json
from pruned_vllm.formats.companions import copy_companions

WRITER = "convert-pruned"  # whose output only this command replaces


def convert(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    verify: bool = False,
    threads: int | None = None,
    writer: str = WRITER,
    card: Callable[[Plan], str] = model_card,
) -> list[str]:
    """Writes the converted model to the directory `out`, which appears whole or not at all.

    Args:
        plan: from `converter.plan.make_plan`.
        max_shard_bytes: size of a file of weights.
        verify: compare what was written with the masked model before `out` appears, see `converter.verify`.
        threads: that read, fold and write; None: as the cores suggest. The result is the same with any number.
        writer: the command that may replace `out` later.
        card: makes the model card.

    Returns:
        sentences about the comparison, if there was one.

    Raises:
        InputError: `out` exists, holds the masks or the weights, there is too little disk, a value overflows, an input
            cannot be read, or what was written computes something else.
        OSError: the disk cannot be written.
    """
    _check_place(plan, out)
    with atomic_directory(out, writer=writer, overwrite=overwrite) as directory:
        write_tensors(plan, directory, max_shard_bytes, threads)
        write_json(directory / "config.json", plan.config())
        found = _verify(plan, directory) if verify else []
        if plan.source.companions is not None:
            copy_companions(plan.source.companions, directory)
        (directory / "README.md").write_text(card(plan), encoding="utf-8")
    return found


def _verify(plan: Plan, directory: Path) -> list[str]:
    if plan.quantization is None:
        return [check_conversion(plan, directory)]
    from converter.quantize.verify import check_rounding  # an import of seconds

    # What neither cuts nor casts has nothing to compare before it is rounded.
    before = [f"Before rounding: {check_conversion(plan, directory)}"] if plan.cuts or plan.dtype else []
    return [*before, *check_rounding(plan, directory)]


def _check_place(plan: Plan, out: Path) -> None:
    target = out.resolve()
    for used in {path.resolve(): None for path in plan.source.inputs}:
        if target == used or target in used.parents:
            raise InputError(f"{out} contains {used}, which is to be converted; choose another directory")
    existing = next(parent for parent in target.parents if parent.exists())
    needed, free = sum(plan.written.sizes.values()), shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(f"{out} needs {needed:,} bytes, but its disk has {free:,} left")
