"""Transformers and vLLM compute the same from the config.json that is written, or it is refused."""

import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers.masked import convert_pruned, edit_json
from helpers.serving import engine
from helpers.tiny import (
    DENSE_CONFIGS,
    HEAD_DIM,
    LINEAR,
    MOE_CONFIGS,
    converted,
    expert_masks,
    tiny_model,
    write_masked,
)
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.rotary_embedding import get_rope, phi3_long_rope_scaled_rope

from learner.cli import main as learn_masks
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.agreed_config import agreed_config, left_out, refusals, stock_agrees
from pruned_vllm.formats.config import converted_config
from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.serving.config import check_keys


def rope(**parameters) -> dict:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


LONG = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "original_max_position_embeddings": 64}
REFUSED = {
    **{
        f"{name}, activation": (name, {family.activation_key: "gelu"}, f"{family.activation_key} is 'gelu': ")
        for name, family in FAMILIES.items()
    },
    "not causal": ("llama", {"is_causal": False}, "is_causal is False: the plugin serves causal attention alone"),
    "half of a head rotated": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "half of a head rotated, inside": ("qwen3", rope(partial_rotary_factor=0.5), "rope_parameters.partial_"),
    "dynamic": ("llama", rope(rope_type="dynamic", factor=2.0), "rope_type is 'dynamic'"),
    "older name": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    "longrope": ("llama", rope(rope_type="longrope", **LONG), "rope_type is 'longrope'"),
    "by type of layer": ("qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 5e4}}}, "full_attention is {"),
    "deepseek, llama3": ("deepseek", {"rope_scaling": {"type": "llama3"}}, "rope_type is 'llama3'"),
    "deepseek, sigmoid": ("deepseek", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
    "olmoe, biases": ("olmoe", {"attention_bias": True}, "attention_bias is True: vLLM's OLMoE has no such biases"),
    "olmoe, clipping": ("olmoe", {"clip_qkv": 0.5}, "clip_qkv is 0.5: vLLM's OLMoE does not clip"),
    "olmoe, a window": ("olmoe", {"sliding_window": 8}, "sliding_window is 8: Hugging Face's OLMoE applies it with"),
    "quantized, older name": ("llama", {"compression_config": {}}, "compression_config is {}"),
    "gemma3, angles of full layers": (
        "gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "llama3"}}}, "rope_type is 'llama3'"),
    "gemma3, capped logits": ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    "phi3, linear": ("phi3", rope(rope_type="linear", factor=2.0), "rope_type is 'linear'"),
    "ministral3, no scale of queries": ("ministral3", rope(rope_type="default"), "lack llama_4_scaling_beta"),
    "deepseek_v2, divided by the sum": ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
    "deepseek_v2, sigmoid": ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
    "deepseek_v2, another router": ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
    "deepseek_v2, biases of MLPs": ("deepseek_v2", {"mlp_bias": True}, "mlp_bias is True"),
    "deepseek_v3, softmax": ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    "deepseek_v3, another router": ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
    "deepseek_v3, biases": ("deepseek_v3", {"attention_bias": True}, "attention_bias is True: vLLM's latent attention"),
    "deepseek_v3, halves of heads": ("deepseek_v3", {"rope_interleave": False}, "rope_interleave is False"),
    "deepseek_v3, experts here and there": ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    "deepseek_v3, linear": ("deepseek_v3", rope(rope_type="linear", factor=2.0), "rope_type is 'linear'"),
    "deepseek_v3, one mscale": (
        "deepseek_v3", rope(rope_type="yarn", factor=2.0, mscale=0.7), "mscale 0.7 and mscale_all_dim None"),
    "glm4_moe_lite, dense layers": (
        "glm4_moe_lite", {"first_k_dense_replace": 2}, "first_k_dense_replace is 2, but 0 by mlp_layer_types"),
    "encoder": ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder is True"),
}  # fmt: skip
DROPPED = {
    "a window": ("llama", {"sliding_window": 8}),
    "layer types": ("llama", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 8}),
    "layer types that go along": ("mistral", {"layer_types": ["full_attention"] * 3}),
    "scaled logits": ("qwen3", {"logit_scale": 0.5}),
    "biases": ("mistral", {"attention_bias": True, "mlp_bias": True, "bias": True, "qkv_bias": True}),
    "scaled queries": ("mistral", {"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 8}}),
    "chunks": ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 8}, "attention_chunk_size": 8}),
    "other names": ("llama", {"rotary_pct": 0.5, "num_kv_heads": 1, "n_head_kv": 1}),
    "experts of a dense model": ("qwen2", {"num_experts": 4, "num_experts_per_tok": 2}),
    "groups of experts": ("deepseek", {"routed_scaling_factor": 2.5, "topk_method": "noaux_tc", "n_group": 2}),
    "biases of Phi-3": ("phi3", {"attention_bias": True, "mlp_bias": True}),
    "layer types of Ministral 3": ("ministral3", {"layer_types": ["full_attention"] * 3}),
    "windows of GLM": ("glm4_moe", {"sliding_window": 8}),
    "an indexer": ("deepseek_v3", {"index_topk": 64, "moe_router_dtype": "bfloat16"}),
    "a shared expert": ("qwen3_moe", {"shared_expert_intermediate_size": 24}),
}
NOT_STOCK = {
    "windows in some layers": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8}),
    "windows in the last layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "biases of full attention": ("qwen3_5_text", {"attention_bias": True}),
    "an lm_head that is the embedding": ("qwen3_next", {"tie_word_embeddings": True}),
    "no biases": ("qwen2_moe", {"qkv_bias": False}),
    "norms": ("olmoe", {"rms_norm_eps": 1e-3}),
    "router": ("olmoe", {"norm_topk_prob": True}),
}


def config_of(model_type: str, **changes) -> dict:
    """config.json of a model that a stock architecture can say."""
    sizes = MOE_CONFIGS.get(model_type) or (LINEAR if model_type == "qwen3_5_text" else {})
    sizes = sizes | {"vocab_size": 256, "hidden_size": 192, "intermediate_size": 40}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": HEAD_DIM, "num_hidden_layers": 3}
    return {"model_type": model_type, "architectures": [FAMILIES[model_type].architecture], **sizes, **heads, **changes}


def write(config: dict) -> dict:
    return converted_config(ModelGeometry.from_config(config), config)


@pytest.mark.parametrize(("model_type", "changes", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_vllm_cannot_honour_is_refused_when_converting(tmp_path, capsys, model_type, changes, sentence):
    model = tiny_model(model_type, 6, 6, 40)
    masks = expert_masks(model, [[3, 4, 5, 6]] * 3)
    edit_json(write_masked(tmp_path / "ckpt", model, masks) / "config.json", **changes)
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("model_type", "changes", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_vllm_cannot_honour_is_refused_when_serving(model_type, changes, sentence):
    with pytest.raises(InputError, match="cannot be served: vLLM would not compute what Hugging Face") as error:
        check_keys(config_of(model_type, **changes), FAMILIES[model_type])
    assert sentence in str(error.value)


@pytest.mark.parametrize(("model_type", "changes"), DROPPED.values(), ids=DROPPED)
def test_what_vllm_alone_acts_on_is_refused_when_serving(model_type, changes):
    """A config.json that convert-pruned did not write, or --hf-overrides."""
    with pytest.raises(InputError, match="which vLLM acts on and Hugging Face's model does not") as error:
        check_keys(config_of(model_type, **changes), FAMILIES[model_type])
    assert all(key in str(error.value) for key in changes)


def test_overrides_are_looked_at_before_anything_is_served(tmp_path):
    model = tiny_model("mixtral", 6, 3, 24)
    directory = converted(tmp_path, model, expert_masks(model, [[3, 4, 5, 6]] * 3))
    for overrides, sentence in (({"hidden_act": "relu"}, "hidden_act is 'relu'"), ({"logit_scale": 2}, "logit_scale")):
        with pytest.raises(ValueError, match=sentence), engine(directory, hf_overrides=overrides):
            pass


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_defaults_of_a_config_class_agree(model_type):
    """What vLLM sees of a converted model has every default filled in."""
    written = write(config_of(model_type))
    filled = AutoConfig.for_model(**written).to_dict() | {"architectures": written["architectures"]}
    family = FAMILIES[model_type]
    assert not refusals(family, filled) and not left_out(family, filled) and stock_agrees(family, filled)


def test_learn_masks_refuses_first(word_model, capsys):
    edit_json(word_model / "model" / "config.json", hidden_act="gelu")
    assert learn_masks([str(word_model / name) for name in ("model", "ckpt")] + ["--method", "random"]) == 2
    assert "hidden_act is 'gelu': vLLM has these models with silu alone" in capsys.readouterr().err


def test_the_user_is_told_what_is_left_out(ckpt, tmp_path, capsys):
    edit_json(ckpt / "config.json", sliding_window=8, logit_scale=1.0)
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    assert "since vLLM alone acts on them: sliding_window." in capsys.readouterr().out


@pytest.mark.parametrize(("model_type", "changes"), DROPPED.values(), ids=DROPPED)
def test_what_vllm_alone_acts_on_is_left_out(model_type, changes):
    config = config_of(model_type, **changes)
    written = write(config)
    assert not changes.keys() & written.keys()
    assert written == write(config_of(model_type))


@pytest.mark.parametrize(("model_type", "changes"), NOT_STOCK.values(), ids=NOT_STOCK)
def test_what_only_the_plugin_honours_is_written_for_it(model_type, changes):
    family = FAMILIES[model_type]
    assert write(config_of(model_type))["architectures"] == [family.architecture]
    written = write(config_of(model_type, **changes))
    assert written["architectures"] == [family.pruned_architecture] and written["per_layer_config"] == {}
    assert {key: written[key] for key in changes} == changes
    assert not refusals(family, written) and not left_out(family, written)


def test_an_activation_gets_the_name_that_vllm_knows():
    assert write(config_of("llama", hidden_act="swish"))["hidden_act"] == "silu"


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ANGLES = {
    "default": {"rope_type": "default", "rope_theta": 5e4},
    "nothing said": {},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 7e5},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "yarn": YARN,
    "yarn, from the longest position": {"rope_type": "yarn", "factor": 4.0},
    "yarn, attention factor": YARN | {"attention_factor": 0.8},
    "yarn, mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5},
    "yarn, mscale alone": YARN | {"mscale": 0.7},
    "yarn, betas": YARN | {"beta_fast": 16, "beta_slow": 2},
    "yarn, nulls": YARN | {"beta_fast": None, "beta_slow": None, "attention_factor": None},
    "yarn, not truncated": YARN | {"truncate": False},
    "keys of other models": {"rope_type": "default", "rope_dim": 16, "mrope_section": [4, 6, 6]},
}  # fmt: skip


def test_a_model_that_lacks_what_vllm_needs_is_refused_when_serving():
    family, config = FAMILIES["ministral3"], config_of("ministral3")
    with pytest.raises(InputError, match="config.json lacks llama_4_scaling, which convert-pruned writes"):
        check_keys(config, family)
    check_keys(write(config), family)


FOR_VLLM = {
    "deepseek_v2": ({}, {"n_group": 1, "topk_group": 1}),
    "deepseek_v2, groups that are not used": ({"n_group": 2, "topk_group": 1}, {"n_group": 1, "topk_group": 1}),
    "deepseek_v2, groups": (
        {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}, {"n_group": 2, "topk_group": 1}),
    "deepseek_v3": ({}, {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
    "glm4_moe_lite": ({"mlp_layer_types": ["dense", "dense", "sparse"]}, {"first_k_dense_replace": 2}),
    "glm4_moe_lite, nothing said": ({"mlp_layer_types": None}, {"first_k_dense_replace": 1}),
    "glm4_moe": ({"num_nextn_predict_layers": 1}, {"num_nextn_predict_layers": 0}),
}  # fmt: skip


@pytest.mark.parametrize("name", FOR_VLLM)
def test_keys_that_vllm_needs_are_written(name):
    changes, expected = FOR_VLLM[name]
    written = write(config_of(name.partition(",")[0], **changes))
    assert {key: written[key] for key in expected} == expected


@pytest.mark.parametrize("parameters", ANGLES.values(), ids=ANGLES)
def test_angles_are_the_same_in_vllm(parameters):
    config = config_of("llama", rope_parameters=parameters, max_position_embeddings=256)
    assert not refusals(FAMILIES["llama"], config)
    positions, heads = torch.arange(128), torch.randn(128, 2 * HEAD_DIM, generator=torch.Generator().manual_seed(1))
    hugging_face = LlamaRotaryEmbedding(LlamaConfig(**config))
    by_head = heads.view(1, 128, 2, HEAD_DIM).transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(by_head, by_head, *hugging_face(by_head, positions[None]))
    read_by_vllm = LlamaConfig(**agreed_config(FAMILIES["llama"], config))
    with set_current_vllm_config(VllmConfig()):
        vllm = get_rope(HEAD_DIM, 256, rope_parameters=read_by_vllm.rope_parameters, dtype=torch.float32)
        actual, _ = vllm.forward_native(positions, heads.clone(), heads.clone())
    torch.testing.assert_close(actual.view(128, 2, HEAD_DIM), expected[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


BOTH_KINDS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
NESTED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
OLDER = {"rope_theta": 7e5, "rope_local_base_freq": 9e3, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
LONGROPE = {
    "original_max_position_embeddings": 64,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0 + i / 4 for i in range(16)],
        "long_factor": [2.0 + i for i in range(16)],
    },
}
HALF = {"partial_rotary_factor": 0.5}
FAMILY_ANGLES = {  # keys of config.json, the type of layer, tokens of a text, and --max-model-len
    "gemma3, full": ("gemma3_text", BOTH_KINDS | {"rope_parameters": NESTED}, "full_attention", 128, 256),
    "gemma3, sliding": ("gemma3_text", BOTH_KINDS | {"rope_parameters": NESTED}, "sliding_attention", 128, 256),
    "gemma3, older keys, full": ("gemma3_text", BOTH_KINDS | OLDER, "full_attention", 128, 256),
    "gemma3, older keys, sliding": ("gemma3_text", BOTH_KINDS | OLDER, "sliding_attention", 128, 256),
    "phi3": ("phi3", {"rope_theta": 5e4}, None, 128, 256),
    "phi3, half of a head": ("phi3", HALF, None, 128, 256),
    "phi3, longrope, short": ("phi3", LONGROPE, None, 64, 64),
    "phi3, longrope, long": ("phi3", LONGROPE, None, 128, 256),
    "ministral3": ("ministral3", DENSE_CONFIGS["ministral3"], None, 128, 256),
    "glm4_moe": ("glm4_moe", {"rope_theta": 5e4}, None, 128, 256),
    "glm4_moe, a quarter of a head, yarn": (
        "glm4_moe",
        {"rope_parameters": YARN | {"partial_rotary_factor": 0.25, "rope_theta": 5e4}},
        None,
        128,
        256,
    ),
    "gpt_oss": ("gpt_oss", {}, None, 128, 256),
}


@pytest.mark.parametrize("name", FAMILY_ANGLES)
def test_angles_of_families_are_the_same_in_vllm(monkeypatch, name):
    model_type, changes, kind, tokens, max_model_len = FAMILY_ANGLES[name]
    family, config = FAMILIES[model_type], config_of(model_type, max_position_embeddings=256, **changes)
    assert not refusals(family, config)
    model = getattr(transformers, family.architecture)
    code, config_class = sys.modules[model.__module__], model.config_class
    rotary = getattr(code, f"{family.architecture.removesuffix('ForCausalLM')}RotaryEmbedding")(config_class(**config))
    positions = torch.arange(tokens)
    heads = torch.randn(tokens, 2 * HEAD_DIM, generator=torch.Generator().manual_seed(1))
    by_head = heads.view(1, tokens, 2, HEAD_DIM).transpose(1, 2)
    angles = rotary(by_head, positions[None], *([kind] if kind else []))
    expected, _ = code.apply_rotary_pos_emb(by_head, by_head, *angles)
    parameters = config_class(**agreed_config(family, config)).rope_parameters
    asked = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len))
    monkeypatch.setattr(phi3_long_rope_scaled_rope, "get_current_vllm_config", lambda: asked)
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})  # remembers no --max-model-len
    with set_current_vllm_config(VllmConfig()):
        vllm = get_rope(HEAD_DIM, 256, rope_parameters=parameters[kind] if kind else parameters, dtype=torch.float32)
        compute = getattr(vllm, "forward_native", vllm.forward)
        actual, _ = compute(positions, heads.clone(), heads.clone())
    torch.testing.assert_close(actual.view(tokens, 2, HEAD_DIM), expected[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
