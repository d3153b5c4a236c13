"""What vLLM believes of a pruned model before it builds it."""

from typing import TYPE_CHECKING

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.serving.checkpoint import check_directory
from pruned_vllm.serving.options import check_options
from pruned_vllm.serving.sharding import shard_layer

if TYPE_CHECKING:  # this file is imported while the plugin registers, before vLLM may be set up
    from vllm.config import VllmConfig


class PrunedConfig(VerifyAndUpdateConfig):
    """Hook that vLLM calls with the whole configuration, before it compares head counts with tensor parallelism."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Sets the model-wide head counts to those of the largest attention op, padding included.

        vLLM wants a head count that tensor parallelism divides, takes the largest layer's for it, and sizes some
        buffers by it; what runs is the padded layout.

        Raises:
            InputError: options that this model cannot honour, tensor parallelism among them, or a directory whose
                tensors do not fit config.json.
        """
        geometry = ModelGeometry.from_config(vllm_config.model_config.hf_config.to_dict())
        ranks = vllm_config.parallel_config.tensor_parallel_size
        check_options(vllm_config, geometry)
        _check_tensor_parallelism(vllm_config, geometry, ranks)
        check_directory(vllm_config, geometry)
        if not geometry.num_key_value_heads:  # vLLM's prefix caching fails where there is no KV cache to manage
            vllm_config.cache_config.enable_prefix_caching = False
        layouts = [shard_layer(layer, ranks) for layer in set(geometry.layers)]
        sizes = vllm_config.model_config.model_arch_config
        sizes.total_num_attention_heads = max(ranks, *(layout.total_op_heads for layout in layouts))
        sizes.total_num_kv_heads = max(1, *(layout.total_kv_heads for layout in layouts))


def _check_tensor_parallelism(vllm_config: "VllmConfig", geometry: ModelGeometry, ranks: int) -> None:
    from pruned_vllm.serving.layout_changes import layout_changes

    most_heads = max(layer.num_attention_heads for layer in geometry.layers)
    if ranks > most_heads > 0:
        raise InputError(
            f"--tensor-parallel-size {ranks} is more than the {most_heads} query heads of the largest layer: at "
            f"least one rank would hold zeros alone in all of them; use at most {most_heads}"
        )
    # Only plain weights can be brought into a new order and padded while they are loaded.
    quantized = getattr(vllm_config.model_config.hf_config, "quantization_config", None) is not None
    reasons = ["the checkpoint is quantized on disk"] * quantized
    reasons += ["LoRA adapters have the unpadded shapes"] * (vllm_config.lora_config is not None)
    if reasons and layout_changes(geometry, ranks):
        raise InputError(
            f"--tensor-parallel-size {ranks} does not divide the heads and channels of every layer, so they are padded "
            f"while the weights are loaded, but {' and '.join(reasons)}; use --tensor-parallel-size 1"
        )
