"""Refuses a pruned config.json under the name of a stock class, which would build its layers at the dense size.

Somebody who overrides `architectures`, as the instructions for Qwen3-Reranker do, or asks for the Transformers backend,
would else read that some slice exceeds some dimension. vLLM has one hook for each architecture, called with the
configuration before anything is built; models that are not pruned pass through it unchanged.
"""

import re
from typing import TYPE_CHECKING

from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.families import FAMILIES

if TYPE_CHECKING:  # this file is imported while the plugin registers, before vLLM may be set up
    from vllm.config import ModelConfig, VllmConfig

RERANKER = (
    ". For the scores of a reranker like Qwen3-Reranker: --convert classify --hf-overrides "
    '\'{"method": "from_2_way_softmax", "classifier_from_token": ["no", "yes"]}\''
)


class DenseOnly(VerifyAndUpdateConfig):
    """The hook of a stock architecture: refuses pruned models, and does else what vLLM's own hook does.

    Attributes:
        stock_hook: vLLM's own hook.
    """

    stock_hook: type[VerifyAndUpdateConfig]

    @classmethod
    def verify_and_update_model_config(cls, model_config: "ModelConfig") -> None:
        cls.stock_hook.verify_and_update_model_config(model_config)

    @classmethod
    def verify_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Raises InputError if config.json describes a pruned model."""
        model = vllm_config.model_config
        config = model.hf_config.to_dict()
        family = FAMILIES.get(str(config.get("model_type")))
        if family is not None and config.get("pruning") and config.get("per_layer_config"):
            raise InputError(
                f"{model.architecture} would build every layer of this pruned model at the dense size; leave "
                "architectures out of --hf-overrides and --model-impl at auto, and vLLM takes "
                f"{family.pruned_architecture}{RERANKER if 'Classification' in model.architecture else ''}"
            )
        cls.stock_hook.verify_and_update_config(vllm_config)


def stock_hook(architecture: str) -> type[VerifyAndUpdateConfig]:
    """vLLM's own hook of a stock architecture, one that does nothing where it has none."""
    hook = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
    return hook.stock_hook if issubclass(hook, DenseOnly) else hook


def dense_only_hooks(
    architectures: set[str], hooks: dict[str, type[VerifyAndUpdateConfig]]
) -> dict[str, type[DenseOnly]]:
    """Hooks for every stock class that could be taken for a pruned model's.

    Args:
        architectures: all that vLLM knows.
        hooks: those that vLLM has already, by architecture.
    """
    stems = {family.architecture.removesuffix("ForCausalLM") for family in FAMILIES.values()}
    related = re.compile(rf"(?:{'|'.join(sorted(stems))}|Transformers(?:MoE)?)(?:Model|For\w+)")
    found = {}
    for name in filter(related.fullmatch, architectures | set(hooks)):
        hook = hooks.get(name, VerifyAndUpdateConfig)
        if not issubclass(hook, DenseOnly):
            found[name] = type("DenseOnly", (DenseOnly,), {"stock_hook": hook})
    return found
