"""Learns masks with the chosen method and writes the masked checkpoint."""

import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner import baselines
from learner.data import BlockSampler, tokenize_files
from learner.ddp import learn_ddp
from learner.evaluate import EVAL_BLOCK_SIZE, perplexity
from learner.masking import apply_masks
from learner.settings import METHODS, Job
from learner.units import Units, sparsity
from pruned_vllm.command import atomic_directory
from pruned_vllm.errors import InputError
from pruned_vllm.files import read_json, write_json
from pruned_vllm.geometry import ModelGeometry
from pruned_vllm.masked_checkpoint import FORMAT_VERSION, MASKS_FILE, PRUNING_FILE

RESULTS_FILE = "learning.json"


def is_learned(directory: Path) -> bool:
    """Whether `directory` holds masks that `learn` wrote, and no weights, which it never writes."""
    return (directory / RESULTS_FILE).is_file() and not (directory / "config.json").exists()


def learn(job: Job, out: Path, *, overwrite: bool = False) -> dict[str, float]:
    """Writes masks, pruning.json and learning.json (settings and results) to the directory `out`; returns the results.

    Results: learning_seconds, head_sparsity, channel_sparsity and expert_sparsity (shares of the units that masks were
    learned for), and with eval_data dense_perplexity and masked_perplexity.

    Raises:
        InputError: the model or the text cannot be used, learning diverges, or `out` exists.
    """
    if job.method not in METHODS:
        raise InputError(f"method {job.method!r} is unknown; choose one of {', '.join(METHODS)}")
    if job.method == "ddp" and not job.data:
        raise InputError("ddp learns from text; name text files with --data")
    with atomic_directory(out, overwrite=overwrite, is_ours=is_learned) as directory:
        model, tokenizer, units = _load(job)
        target = {kind: job.sparsity_of(kind) for kind in units.layers}
        results = {}
        if job.eval_data:
            eval_ids = tokenize_files(tokenizer, job.eval_data)
            if len(eval_ids) < EVAL_BLOCK_SIZE:
                raise InputError(f"--eval-data has {len(eval_ids)} tokens; at least {EVAL_BLOCK_SIZE} are scored")
            results["dense_perplexity"] = perplexity(model, eval_ids)
        blocks = None
        if job.method == "ddp":
            blocks = BlockSampler(tokenize_files(tokenizer, job.data), job.ddp.sequence_length, job.seed)

        started = time.perf_counter()
        if job.method == "ddp":
            values = learn_ddp(model, units, blocks, target, job.ddp, job.seed)
        elif job.method == "magnitude":
            values = baselines.magnitude(model, units, target)
        else:
            values = baselines.random(units, target, job.seed)
        results["learning_seconds"] = time.perf_counter() - started

        masks = {name: mask.contiguous() for name, mask in units.to_masks(values).items()}
        save_file(masks, directory / MASKS_FILE, metadata={"format": "pt"})
        results |= {f"{kind}_sparsity": sparsity(unit_values) for kind, unit_values in values.items()}
        if job.eval_data:
            with apply_masks(model, {name: mask.to(model.device) for name, mask in masks.items()}):
                results["masked_perplexity"] = perplexity(model, eval_ids)
        pruning = {
            "format_version": FORMAT_VERSION,
            "method": job.method,
            "channel_mask_site": "product",
            "base_model": str(Path(job.model).resolve()) if Path(job.model).is_dir() else job.model,
            "lora_adapter": None,
        }
        write_json(directory / PRUNING_FILE, pruning)
        write_json(directory / RESULTS_FILE, {"job": asdict(job), "results": results})
    return results


def _load(job: Job):
    """The frozen dense model, its tokenizer and its units."""
    directory, device = Path(job.model), job.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        config = directory if directory.is_dir() else Path(hf_hub_download(job.model, "config.json")).parent
        geometry = ModelGeometry.from_config(read_json(config / "config.json"))
        if not hasattr(transformers, geometry.family.architecture):
            raise InputError(
                f"Transformers has no {geometry.family.architecture}, and code from a checkpoint is never run; learn "
                "the masks elsewhere and write them in the format of pruning_masks.safetensors"
            )
        units = Units.of(geometry)
        if job.head_sparsity == 0:
            units = units.without("head")
        elif job.head_sparsity and "head" not in units.layers:
            raise InputError(f"{geometry.family.architecture} cannot lose heads; leave out --head-sparsity")
        model, loading = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=job.dtype, use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(job.model)
        model = model.to(device).requires_grad_(False).eval()
    except InputError:
        raise
    except Exception as error:  # damaged models and unknown devices end in almost any exception
        raise InputError(
            f"{job.model} cannot be loaded as a causal language model in {job.dtype} on {device}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if loading["missing_keys"]:  # Transformers would go on with random weights
        raise InputError(f"{job.model} lacks tensors of its architecture:", sorted(loading["missing_keys"]))
    return model, tokenizer, units
