"""Learns masks with the chosen method and writes the masked checkpoint."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner import baselines
from learner.data import BlockSampler, tokenize_files
from learner.ddp import DDPSettings, learn_ddp
from learner.evaluate import perplexity
from learner.masking import apply_masks
from learner.units import Units, sparsity
from pruned_vllm.command import atomic_directory
from pruned_vllm.errors import InputError
from pruned_vllm.geometry import ModelGeometry

METHODS = ("ddp", "magnitude", "random")


@dataclass(frozen=True)
class Job:
    """What to learn on what.

    Attributes:
        model: directory or hub id of the dense model.
        data, eval_data: text files to learn from, and to measure perplexity on.
        gqa: "tied" or "independent", see `Units.of`.
        dtype: of the weights while learning ("auto": as stored); masks are float32.
    """

    model: str
    method: str
    ddp: DDPSettings
    data: list[Path] = field(default_factory=list)
    eval_data: list[Path] = field(default_factory=list)
    sequence_length: int = 2048
    gqa: str = "tied"
    device: str = "auto"
    dtype: str = "auto"


def learn(job: Job, out: Path, *, overwrite: bool = False) -> dict:
    """Writes masks, pruning.json and learning.json (settings and results) to the directory `out`; returns the results.

    Raises:
        InputError: the model or the text cannot be used, or `out` exists.
    """
    with atomic_directory(out, overwrite=overwrite, marker="pruning.json") as directory:
        model, tokenizer = _load(job)
        geometry = ModelGeometry.from_config(model.config.to_dict())
        units = Units.of(geometry, job.gqa)
        eval_ids = tokenize_files(tokenizer, job.eval_data) if job.eval_data else None
        started = time.perf_counter()
        if job.method == "ddp":
            if not job.data:
                raise InputError("ddp learns from text; name text files with --data")
            blocks = BlockSampler(tokenize_files(tokenizer, job.data), job.sequence_length, job.ddp.seed)
            values = learn_ddp(model, units, blocks, job.ddp)
        elif job.method == "magnitude":
            values = baselines.magnitude(model, units, job.ddp.sparsity)
        else:
            values = baselines.random(units, job.ddp.sparsity, job.ddp.seed)
        results = {"seconds": time.perf_counter() - started}
        results |= {f"{kind}_sparsity": sparsity(its_values) for kind, its_values in values.items()}
        masks = {name: mask.contiguous() for name, mask in units.to_masks(values).items()}
        if eval_ids is not None:
            results["dense_perplexity"] = perplexity(model, eval_ids)
            with apply_masks(model, {name: mask.to(model.device) for name, mask in masks.items()}):
                results["masked_perplexity"] = perplexity(model, eval_ids)
        save_file(masks, directory / "pruning_masks.safetensors", metadata={"format": "pt"})
        pruning = {
            "format_version": 1,
            "method": job.method,
            "channel_mask_site": "product",
            "base_model": str(Path(job.model).resolve()) if Path(job.model).is_dir() else job.model,
            "lora_adapter": None,
        }
        _write_json(directory / "pruning.json", pruning)
        _write_json(directory / "learning.json", {"job": asdict(job), "results": results})
    return results


def _load(job: Job):
    """The frozen dense model and its tokenizer."""
    device = job.device if job.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.dtype)
        tokenizer = AutoTokenizer.from_pretrained(job.model)
    except (OSError, ValueError) as error:
        raise InputError(f"{job.model} cannot be loaded as a causal language model: {error}") from None
    return model.to(device).requires_grad_(False).eval(), tokenizer


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
