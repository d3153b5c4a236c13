"""What a directory or file is and what its model costs: sizes, what serving needs, ideal speedup. Loads no weight.

    inspection = inspect(Path("out"))
    json.dumps(inspection.as_json())

A converted model tells everything in its config.json and in the headers of its files. Of anything else the importers
read the masks, and what is told is what `convert-pruned --align 1` would write.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from converter.checkpoint import Checkpoint
from converter.dropped_experts import NOT_EXACT
from converter.importers import AUTO, recognise
from converter.inspection_keys import ALIGNMENTS, BATCH_SIZES, CONTEXT
from converter.plan import Plan, make_plan
from converter.quantize.schemes import describe_quantization
from converter.serving_needs import ServingNeeds, serving_needs, widths
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.agreed_config import refusals
from pruned_vllm.formats.config import read_config
from pruned_vllm.formats.cost import layer_bytes, moved_bytes, sequence_flops
from pruned_vllm.formats.family import PRUNED_PREFIX
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import ELEMENT_BYTES, dense_problems
from pruned_vllm.formats.hub import local_input
from pruned_vllm.formats.quantization import Quantization
from pruned_vllm.formats.tensor_check import TensorCheck

METHOD = re.compile(r"[\w.+-]+")  # as in pruning.json; config.json may come from anywhere


@dataclass(frozen=True)
class Inspection:
    """A model.

    Attributes:
        path, kind, format, method, dtypes, notes, unknown: see JSON_KEYS.
        quantization: what `describe_quantization` says; None where weights are floats.
        geometry: as it is, or as convert-pruned would write it without padding.
        dense: before pruning; None where that is not known.
        dense_parameters: of the model before pruning; known in some cases where `dense` is not.
        dense_bytes: of its weights.
        tensor_bytes: of every tensor, by name.
        element_bytes: of a value in the KV cache.
    """

    path: Path
    kind: Literal["converted", "stock", "pruned"]
    format: str | None
    method: str | None
    geometry: ModelGeometry
    dense: ModelGeometry | None
    dense_parameters: int | None
    dense_bytes: int | None
    tensor_bytes: Mapping[str, int]
    element_bytes: int
    dtypes: tuple[str, ...]
    serving: ServingNeeds
    quantization: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        return sum(self.tensor_bytes.values())

    @cached_property
    def layer_bytes(self) -> Mapping[int, int]:
        """By the number of the layer."""
        return layer_bytes(self.tensor_bytes)

    def kv_cache_bytes(self, geometry: ModelGeometry | None) -> int | None:
        """Bytes of a token in the KV cache; None where the geometry is not known."""
        return None if geometry is None else geometry.kv_cache_bytes_per_token(self.element_bytes)

    def ideal_speedup(self, batch_size: int) -> dict[str, float] | None:
        """Ratios of bytes and of operations of one decoding step; None where the dense model is not known."""
        if self.dense is None:
            return None
        dense_flops, pruned_flops = (sequence_flops(side, 1, CONTEXT) for side in (self.dense, self.geometry))
        return {"bytes": self._speedup_over(self.dense, batch_size), "flops": dense_flops / pruned_flops}

    def quantization_speedup(self, batch_size: int) -> float:
        """Ratio of bytes of one decoding step, of the same model with weights as wide as the embedding's over its."""
        return self._speedup_over(self.geometry, batch_size)

    def _speedup_over(self, before: ModelGeometry, batch_size: int) -> float:
        """Ratio of bytes of one decoding step, of a model whose weights are not quantized over this one's."""
        step = batch_size, batch_size * CONTEXT, self.element_bytes
        sizes = None if self.quantization is None else self.tensor_bytes
        states = 2 * batch_size  # read and written
        return moved_bytes(before, *step, None, states) / moved_bytes(self.geometry, *step, sizes, states)

    def as_json(self) -> dict[str, Any]:
        """All of it, under JSON_KEYS."""
        geometry, found = self.geometry, widths(self.geometry)
        return {
            "path": str(self.path),
            "kind": self.kind,
            "format": self.format,
            "method": self.method,
            "model_type": geometry.family.model_type,
            "head_dim": geometry.head_dim,
            "hidden_size": geometry.hidden_size,
            "vocab_size": geometry.vocab_size,
            "dtypes": list(self.dtypes),
            "quantization": self._quantization(),
            "parameters": {"dense": self.dense_parameters, "pruned": geometry.num_parameters},
            "bytes": {"dense": self.dense_bytes, "pruned": self.total_bytes},
            "kv_cache_bytes_per_token": {
                "dense": self.kv_cache_bytes(self.dense),
                "pruned": self.kv_cache_bytes(geometry),
            },
            "layers": [self._layer(index) for index in range(len(geometry.layers))],
            "distinct_shapes": len(set(geometry.layers)),
            "widths": {
                "count": len(found),
                "multiples": {str(step): sum(width % step == 0 for width in found) for step in ALIGNMENTS},
            },
            "serving": asdict(self.serving),
            "ideal_speedup": {str(size): self.ideal_speedup(size) for size in BATCH_SIZES},
            "notes": list(self.notes),
            "unknown": list(self.unknown),
        }

    def _quantization(self) -> dict[str, Any] | None:
        if self.quantization is None:
            return None
        speedups = {str(size): self.quantization_speedup(size) for size in BATCH_SIZES}
        return {**self.quantization, "ideal_speedup": speedups}

    def _layer(self, index: int) -> dict[str, Any]:
        layer = self.geometry.layers[index]
        return {
            "layer": index,
            "num_attention_heads": layer.num_attention_heads,
            "num_key_value_heads": layer.num_key_value_heads,
            "query_heads_per_kv_head": list(layer.query_heads_per_kv_head),
            "intermediate_size": layer.intermediate_size,
            "expert_intermediate_sizes": list(layer.expert_intermediate_sizes),
            "constant_experts": list(layer.constant_experts),
            "skip": layer.skip,
            "parameters": self.geometry.layer_parameters(index),
            "bytes": self.layer_bytes[index],
        }


def inspect(
    path: Path,
    base_model: str | None = None,
    *,
    importer: str = AUTO,
    revision: str | None = None,
    settings: Mapping[str, float | None] | None = None,
) -> Inspection:
    """Finds out about a converted model, a stock one, or anything that an importer reads.

    Args:
        path, base_model, importer, revision, settings: as in `converter.plan.make_plan`. Where it is to be found out,
            a model of the shapes that its config.json says is taken for a stock one: whether there are zeros in it only
            its weights tell.

    Raises:
        InputError: it is none of these, or cannot be read.
    """
    path, _, revision = local_input(path, revision)
    if importer == AUTO:
        config = read_config(path) if (path / "config.json").is_file() else {}
        if _is_converted(config):
            return _of_model(path, "converted")
        if describe_quantization(config) is not None:
            return _of_model(path, "stock")
        importer = recognise(path)
        if importer == "zeros":
            return _of_model(path, "stock")
    plan = make_plan(path, base_model, importer=importer, revision=revision, settings=settings)
    return _of_plan(path, importer, plan)


def _is_converted(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures")
    is_pruned = isinstance(names, list) and any(str(name).startswith(PRUNED_PREFIX) for name in names)
    return is_pruned or isinstance(config.get("pruning"), Mapping)


def _of_model(path: Path, kind: Literal["converted", "stock"]) -> Inspection:
    """Of a directory that vLLM can serve as it is."""
    checkpoint = Checkpoint.from_directory(path)
    config, tensors = checkpoint.config, checkpoint.tensors
    geometry = ModelGeometry.from_config(config)
    quantization = describe_quantization(config)
    is_quantized = quantization is not None
    if is_quantized:
        check = TensorCheck(geometry, Quantization.from_config(config))
        for name, tensor in tensors.items():
            check.accepts(name, tensor.shape, tensor.dtype)
        check.finish(str(path))
    elif problems := dense_problems(tensors, geometry):
        raise InputError(f"The tensors in {path} do not fit its config.json:", problems)
    pruning = config["pruning"] if isinstance(config.get("pruning"), Mapping) else {}
    method, is_exact = pruning.get("method"), pruning.get("exact")
    before = geometry.with_layers(geometry.dense_layers)
    dense_parameters = geometry.num_parameters if kind == "stock" else _dense_parameters(pruning, before)
    gained = is_quantized or not geometry.is_dense
    dense = before if before.num_parameters == dense_parameters and gained else None
    embedding = tensors.get("model.embed_tokens.weight")
    element_bytes = ELEMENT_BYTES.get(embedding.dtype, 2) if embedding is not None else 2
    architecture = (config.get("architectures") or [geometry.family.architecture])[0]
    unknown = []
    if kind == "stock" and not is_quantized:
        unknown.append(
            "whether rows or columns of the weights are zero: convert-pruned --from zeros --dry-run reads all of them"
        )
    elif kind == "converted" and dense is None:
        unknown.append("the sizes before pruning, so the ideal speedup: config.json has them only where layers differ")
    return Inspection(
        path=path,
        kind=kind,
        format="zeros" if kind == "stock" else None,
        method=method if isinstance(method, str) and METHOD.fullmatch(method) else None,
        geometry=geometry,
        dense=dense,
        dense_parameters=dense_parameters,
        dense_bytes=None if dense is None else dense.num_parameters * element_bytes,
        tensor_bytes={name: tensor.num_bytes for name, tensor in tensors.items()},
        element_bytes=element_bytes,
        dtypes=tuple(sorted({tensor.dtype for tensor in tensors.values()})),
        serving=serving_needs(geometry, architecture, quantization),
        quantization=quantization,
        notes=(
            *(f"config.json: {problem}." for problem in refusals(geometry.family, config)),
            *(f"Experts were dropped with their rows of the router; {NOT_EXACT}." for _ in range(is_exact is False)),
        ),
        unknown=tuple(unknown),
    )


def _dense_parameters(pruning: Mapping[str, Any], before: ModelGeometry) -> int | None:
    """The parameters before pruning, as `converter.plan` notes them; config.json may come from elsewhere."""
    sizes = pruning.get("sizes")
    numbers = sizes.get("parameters") if isinstance(sizes, Mapping) else None
    if isinstance(numbers, list) and numbers and type(numbers[0]) is int and numbers[0] > 0:
        return numbers[0]
    return None if before.is_dense else before.num_parameters


def _of_plan(path: Path, importer: str, plan: Plan) -> Inspection:
    config = plan.config()
    embedding = plan.checkpoint.tensors["model.embed_tokens.weight"]
    return Inspection(
        path=path,
        kind="pruned",
        format=importer,
        method=plan.source.method,
        geometry=plan.pruned,
        dense=plan.before,
        dense_parameters=plan.before.num_parameters,
        dense_bytes=plan.bytes_of(plan.before),
        tensor_bytes={name: plan.bytes_of_shapes({name: shape}) for name, shape in plan.pruned.tensor_shapes().items()},
        element_bytes=ELEMENT_BYTES[embedding.dtype],
        dtypes=tuple(sorted({tensor.dtype for tensor in plan.checkpoint.tensors.values()})),
        serving=serving_needs(plan.pruned, config["architectures"][0]),
        notes=plan.source.notes,
    )
