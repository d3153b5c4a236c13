"""vLLM plugin that serves structurally pruned language models at their real size.

Importing this package imports neither torch nor vllm: vLLM calls `register` in every process it starts, and an
import of torch there has hung start-ups, while touching CUDA before a fork breaks the child.
"""

import logging


def register() -> None:
    """Entry point `vllm.general_plugins`: tells vLLM which class serves which architecture. May be called again.

    On a vLLM whose internals have moved it logs one line and does nothing. vLLM calls plugins without a net: an error
    here would keep every model from starting. A pruned model then ends with vLLM's own "not supported".
    """
    try:
        _register()
    except Exception as error:  # whatever a vLLM that nobody has seen yet may raise
        # The name puts the record under vLLM's own logging configuration.
        logging.getLogger("vllm.pruned_vllm").warning("%s", _stepping_aside(error))


def _register() -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    # Not `from vllm import ModelRegistry`: that lazy attribute fails in vLLM's model-inspection subprocess.
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from pruned_vllm.formats.families import FAMILIES
    from pruned_vllm.serving import deepseek_config
    from pruned_vllm.serving.config import PrunedConfig
    from pruned_vllm.serving.latent_sizes import latent_convertors
    from pruned_vllm.serving.stock_architectures import dense_only_hooks

    hooks = dense_only_hooks(set(ModelRegistry.get_supported_archs()), MODELS_CONFIG_MAP)
    convertors = latent_convertors(MODEL_ARCH_CONFIG_CONVERTORS)
    deepseek_config.register()
    for family in FAMILIES.values():
        architecture = family.pruned_architecture
        ModelRegistry.register_model(architecture, f"pruned_vllm.serving.models:{architecture}")
        hooks[architecture] = PrunedConfig
    MODELS_CONFIG_MAP.update(hooks)
    MODEL_ARCH_CONFIG_CONVERTORS.update(convertors)


def _stepping_aside(error: Exception) -> str:
    import sys
    from importlib.metadata import PackageNotFoundError, version

    try:
        own_version = version("pruned-vllm")
    except PackageNotFoundError:  # a copy on PYTHONPATH
        own_version = "of unknown version"
    vllm_version = getattr(sys.modules.get("vllm"), "__version__", "of unknown version")
    return (
        f"pruned-vllm {own_version} does not know vLLM {vllm_version} ({type(error).__name__}: {error}) and steps "
        "aside: other models are served as ever, pruned models are not supported. Install a vLLM that its README "
        "names, or a newer pruned-vllm."
    )
