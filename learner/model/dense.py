"""The dense model that masks are learned on, and the device it is on."""

from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from learner.job import METHODS, Job
from learner.model.remote_code import load_with_its_code
from learner.model.units import Units
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json
from pruned_vllm.formats.companions import DOWNLOADED
from pruned_vllm.formats.geometry import ModelGeometry


def on_device(device: str) -> Accelerator:
    """Accelerate on "cpu", on "cuda" or "cuda:1", or with "auto" on what there is. InputError for other devices."""
    try:
        kind = device if device == "auto" else torch.device(device).type
        if kind == "cuda":
            torch.cuda.set_device(torch.device(device).index or 0)
        accelerator = Accelerator(cpu=kind == "cpu")
    except Exception as error:  # PyTorch raises almost anything here
        raise InputError(f"device {device} cannot be used: {error}") from error
    if kind not in ("auto", accelerator.device.type):
        raise InputError(f"device {device} cannot be used; there is {accelerator.device}")
    return accelerator


def model_directory(name: str) -> Path:
    """The directory `name`, or what the hub's model of that name holds beside its weights. Raises InputError."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", *DOWNLOADED]))
    except (OSError, HFValidationError) as error:
        raise InputError(f"{name!r} is neither a directory nor a model that can be downloaded: {error}") from None


def load_dense(job: Job, device: torch.device | str) -> tuple[nn.Module, PreTrainedTokenizerBase, Units]:
    """The frozen dense model of a job in evaluation mode, its tokenizer and its units.

    Raises:
        InputError: the model cannot be loaded, lacks tensors, is pruned already, or needs code of its own that the job
            does not allow or the method cannot prune.
    """
    try:
        stored = read_json(model_directory(job.model) / "config.json")
        geometry = ModelGeometry.from_config(stored)
        brings_code = not hasattr(transformers, geometry.family.architecture)
        if brings_code:
            _check_code(job, geometry.family.architecture)
        units = Units.of(geometry, tied=job.query_heads == "tied")
        if job.head_sparsity == 0:
            units = units.without("head")
        elif job.head_sparsity and "head" not in units.layers:
            raise InputError(f"{geometry.family.architecture} cannot lose heads; leave out --head-sparsity")
        options = {"dtype": job.dtype, "use_safetensors": True}
        if brings_code:
            model, loading = load_with_its_code(job.model, stored, geometry, **options)
        else:
            model, loading = AutoModelForCausalLM.from_pretrained(
                job.model, output_loading_info=True, trust_remote_code=job.trust_remote_code, **options
            )
        tokenizer = AutoTokenizer.from_pretrained(job.model, trust_remote_code=job.trust_remote_code)
        model = model.to(device).requires_grad_(False).eval()
    except InputError:
        raise
    except Exception as error:  # damaged models end in almost any exception
        raise InputError(
            f"{job.model} cannot be loaded as a causal language model in {job.dtype} on {device}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if loading["missing_keys"]:  # Transformers would go on with random weights
        raise InputError(f"{job.model} lacks tensors of its architecture:", sorted(loading["missing_keys"]))
    return model, tokenizer, units


def _check_code(job: Job, architecture: str) -> None:
    """Whether code that the checkpoint brings may be run, and is of use to the method."""
    if not job.trust_remote_code:
        raise InputError(
            f"Transformers has no {architecture}; if the checkpoint brings code that you trust, "
            "allow it with --trust-remote-code"
        )
    if not METHODS[job.method].takes_remote_code:
        raise InputError(
            f"{job.method} prunes layers as Transformers computes them, and Transformers has no {architecture}; "
            "take --method ddp"
        )
