"""What quantize-pruned reads: a model that convert-pruned wrote, or a stock one."""

import re
from pathlib import Path

from converter.checkpoint import Checkpoint
from converter.plan import Plan, check_source, make_cuts
from converter.quantize.quantization import plan_quantization
from converter.quantize.schemes import Wanted, describe_quantization
from converter.source import Source
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import read_config, without_converted_keys
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.hub import local_input
from pruned_vllm.formats.masked import MASKS_FILE, LayerMasks


def plan_of_converted(path: Path, wanted: Wanted) -> Plan:
    """Decides everything about the quantization of a model before anything is written.

    Args:
        path: directory or hub id.

    Raises:
        InputError: it cannot be read, is quantized already, or has layers that no kernel of the scheme takes.
    """
    directory, hub_id, _ = local_input(path, None)
    source = _read(directory, hub_id)
    check_source(f"{path} cannot be quantized:", source)
    geometry = source.dense.with_layers(source.layers)
    quantization, padded = plan_quantization(wanted, geometry)
    return Plan(
        source=source,
        exact=geometry,
        pruned=padded,
        alignment=1,
        cuts=make_cuts(source, padded, None),
        rms_norm_eps=None,
        dtype=None,
        quantization=quantization,
    )


def _read(directory: Path, hub_id: str | None) -> Source:
    if (directory / MASKS_FILE).exists():
        raise InputError(
            f"{directory} holds masks that are not applied yet: convert-pruned {directory} OUT --quantize SCHEME does "
            "both"
        )
    config = read_config(directory)
    if (found := describe_quantization(config)) is not None or "quantization_config" in config:
        named = f" ({found['scheme']})" if found and found["scheme"] else ""
        raise InputError(f"{directory} is quantized already{named}; quantize the model that it was made from")
    checkpoint = Checkpoint.from_directory(directory)
    geometry = ModelGeometry.from_config(checkpoint.config)
    weights = checkpoint.with_config(without_converted_keys(checkpoint.config, geometry.family))
    pruning = config["pruning"] if isinstance(config.get("pruning"), dict) else {}
    method = str(pruning.get("method"))
    return Source(
        weights=weights,
        method=method if re.fullmatch(r"[\w.+-]+", method) else "none",
        dense=geometry.with_layers(geometry.dense_layers),
        layers=geometry.layers,
        masks=[LayerMasks()] * len(geometry.layers),
        hub_id=hub_id,
        inputs=(directory,),
        companions=directory,
        pruning=pruning,
    )
