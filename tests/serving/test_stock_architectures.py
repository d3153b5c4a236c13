"""What the plugin adds to vLLM's hooks of stock architectures."""

from vllm.model_executor.models.config import MODELS_CONFIG_MAP

from pruned_vllm import register
from pruned_vllm.serving.stock_architectures import DenseOnly

register()


def test_hooks_of_stock_architectures():
    """Those of the supported families, under every task, and the Transformers backend; no others."""
    guarded = {name for name, hook in MODELS_CONFIG_MAP.items() if issubclass(hook, DenseOnly)}
    for name in (
        "LlamaForCausalLM",
        "LlamaModel",
        "Qwen3ForSequenceClassification",
        "Qwen2MoeForCausalLM",
        "TransformersForCausalLM",
        "TransformersMoEForCausalLM",
    ):
        assert name in guarded, name
    assert not guarded & {"LlamaBidirectionalModel", "Qwen3VLForSequenceClassification", "GemmaForCausalLM"}
    assert not any(name.startswith("Pruned") for name in guarded)


def test_a_stock_hook_still_does_what_it_did():
    class Config:
        is_original_qwen3_reranker, classifier_from_token = True, ["no", "yes"]

        def get_text_config(self):
            return self

    class Model:
        hf_config = Config()

    MODELS_CONFIG_MAP["Qwen3ForSequenceClassification"].verify_and_update_model_config(Model)
    assert Model.hf_config.method == "from_2_way_softmax"
