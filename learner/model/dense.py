"""The dense model that masks are learned on, and the device it is on."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator, PartialState
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    Mxfp4Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from learner.job import METHODS, Job
from learner.model.placement import fast_dtype, loading_options, placed
from learner.model.remote_code import load_with_its_code
from learner.model.units import Units
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json
from pruned_vllm.formats.agreed_config import check_agreement
from pruned_vllm.formats.config import dense_geometry, is_packed, read_config
from pruned_vllm.formats.dense_tensors import as_converted
from pruned_vllm.formats.fingerprint import Fingerprint
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import StoredTensor, dense_problems, read_headers
from pruned_vllm.formats.hub import MODEL_FILES, model_directory
from pruned_vllm.formats.masked import site_problems
from pruned_vllm.formats.wrappers import TEXT_PREFIXES, wrapped_architecture

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def on_device(device: str) -> Accelerator:
    """Accelerate on "cpu", on "cuda" or "cuda:1", or with "auto" on what there is. InputError for other devices."""
    try:
        kind = device if device == "auto" else torch.device(device).type
        if kind == "cuda":
            torch.cuda.set_device(torch.device(device).index or 0)
        accelerator = Accelerator(cpu=kind == "cpu")
    except Exception as error:  # PyTorch raises many kinds
        raise InputError(f"device {device} cannot be used: {error}") from error
    if kind not in ("auto", accelerator.device.type):
        raise InputError(f"device {device} cannot be used; there is {accelerator.device}")
    return accelerator


@dataclass(frozen=True)
class DenseModel:
    """The dense model of a job.

    Attributes:
        model: frozen, in evaluation mode.
        device: where it computes.
        units: what of it may be pruned.
        geometry: its sizes.
        directory: where it lies. Config, weights and tokenizer were all read from it.
        commit: of the snapshot that the directory holds; None if the model is not from the hub.
        fingerprint: of the directory.
        stored_dtype: of the weights on disk; the model has another where that was asked for, or is faster here.
    """

    model: PreTrainedModel
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    units: Units
    geometry: ModelGeometry
    directory: Path
    commit: str | None
    fingerprint: Fingerprint
    stored_dtype: torch.dtype


@dataclass(frozen=True)
class CheckedModel:
    """What is known of a model before its weights are read."""

    directory: Path
    commit: str | None
    stored: dict[str, Any]
    geometry: ModelGeometry
    units: Units
    tensors: dict[str, StoredTensor]
    fingerprint: Fingerprint

    @property
    def brings_code(self) -> bool:
        return not hasattr(transformers, self.geometry.family.architecture)

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.stored, self.tensors)


def dtype_of(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """That of weights in files, as Transformers finds it: what config.json says, or else what most of them are."""
    said = config.get("dtype") or config.get("torch_dtype")
    most = Counter(tensor.dtype for tensor in tensors.values()).most_common(1)[0][0]
    return getattr(torch, said.removeprefix("torch.")) if said else DTYPES[most]


def load_dense(
    job: Job,
    device: torch.device | str,
    place: str = "whole",
    accelerator: Accelerator | PartialState | None = None,
    checked: CheckedModel | None = None,
) -> DenseModel:
    """Loads the dense model of a job.

    Args:
        device: where it computes.
        place: one of PLACES.
        accelerator: the processes that load it together; None is one.
        checked: what `check_dense` returned. Processes call that first, and go on when it went well in all: where
            weights are sharded, they wait for each other here.

    Raises:
        InputError: the model cannot be loaded, could not be served, lacks tensors, is pruned already, or needs code of
            its own that the job does not allow or the method cannot prune.
    """
    if accelerator and not accelerator.is_main_process:
        disable_progress_bar()
    checked = checked or check_dense(job, place)
    with _loading(job, device):
        options = loading_options(place, accelerator) if accelerator else {}
        dtype = fast_dtype(checked.dtype, device) if job.dtype == "auto" else job.dtype
        model, loading = _read_weights(job, checked, dtype, options)
        tokenizer = AutoTokenizer.from_pretrained(
            checked.directory, config=model.config, trust_remote_code=job.trust_remote_code
        )
        model.requires_grad_(False).eval()
        zeros = {name for name, tensor in checked.tensors.items() if tensor.is_zeros}
        if missing := set(loading["missing_keys"]) - zeros:  # Transformers would go on with random weights
            raise InputError(f"{job.model} lacks tensors of its architecture:", sorted(missing))
        for name in zeros:
            model.get_parameter(name).zero_()
        model = placed(model, place, device)
    return DenseModel(
        model,
        torch.device(device),
        tokenizer,
        checked.units,
        checked.geometry,
        checked.directory,
        checked.commit,
        checked.fingerprint,
        checked.dtype,
    )


@contextmanager
def _loading(job: Job, device: torch.device | str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # damaged models raise many kinds
        raise InputError(
            f"{job.model} cannot be loaded as a causal language model in {job.dtype} on {device}: "
            f"{type(error).__name__}: {error}"
        ) from error


def check_dense(job: Job, place: str) -> CheckedModel:
    """Refuses what can be refused before weights are read.

    The fingerprint is older than they are, so that what changes later is noticed.

    Raises:
        InputError: as `load_dense` does.
    """
    with _loading(job, job.device):
        directory, commit = model_directory(job.model, ["config.json"], job.revision)
        stored = read_config(directory)
        geometry = dense_geometry(directory, stored)
        check_agreement(f"{job.model} could not be served once it is pruned", geometry.family, stored)
        if problems := site_problems(geometry.family, getattr(job.settings, "channel_mask_site", "product")):
            raise InputError(f"{job.method} cannot prune {job.model}:", problems)
        if not hasattr(transformers, geometry.family.architecture):
            _check_code(job, geometry.family.architecture)
            if place == "sharded":
                raise InputError(
                    f"code that {job.model} brings cannot load a part of the weights; take --weights whole or spread"
                )
        units = _units(job, geometry)
        if job.head_sparsity == 0:
            units = units.without("head")
        elif job.head_sparsity and "head" not in units.layers:
            raise InputError(f"{geometry.family.architecture} cannot lose heads; leave out --head-sparsity")
        directory, _ = model_directory(job.model, MODEL_FILES + ["*.py"] * job.trust_remote_code, commit)
        stored, tensors = as_converted(stored, read_headers(directory))
        geometry = ModelGeometry.from_config(stored)
        if problems := dense_problems(tensors, geometry):
            raise InputError(f"The weights in {directory} are not those of its config.json:", problems)
        return CheckedModel(directory, commit, stored, geometry, units, tensors, Fingerprint.from_directory(directory))


def _read_weights(
    job: Job, checked: CheckedModel, dtype: torch.dtype | str, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what Transformers says about loading it; `options` are for from_pretrained."""
    directory, options = checked.directory, options | {"dtype": dtype, "use_safetensors": True}
    if checked.brings_code:
        return load_with_its_code(str(directory), checked.stored, checked.geometry, **options)
    config = CONFIG_MAPPING[checked.geometry.family.model_type].from_dict(checked.stored)
    if is_packed(as_stored := read_json(directory / "config.json")):
        config.quantization_config = as_stored["quantization_config"]
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    if wrapped_architecture(directory):  # of a multimodal model, the language model alone is built
        options["key_mapping"] = {f"^{re.escape(prefix)}": text for prefix, text in TEXT_PREFIXES.items()}
    model, loading = AutoModelForCausalLM.from_pretrained(
        directory, config=config, output_loading_info=True, trust_remote_code=job.trust_remote_code, **options
    )
    if "key_mapping" in options or "quantization_config" in options:
        # else save_pretrained would put the prefixes back, or names of blocks
        vars(model)["_weight_conversions"] = []
    return model, loading


def _units(job: Job, geometry: ModelGeometry) -> Units:
    """The units that the method prunes. Raises InputError where the model has none."""
    method, units = METHODS[job.method], Units.from_geometry(geometry, tied=job.query_heads == "tied")
    if job.head_sparsity and "head" not in method.kinds:
        raise InputError(f"{job.method} removes no heads; leave out --head-sparsity")
    for kind in set(units.layers) - set(method.kinds):
        units = units.without(kind)
    if not units.layers:
        raise InputError(f"{job.method} removes whole experts, and {job.model} has none; choose another --method")
    return units


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
