"""Where the weights of a dense model are while masks are learned on it, and in which dtype; PLACES in learner/job.py.

- whole: on the device of every process.
- sharded: every process holds a part of every layer, and all together gather a layer when they compute it (FSDP2).
  Transformers reads no more of the files than a process keeps, so that no process ever holds the model.
- spread: one process, whose devices hold some layers each.
- offloaded: in CPU memory; a layer comes to the device when it is computed, and again in the backward pass.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator, PartialState, cpu_offload
from accelerate.utils import DistributedType
from torch import nn
from transformers import DistributedConfig, PreTrainedModel

from learner.model.masking import masks_activations
from pruned_vllm.common.environment import multiplies_fast
from pruned_vllm.common.errors import InputError


def place_of(weights: str | None, accelerator: Accelerator, places: Sequence[str]) -> str:
    """Which of `places` a run takes. Raises InputError where it cannot have what was asked for."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise InputError(
            f"accelerate is set up for {kind.value}; learn-masks shards weights with FSDP: choose that in `accelerate "
            "config`, or multi-GPU"
        )
    if weights is None:
        is_sharded = kind == DistributedType.FSDP and accelerator.num_processes > 1 and "sharded" in places
        return "sharded" if is_sharded else "whole"
    if weights == "spread" and accelerator.num_processes > 1:
        raise InputError(
            f"--weights spread is for one process with several devices, and there are {accelerator.num_processes} "
            "processes; start learn-masks without a launcher, or take --weights sharded"
        )
    if weights == "sharded" and accelerator.num_processes == 1:
        return "whole"  # so that a run of several processes can be resumed by one
    if weights == "sharded":
        check_sharding_on(accelerator.device.type)
    return weights


def check_sharding_on(device: str) -> None:
    """Raises InputError on the CPU of a machine with GPUs: Transformers would bring sharded weights there."""
    if device == "cpu" and torch.accelerator.is_available():
        raise InputError(
            "--weights sharded on the CPU of a machine with GPUs: hide these, with CUDA_VISIBLE_DEVICES= in front"
        )


def loading_options(place: str, accelerator: Accelerator | PartialState) -> dict[str, Any]:
    """What from_pretrained needs so that the weights come to their place."""
    if place == "spread":
        return {"device_map": "balanced"}  # "auto" would fill the first device, and leave no room for activations
    if place != "sharded":
        return {}
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # else Transformers would leave all processes but one empty
    plugin = getattr(getattr(accelerator, "state", None), "fsdp_plugin", None)
    offload = plugin is not None and bool(plugin.cpu_offload)
    config = DistributedConfig(fsdp_size=accelerator.num_processes, fsdp_cpu_offload=offload)
    return {"distributed_config": config}


def placed(model: PreTrainedModel, place: str, device: torch.device | str) -> PreTrainedModel:
    """`model`, which was loaded with `loading_options`, at its place."""
    if place == "sharded":
        for layer in model.model.layers:
            experts = getattr(layer.mlp, "experts", None)
            if experts is not None and not masks_activations(experts):
                raise InputError(
                    f"the experts of {type(model).__name__} cannot be masked where weights are sharded, because "
                    "Transformers does not group their tokens here; take --weights whole or spread"
                )
        return model
    if place == "offloaded":
        return cpu_offload(model, execution_device=torch.device(device))
    return model if place == "spread" else model.to(device)


def fast_dtype(stored: torch.dtype, device: torch.device | str) -> torch.dtype:
    """What to compute in if nobody asked: that of the weights, or float32 on CPUs where that is faster."""
    on_cpu = torch.device(device).type == "cpu"
    return torch.float32 if on_cpu and not multiplies_fast(str(stored).removeprefix("torch.")) else stored


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Not `model.to(dtype)`, which would round the frequencies of rotary embeddings too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
