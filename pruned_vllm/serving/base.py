"""What all pruned models share on vLLM: layers at their real size, and a loader that refuses wrong shapes.

Everything around the decoder layers is a stock model's: embedding, final norm, lm_head and logits. It is built without
layers and gets those that `layer.py` builds. No layer is built at the dense size first.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import vllm
from torch import nn
from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.utils import make_layers, maybe_prefix
from vllm.sequence import IntermediateTensors

from pruned_vllm.common.padding import take_or_zero
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.tensor_check import TensorCheck
from pruned_vllm.formats.tensors import canonical_name
from pruned_vllm.serving.layer import StockLayer, build_layer
from pruned_vllm.serving.layout_changes import layout_changes, module_names
from pruned_vllm.serving.model_layout import model_layout
from pruned_vllm.serving.quantization import check_quantized
from pruned_vllm.serving.rank_failure import failing_together
from pruned_vllm.serving.vocabulary import build_vocabulary, is_shared_evenly, padding_size

if TYPE_CHECKING:
    from vllm.model_executor.models.llama import LlamaForCausalLM as StockModel  # for example
else:
    StockModel = nn.Module

# The name puts the records under vLLM's own logging configuration.
logger = init_logger("vllm.pruned_vllm")

TESTED_VLLM = "0.32."
PARTITION = "VLLM_PP_LAYER_PARTITION"

# What safetensors calls the dtypes that checkpoints have.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
}


class PrunedForCausalLM(StockModel):
    """First base of the served classes; the second is the stock model that a family is served with."""

    stock_layer: StockLayer

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        _check_version()
        config, layout = vllm_config.model_config.hf_config, model_layout(vllm_config)
        geometry = layout.geometry
        # The fewest tokens that vLLM's layers accept, where those of the vocabulary are built anew.
        smallest = (
            {} if is_shared_evenly(geometry.vocab_size, layout.ranks) else {"vocab_size": padding_size(layout.ranks)}
        )
        with _without_layers(config, **smallest):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        if smallest:
            build_vocabulary(self, vllm_config, prefix)
        self.model.start_layer, self.model.end_layer, self.model.layers = make_layers(
            len(geometry.layers),
            partial(build_layer, vllm_config, layout, self.stock_layer),
            prefix=maybe_prefix(prefix, "model.layers"),
        )
        check_quantized(self, vllm_config.model_config.quantization, layout)
        self._geometry = geometry
        self._quantization = layout.quantization
        self._layout_changes = layout_changes(layout)
        self._module_names = module_names(geometry)
        # After dummy loading the first call is a weight update, which may bring any subset.
        self._all_tensors_expected = vllm_config.load_config.load_format != "dummy"
        logger.info_once(_summary(geometry, vllm_config.model_config.dtype.itemsize))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """What the stock class does; see `failing_together` for errors."""
        with failing_together():
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """What the stock class does; see `failing_together` for errors."""
        with failing_together():
            return super().compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads a stream of (name, tensor).

        Every tensor is compared with config.json before it is loaded (formats/tensor_check.py says why).

        Raises:
            InputError: after the whole stream was seen, with every tensor that is wrong, missing or unknown.
        """
        loaded = super().load_weights(self._laid_out(self._checked(weights)))
        self._all_tensors_expected = False  # later calls (weight updates) may bring any subset
        return loaded

    def _laid_out(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Brings heads and channels into the order of the tensor-parallel ranks, with zeros for padding, and experts
        to the names of their modules."""
        for name, tensor in weights:
            if name in self._layout_changes:
                tensor = take_or_zero(tensor, *self._layout_changes[name])
            module, _, part = name.rpartition(".")
            yield f"{self._module_names[module]}.{part}" if module in self._module_names else name, tensor

    def _checked(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        check = TensorCheck(self._geometry, self._quantization, self._all_tensors_expected)
        for stored_name, tensor in weights:
            name = canonical_name(stored_name)
            if check.accepts(name, tuple(tensor.shape), DTYPES.get(tensor.dtype, str(tensor.dtype))):
                yield name, tensor
        check.finish()

    @property
    def lora_manager(self) -> Any:
        """vLLM's manager of LoRA adapters, which vLLM sets where there is one."""
        return self._lora_manager

    @lora_manager.setter
    def lora_manager(self, manager: Any) -> None:
        from pruned_vllm.serving.lora import checking_manager  # here, so that a model without adapters needs no LoRA

        self._lora_manager = checking_manager(manager, self._geometry)


@contextmanager
def _without_layers(config: PreTrainedConfig, **values: int) -> Iterator[None]:
    """While it lasts, a model is built without layers, and with these values in its config."""
    values["num_hidden_layers"] = 0
    before = {key: getattr(config, key) for key in values}
    partition = os.environ.pop(PARTITION, None)  # its numbers must add up to num_hidden_layers
    try:
        for key, value in values.items():
            setattr(config, key, value)
        yield
    finally:
        for key, value in before.items():
            setattr(config, key, value)
        if partition is not None:
            os.environ[PARTITION] = partition


def _check_version() -> None:
    if not vllm.__version__.startswith(TESTED_VLLM):
        logger.warning_once(
            f"pruned-vllm was tested with vLLM {TESTED_VLLM}x, this is {vllm.__version__}; compare its output with the "
            "masked model's before you rely on it"
        )


def _summary(geometry: ModelGeometry, element_bytes: int) -> str:
    dense = geometry.with_layers(geometry.dense_layers)
    saved = 1 - geometry.num_parameters / dense.num_parameters
    return (
        f"{geometry.family.pruned_architecture}: {geometry.num_parameters / 1e6:,.1f}M parameters, {saved:.1%} fewer "
        f"than the dense model; KV cache {geometry.kv_cache_bytes_per_token(element_bytes):,} bytes per token, dense "
        f"{dense.kv_cache_bytes_per_token(element_bytes):,}; {len(set(geometry.layers))} distinct layer shapes"
    )
