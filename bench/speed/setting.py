"""What a result must say beside its figures: the two models, versions of the libraries, and the machine."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from pruned_vllm.common.environment import cpu_features, cpu_name
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import read_headers
from pruned_vllm.formats.layer import LayerGeometry

GIB = 2**30


def read_models(
    dense_dir: Path, pruned_dir: Path, max_model_len: int, load_format: str
) -> tuple[ModelGeometry, ModelGeometry]:
    """Both geometries.

    Raises:
        InputError: a directory is no model, the two cannot be compared, or a case does not fit into their context.
    """
    problems, geometries = [], []
    for option, directory in (("--dense", dense_dir), ("--pruned", pruned_dir)):
        try:
            config = read_json(directory / "config.json")
            geometries.append(ModelGeometry.from_config(config))
            longest = config.get("max_position_embeddings") or max_model_len
            if longest < max_model_len:
                problems.append(
                    f"{option} {directory}: max_position_embeddings is {longest} but {max_model_len} tokens of context "
                    "are needed; choose shorter --cases or a smaller --max-model-len"
                )
            if load_format == "auto":
                read_headers(directory)
        except (OSError, ValueError) as error:
            problems.append(f"{option} {directory}: {error}")
    if len(geometries) == 2:
        dense, pruned = geometries
        if dense.vocab_size != pruned.vocab_size:
            problems.append(f"--dense has vocab_size {dense.vocab_size}, --pruned has {pruned.vocab_size}")
        if dense.family != pruned.family:
            problems.append(f"--dense is a {dense.family.model_type}, --pruned a {pruned.family.model_type} model")
    if problems:
        raise InputError("These models cannot be timed against each other:", problems)
    return dense, pruned


def describe_model(directory: Path, geometry: ModelGeometry, element_bytes: int) -> dict:
    bytes_per_token = geometry.kv_cache_bytes_per_token(element_bytes)
    return {
        "path": str(directory),
        "parameters": geometry.num_parameters,
        "distinct_layer_shapes": len(set(geometry.layers)),
        "kv_cache_bytes_per_token": bytes_per_token,
        "kv_cache_tokens_per_gib": GIB // bytes_per_token,
        "layers": [describe_layer(layer) for layer in geometry.layers],
    }


def describe_layer(layer: LayerGeometry) -> dict:
    """Heads and widths of one layer; experts only where there are some."""
    described: dict[str, Any] = {
        "num_attention_heads": layer.num_attention_heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "intermediate_size": layer.intermediate_size,
    }
    if layer.expert_intermediate_sizes:
        described["expert_intermediate_sizes"] = list(layer.expert_intermediate_sizes)
    return described


def describe_versions() -> dict:
    import torch
    import transformers
    import vllm

    return {
        "pruned-vllm": importlib.metadata.version("pruned-vllm"),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def describe_hardware() -> dict:
    import psutil
    from vllm.platforms import current_platform

    return {
        "device": current_platform.get_device_name(),
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "environment": {
            name: os.environ[name]
            for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU", "OMP_NUM_THREADS")
            if name in os.environ
        },
    }
