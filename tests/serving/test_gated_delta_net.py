"""Models in which some layers have linear attention: what vLLM does for them beside the layers, and ranks."""

import pytest
from helpers.masked import edit_json
from helpers.serving import GEOMETRIES, assert_is_as_near_as_bfloat16, engine, generate
from helpers.tiny import converted
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from pruned_vllm.serving import models
from pruned_vllm.serving.stock_architectures import DenseOnly, stock_hook


def test_the_served_model_and_vllms_own_configuration(tmp_path):
    geometry = GEOMETRIES["qwen3.5 uneven groups"]
    model, masks = geometry.model_and_masks()
    directory = converted(tmp_path, model, masks)
    edit_json(directory / "config.json", mamba_ssm_dtype="float32")
    with engine(directory, dtype="bfloat16") as llm:
        config, outputs, alone = llm.llm_engine.vllm_config, generate(llm), generate(llm, alone=True)
    assert_is_as_near_as_bfloat16(outputs, model, masks)
    assert_is_as_near_as_bfloat16(alone, model, masks)  # one token by itself among them
    others = {name: mask for name, mask in masks.items() if "layers.2" not in name or "head_mask" not in name}
    with pytest.raises(AssertionError, match="on average"):
        assert_is_as_near_as_bfloat16(outputs, model, others)
    assert config.model_config.is_hybrid and not config.model_config.uses_mrope
    assert config.cache_config.mamba_ssm_cache_dtype == "float32"


def test_hooks_are_those_of_vllm():
    for architecture in ("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"):
        hook = stock_hook(architecture)
        assert not issubclass(hook, DenseOnly) and hook is not VerifyAndUpdateConfig
    assert stock_hook("LlamaForCausalLM") is VerifyAndUpdateConfig


@pytest.mark.parametrize(("ranks", "number"), [(4, "2 key heads and 4 value heads"), (3, "2 key heads")])
def test_ranks_that_do_not_divide_linear_attention_are_refused(tmp_path, ranks, number):
    model, masks = GEOMETRIES["qwen3.5 uneven groups"].model_and_masks()
    directory = converted(tmp_path, model, masks)
    with pytest.raises(ValueError, match=f"--tensor-parallel-size {ranks} does not divide the {number}"):
        EngineArgs(str(directory), skip_tokenizer_init=True, tensor_parallel_size=ranks).create_engine_config()


def test_classes_are_made_when_they_are_asked_for():
    assert models.PrunedQwen3_5ForCausalLM is models.PrunedQwen3_5ForCausalLM
    assert issubclass(models.PrunedQwen3NextForCausalLM, models.PrunedForCausalLM)
    with pytest.raises(AttributeError, match="no attribute 'PrunedNothing'"):
        models.PrunedNothing  # noqa: B018
