"""What all pruned models share on vLLM: layers at their real size, and a loader that refuses wrong shapes.

A stock decoder layer sizes itself from the config it is given, so a pruned one is the stock class with its own
layer's config (`config.per_layer_config[i]`) instead of the model's. Nothing is built at the dense size first.
"""

from collections.abc import Iterable, Iterator

import torch
import vllm
from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from pruned_vllm.errors import InputError
from pruned_vllm.families import IGNORED_SUFFIXES
from pruned_vllm.geometry import ModelGeometry

# The name puts the records under vLLM's own logging configuration.
logger = init_logger("vllm.pruned_vllm")

TESTED_VLLM = "0.32."


def layer_config(config: PreTrainedConfig, prefix: str) -> PreTrainedConfig:
    """The config of the decoder layer called `prefix` ("model.layers.3"): flat sizes, as stock layers read them."""
    return config.per_layer_config[extract_layer_index(prefix)]


class PrunedForCausalLM:
    """Mixin before a stock `...ForCausalLM` class; the stock class must build layers through `layer_config`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs) -> None:
        _check_version()
        self._geometry = ModelGeometry.from_config(vllm_config.model_config.hf_config.to_dict())
        _check_servable(self._geometry, vllm_config.parallel_config.tensor_parallel_size)
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        # A checkpoint quantized on disk has tensors of its own (scales, packed weights) that only vLLM can judge, and
        # after dummy loading the first call is a weight update, which may bring any subset.
        quantized = getattr(vllm_config.model_config.hf_config, "quantization_config", None) is not None
        self._all_tensors_expected = not quantized and vllm_config.load_config.load_format != "dummy"
        logger.info_once(_summary(self._geometry, vllm_config.model_config.dtype.itemsize))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads a stream of (name, tensor).

        Stock loaders `narrow()` a tensor that is too large and leave the rest of a fused parameter uninitialised
        when one is missing, without a word. Here every tensor is compared with the geometry before it is loaded.

        Raises:
            InputError: after the whole stream was seen, with every wrong shape, missing and unknown tensor.
        """
        loaded = super().load_weights(self._checked(weights))
        self._all_tensors_expected = False  # later calls (weight updates) may bring any subset
        return loaded

    def _checked(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        missing = self._geometry.tensor_shapes()
        optional = {}
        if self._geometry.tie_word_embeddings:  # vLLM skips it then
            optional["lm_head.weight"] = missing["model.embed_tokens.weight"]
        problems = []
        for name, tensor in weights:
            if name.endswith(IGNORED_SUFFIXES):
                continue
            expected = missing.pop(name, None) or optional.get(name)
            if expected is None and self._all_tensors_expected:
                problems.append(f"{name} {list(tensor.shape)}: not a tensor of this model, or given twice")
            elif expected is not None and tensor.is_floating_point() and tuple(tensor.shape) != expected:
                problems.append(f"{name}: the file has {list(tensor.shape)}, config.json says {list(expected)}")
            else:
                yield name, tensor
        if self._all_tensors_expected:
            problems += [f"{name} {list(shape)}: missing" for name, shape in missing.items()]
        if problems:
            raise InputError(
                f"The checkpoint does not fit its config.json in {len(problems)} tensors; nothing is served. "
                "Convert it again with convert-pruned, or restore the config.json that belongs to it:",
                problems,
            )


def _check_version() -> None:
    if not vllm.__version__.startswith(TESTED_VLLM):
        logger.warning_once(
            f"pruned-vllm was tested with vLLM {TESTED_VLLM}x, this is {vllm.__version__}; compare its output with the "
            "masked model's before you rely on it"
        )


def _check_servable(geometry: ModelGeometry, tensor_parallel_size: int) -> None:
    problems = []
    for index, layer in enumerate(geometry.layers):
        where = f"layer {index}"
        if layer.skip:
            problems.append(f"{where} skips {' and '.join(layer.skip)}")
        elif not layer.has_even_groups:
            problems.append(f"{where} has uneven query groups {list(layer.query_heads_per_kv_head)}")
        elif layer.num_key_value_heads % tensor_parallel_size or layer.intermediate_size % tensor_parallel_size:
            problems.append(
                f"{where} has {layer.num_key_value_heads} KV heads and {layer.intermediate_size} FFN channels, which "
                f"--tensor-parallel-size {tensor_parallel_size} does not divide; use 1"
            )
    if problems:
        raise InputError("This release cannot serve the model:", problems)


def _summary(geometry: ModelGeometry, element_bytes: int) -> str:
    dense = geometry.with_layers((geometry.dense,) * len(geometry.layers))
    saved = 1 - geometry.num_parameters / dense.num_parameters
    return (
        f"{geometry.family.pruned_architecture}: {geometry.num_parameters / 1e6:,.1f}M parameters, {saved:.1%} fewer "
        f"than the dense model; KV cache {geometry.kv_cache_bytes_per_token(element_bytes):,} bytes per token, dense "
        f"{dense.kv_cache_bytes_per_token(element_bytes):,}; {len(set(geometry.layers))} distinct layer shapes"
    )
