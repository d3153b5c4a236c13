"""learn-masks --plan: what a run would take in memory, and whether it fits. Reads config.json alone. Pure Python."""

import itertools
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from learner.job import Job
from learner.memory import Needs, needs, places
from learner.settings import TrainingSettings, with_sequence_length
from pruned_vllm.common.environment import gpu_memory, multiplies_fast
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import dense_geometry, read_config
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.hub import model_directory

HERE = "here"  # the devices of this machine
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
SPECIFICATION = re.compile(r"(?:(\d+)x)?(\d+(?:\.\d+)?)(GB|GiB)", re.IGNORECASE)


@dataclass(frozen=True)
class Devices:
    """What a run would be on: so many of `memory` bytes each."""

    number: int
    memory: float
    are_gpus: bool = True

    @classmethod
    def parse(cls, text: str) -> "Devices":
        """Of "8x80GB", "80GB", "2x24GiB" or "here". Raises InputError for other text."""
        if text == HERE:
            processes = int(os.environ.get("WORLD_SIZE", 1))
            if found := gpu_memory():
                return cls(len(found), min(found))
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return cls(processes, total / processes, are_gpus=False)
        match = SPECIFICATION.fullmatch(text)
        if not match or match[1] == "0":
            raise InputError(f"--plan {text}: say how many devices of which memory, such as 8x80GB, 80GB or 2x24GiB")
        return cls(int(match[1] or 1), float(match[2]) * (1 << 30 if match[3].lower() == "gib" else 10**9))

    def __str__(self) -> str:
        kind = "GPU" if self.are_gpus else "process on the CPU"
        plural = "GPUs" if self.are_gpus else "processes on the CPU"
        return f"{self.number} {kind if self.number == 1 else plural} with {_gigabytes(self.memory)}"


def plan(job: Job, devices: Devices) -> str:
    """A few lines: what the run takes on each device, by purpose, whether it fits, and if not, what would.

    Raises:
        InputError: the model has no config.json that can be read, or is none that masks are learned for.
    """
    directory, _ = model_directory(job.model, ["config.json"], job.revision)
    config = read_config(directory)
    geometry, dtype = dense_geometry(Path(job.model), config), _dtype(job, config, devices)
    settings = with_sequence_length(job.settings, config.get("max_position_embeddings"))
    job = replace(job, settings=settings, weights=job.weights or "whole")
    run = _Run(geometry, job, BYTES[dtype], devices)
    found = run.needs()
    lines = [
        f"{job.model}: {geometry.num_parameters / 1e9:.3g} billion parameters in {dtype}, {job.method} with "
        f"--weights {job.weights}",
        f"{devices}{run.batch()}",
        "",
        *(f"  {name:<28}{_gigabytes(size):>10}" for name, size in found.device.items()),
        f"  {'on each device':<28}{_gigabytes(found.total):>10}",
    ]
    lines += [
        f"  {'CPU memory: ' + name:<28}{_gigabytes(size):>10} for each process" for name, size in found.host.items()
    ]
    lines.append("")
    if found.total <= devices.memory:
        return "\n".join([*lines, f"It fits: {_gigabytes(found.total)} of {_gigabytes(devices.memory)}."])
    lines.append(f"It does not fit: {_gigabytes(found.total)}, and there are {_gigabytes(devices.memory)}.")
    fitting = [(other, options) for other, options in run.others() if other.needs().total <= devices.memory]
    if not fitting:
        return "\n".join([*lines, "Nor does it in another way on these devices: take more of them, or larger ones."])
    fewest = min(len(options) for _, options in fitting)
    lines += ["It would with"]
    lines += [
        f"  {' '.join(options)}  ({_gigabytes(other.needs().total)})"
        for other, options in fitting
        if len(options) == fewest
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Run:
    geometry: ModelGeometry
    job: Job
    element_bytes: int
    devices: Devices

    @property
    def sequences(self) -> int:
        """In one forward pass."""
        settings = self.job.settings
        if not isinstance(settings, TrainingSettings):
            return 1
        processes = 1 if self.job.weights in ("spread", "offloaded") else self.devices.number
        return min(settings.micro_batch_size, -(-settings.batch_size // processes))

    def needs(self) -> Needs:
        tokens = self.sequences * getattr(self.job.settings, "sequence_length", 0)
        return needs(self.geometry, self.job, self.element_bytes, tokens, self.devices.number, self.devices.are_gpus)

    def batch(self) -> str:
        length = getattr(self.job.settings, "sequence_length", 0)
        return f", {self.sequences} x {length} tokens in a forward pass" if length else ""

    def others(self) -> list[tuple["_Run", list[str]]]:
        """Runs that learn the same, and the options that make them."""
        settings, found = self.job.settings, []
        if not isinstance(settings, TrainingSettings):
            variants: list[tuple[Any, list[str]]] = [(settings, [])]
        else:
            sizes = {settings.micro_batch_size, *(size for size in (4, 1) if size < settings.micro_batch_size)}
            variants = [
                (
                    replace(settings, micro_batch_size=size, gradient_checkpointing=again),
                    [f"--micro-batch-size {size}"] * (size != settings.micro_batch_size)
                    + ["--gradient-checkpointing"] * (again != settings.gradient_checkpointing),
                )
                for size, again in itertools.product(
                    sorted(sizes, reverse=True), {settings.gradient_checkpointing, True}
                )
            ]
        for place, (variant, options) in itertools.product(places(self.job, self.devices.number), variants):
            if place == "offloaded" and not variant.gradient_checkpointing:
                continue
            job = replace(self.job, weights=place, settings=variant)
            found.append((replace(self, job=job), [f"--weights {place}"] * (place != self.job.weights) + options))
        return found


def _dtype(job: Job, config: dict[str, Any], devices: Devices) -> str:
    """The same as learner/model/placement.py, as far as config.json says it."""
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    dtype = job.dtype.removeprefix("torch.")
    if dtype == "auto":
        dtype = stored if devices.are_gpus or multiplies_fast(stored) else "float32"
    if dtype not in BYTES:
        raise InputError(f"--dtype {dtype} is unknown; choose one of {', '.join(BYTES)}")
    return dtype


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
