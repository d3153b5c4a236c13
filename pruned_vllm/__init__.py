"""vLLM plugin that serves structurally pruned language models at their real size.

Importing this package imports neither torch nor vllm: vLLM calls `register` in every process it starts, and an
import of torch there has hung start-ups, while touching CUDA before a fork breaks the child.
"""


def register() -> None:
    """Entry point `vllm.general_plugins`: tells vLLM which class serves which architecture. May be called again."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    # Not `from vllm import ModelRegistry`: that lazy attribute fails in vLLM's model-inspection subprocess.
    from vllm.model_executor.models.registry import ModelRegistry

    from pruned_vllm.formats.families import FAMILIES
    from pruned_vllm.serving import deepseek_config
    from pruned_vllm.serving.config import PrunedConfig

    deepseek_config.register()
    for family in FAMILIES.values():
        architecture = family.pruned_architecture
        ModelRegistry.register_model(architecture, f"pruned_vllm.serving.models:{architecture}")
        MODELS_CONFIG_MAP[architecture] = PrunedConfig
