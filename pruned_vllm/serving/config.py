"""What vLLM believes of a pruned model before it builds it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.agreed_config import check_agreement, lacking, left_out
from pruned_vllm.formats.family import Family
from pruned_vllm.serving.cpu_kernels import check_kernels
from pruned_vllm.serving.model_layout import ModelLayout, model_layout
from pruned_vllm.serving.options import check_options
from pruned_vllm.serving.stock_architectures import stock_hook
from pruned_vllm.serving.tensor_check import check_directory

if TYPE_CHECKING:  # this file is imported while the plugin registers, before vLLM may be set up
    from vllm.config import ModelConfig, VllmConfig


class PrunedConfig(VerifyAndUpdateConfig):
    """Hooks that vLLM calls before it compares head counts with tensor parallelism."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Sets the model-wide head counts to those of the largest attention op, padding included.

        vLLM calls this with the whole configuration: of the target at the start, of a draft model in each worker.

        vLLM wants a head count that tensor parallelism divides, takes the largest layer's for it, and sizes some
        buffers by it; what runs is the padded layout. What vLLM does for the stock class is done before.

        Raises:
            InputError: weights that other readers of the directory would find elsewhere, or tensors that do not fit
                config.json; keys of config.json, with what --hf-overrides changed, that mean something else to vLLM
                than to Hugging Face's model; options that this model cannot honour, tensor parallelism among them.
        """
        layout = model_layout(vllm_config)
        stock_hook(layout.geometry.family.architecture).verify_and_update_config(vllm_config)
        check_keys(vllm_config.model_config.hf_config.to_dict(), layout.geometry.family)
        check_options(vllm_config, layout)
        _check_tensor_parallelism(vllm_config, layout)
        names = check_directory(vllm_config, layout.geometry, layout.quantization)
        check_kernels(vllm_config, layout, names)
        if not layout.geometry.num_key_value_heads:  # vLLM's prefix caching fails where there is no KV cache to manage
            vllm_config.cache_config.enable_prefix_caching = False
        sizes = vllm_config.model_config.model_arch_config
        sizes.total_num_attention_heads = max(layout.ranks, *(layer.total_op_heads for layer in layout.layers))
        sizes.total_num_kv_heads = max(1, *(layer.total_kv_heads for layer in layout.layers))

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Lets the head counts of a draft model wait until they are known.

        vLLM calls this as soon as it has read a config.json. It compares a draft's head count with tensor parallelism
        right afterwards, long before it builds the whole configuration of the draft and calls the hook above. Any
        number of ranks divides 0.
        """
        if model_config.runner_type == "draft":
            model_config.model_arch_config.total_num_attention_heads = 0


def check_keys(config: Mapping[str, Any], family: Family) -> None:
    """Raises InputError where vLLM and Hugging Face's model would not read `config` alike."""
    check_agreement("config.json cannot be served", family, config)
    if keys := left_out(family, config):
        raise InputError(
            f"config.json has {', '.join(keys)}, which vLLM acts on and Hugging Face's model does not; remove that "
            "from config.json or from --hf-overrides"
        )
    if keys := lacking(family, config):
        raise InputError(
            f"config.json lacks {', '.join(keys)}, which convert-pruned writes since vLLM does not look where Hugging "
            "Face's model does; convert the model again"
        )


def _check_tensor_parallelism(vllm_config: "VllmConfig", layout: ModelLayout) -> None:
    from pruned_vllm.serving.layout_changes import layout_changes

    geometry, ranks = layout.geometry, layout.ranks
    most_heads = max(layer.num_attention_heads for layer in geometry.layers)
    if ranks > most_heads > 0:
        raise InputError(
            f"--tensor-parallel-size {ranks} is more than the {most_heads} query heads of the largest layer of "
            f"{vllm_config.model_config.model}: at least one rank would hold zeros alone in all of them; use at most "
            f"{most_heads}"
        )
    linear = geometry.linear_attention
    if linear is not None and not linear.is_shared_by(ranks):
        raise InputError(
            f"--tensor-parallel-size {ranks} does not divide the {linear.num_key_heads} key heads and "
            f"{linear.num_value_heads} value heads of linear attention, which are neither pruned nor padded; choose "
            "one that does"
        )
    if not geometry.family.can_lose_heads and not all(layer.shares_heads_evenly(ranks) for layer in geometry.layers):
        raise InputError(
            f"--tensor-parallel-size {ranks}: no head can be padded, since {geometry.family.architecture} "
            f"{geometry.family.why_heads_stay}; choose one that divides {most_heads} heads"
        )
    if layout_changes(layout) and vllm_config.lora_config is not None:
        raise InputError(
            f"--tensor-parallel-size {ranks} does not divide the heads and channels of every layer, so they are padded "
            "while the weights are loaded, but LoRA adapters have the unpadded shapes; use --tensor-parallel-size 1"
        )
