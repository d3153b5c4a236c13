"""One amount of memory for either server: what its weights leave of it becomes KV cache.

On CPU vLLM is told the size of the KV cache, not of the whole; so the whole is given here, and each server gets the
rest. On a GPU `--gpu-memory-utilization` does the same, and this is used only where the user gives an amount.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import read_config
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import ELEMENT_BYTES, read_headers
from pruned_vllm.formats.weights import find_weight_files

GIB = 2**30
DEFAULT_KV_CACHE_BYTES = 4 * GIB  # of the dense model on CPU
KV_BLOCK_TOKENS = 128  # vLLM's block on CPU; smaller on GPUs
PROCESS_BYTES = 3 * GIB  # what the processes of a server take beside weights and KV cache, compiling included
EXPERT_SCALE_BYTES = 4


@dataclass(frozen=True)
class Share:
    """What the weights of a model take, and what is left for its KV cache; None: vLLM chooses."""

    weights_bytes: int
    kv_cache_bytes: int | None


def weights_bytes(directory: Path, geometry: ModelGeometry, config: Mapping[str, Any], element_bytes: int) -> int:
    """Bytes of the weights in memory: as many elements as the geometry has; as stored where they are quantized."""
    if config.get("quantization_config"):
        return sum(file.stat().st_size for file in find_weight_files(directory))
    return geometry.num_parameters * element_bytes


def loaded_bytes(directory: Path, element_bytes: int) -> dict[str, int] | None:
    """Bytes of every tensor of a quantized model in memory, by name; None for a model whose weights are floats.

    Floats are loaded in the dtype that is served, of `element_bytes` bytes, others as they are stored; the scales of
    routed experts in float32.
    """
    if "quantization_config" not in read_config(directory):
        return None
    loaded = {}
    for name, tensor in read_headers(directory).items():
        stored = ELEMENT_BYTES.get(tensor.dtype, element_bytes)
        served = EXPERT_SCALE_BYTES if ".experts." in name and name.endswith("_scale") else element_bytes
        loaded[name] = (tensor.span[1] - tensor.span[0]) * served // stored
    return loaded


def share_memory(
    memory_bytes: int, weights: Mapping[str, int], bytes_per_token: Mapping[str, int], max_model_len: int
) -> dict[str, Share]:
    """The share of each model, by its name.

    Raises:
        InputError: a model's weights and the KV cache of one sequence of `max_model_len` do not fit.
    """
    shares, problems = {}, []
    for name, weight in weights.items():
        left = memory_bytes - weight
        # A sequence takes whole blocks, and vLLM keeps one for itself.
        sequence = (-(-max_model_len // KV_BLOCK_TOKENS) + 1) * KV_BLOCK_TOKENS * bytes_per_token[name]
        if left < sequence:
            problems.append(
                f"--{name}: the weights take {weight / GIB:.2f} GiB and the keys and values of one sequence of "
                f"{max_model_len} tokens {sequence / GIB:.2f} GiB; give at least {(weight + sequence) / GIB:.2f}, or a "
                "smaller --max-model-len"
            )
        shares[name] = Share(weight, left)
    if problems:
        raise InputError(f"--memory {memory_bytes / GIB:.2f} GiB is too small:", problems)
    return shares


def both_fit(memory_bytes: int, available_bytes: int) -> bool:
    """Whether two such servers can live at the same time in what the machine has left.

    Raises InputError when not even one can.
    """
    needed = memory_bytes + PROCESS_BYTES
    if needed > available_bytes:
        raise InputError(
            f"a server takes {memory_bytes / GIB:.1f} GiB for weights and KV cache and about {PROCESS_BYTES / GIB:.0f} "
            f"GiB beside; the machine has {available_bytes / GIB:.1f} GiB left: free some, or give a smaller --memory"
        )
    return 2 * needed <= available_bytes
