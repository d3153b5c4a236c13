"""Tiny random models of the real Hugging Face classes, masked checkpoints of them, and the oracle.

The oracle is the masked dense model in Hugging Face, float32: what a converted model must compute.
"""

import json
from copy import deepcopy
from pathlib import Path

import torch
from helpers.deepseek import DeepseekForCausalLM
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from converter.convert import convert
from converter.plan import make_plan
from learner.model.masking import apply_masks
from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.masked import CHANNEL_MASK, EXPERT_MASK, HEAD_MASK
from pruned_vllm.serving import deepseek_config

HEAD_DIM = 32  # the smallest that vLLM's CPU attention serves
NUM_LAYERS = 3
VOCAB_SIZE = 256
NUM_EXPERTS = 4
_EXPERTS = {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
_SHARED = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 20}
# Layers with linear attention, of sizes that vLLM's CPU kernels take.
LINEAR = {
    "layer_types": ["full_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.5},
}
MROPE = {"rope_parameters": {**LINEAR["rope_parameters"], "mrope_section": [3, 3, 2], "mrope_interleaved": True}}
# DeepSeek-V2 and later, GLM-4.5 and later.
_ROUTED_LATE = {
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
# vLLM's attention with a latent vector takes these two on CPUs alone. In vLLM's words head_dim is what RoPE turns.
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 24}
MOE_CONFIGS = {
    "mixtral": {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2},
    "olmoe": _EXPERTS,
    "qwen2_moe": {**_EXPERTS, **_SHARED},
    "qwen3_moe": {**_EXPERTS, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "deepseek": {
        "n_routed_experts": NUM_EXPERTS,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "qwen3_next": {**_EXPERTS, **_SHARED, **LINEAR},
    "qwen3_5_moe_text": {**_EXPERTS, **_SHARED, **LINEAR, **MROPE},
    "glm4_moe": _ROUTED_LATE | {"attention_bias": True, "use_qk_norm": True, "routed_scaling_factor": 1.5},
    "deepseek_v2": _ROUTED_LATE | _LATENT | {"q_lora_rank": None, "topk_method": "greedy", "n_shared_experts": 2},
    "deepseek_v3": _ROUTED_LATE | _LATENT | {"q_lora_rank": 20, "n_group": 1, "topk_group": 1, "rms_norm_eps": 0.01},
    "glm4_moe_lite": {key: value for key, value in (_ROUTED_LATE | _LATENT).items() if key != "first_k_dense_replace"}
    | {"q_lora_rank": 20, "mlp_layer_types": ["sparse"] * NUM_LAYERS},
    "gpt_oss": {
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "sliding_window": 8,  # in the first and in the last layer
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
            **{"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        },
    },
}
# Families whose config class has other defaults than a tiny model can have, or whose positions are to be seen in it.
DENSE_CONFIGS = {
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "phi3": {},
    "qwen3_5_text": LINEAR | MROPE,
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 16.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
        }
    },
}
HF_MOE = [name for name in MOE_CONFIGS if name != "deepseek"]  # what Transformers has
SOFTMAX_MOE = [name for name in HF_MOE if FAMILIES[name].experts_format.scoring == "softmax"]
# Those of them that may come out as a stock model, and whose masks may be at "gate_and_up".
STOCK_MOE = [name for name in HF_MOE if not FAMILIES[name].stores_fused]


def tiny_model(
    model_type: str, num_attention_heads: int, num_key_value_heads: int, intermediate_size: int, seed: int = 0, **config
) -> PreTrainedModel:
    """A model with weights large enough that its predictions differ clearly from token to token.

    `intermediate_size` is the width of the experts in a family whose config.json calls it so (Mixtral, OLMoE).
    """
    torch.manual_seed(seed)
    deepseek_config.register()
    if model_type == "olmoe":  # its norm of q is as wide as the hidden states
        config.setdefault("hidden_size", num_attention_heads * HEAD_DIM)
    config = deepcopy(MOE_CONFIGS.get(model_type) or DENSE_CONFIGS.get(model_type, {})) | config
    if FAMILIES[model_type].latent_attention:
        num_key_value_heads = num_attention_heads
    for key in {"layer_types", "mlp_layer_types"} & config.keys():
        config[key] = [config[key][index % NUM_LAYERS] for index in range(config.get("num_hidden_layers", NUM_LAYERS))]
    config = AutoConfig.for_model(
        model_type,
        vocab_size=config.pop("vocab_size", VOCAB_SIZE),
        hidden_size=config.pop("hidden_size", 96),
        num_hidden_layers=config.pop("num_hidden_layers", NUM_LAYERS),
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=config.pop("head_dim", HEAD_DIM),
        intermediate_size=intermediate_size,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **config,
    )
    if model_type == "deepseek":  # Transformers has no such model
        config.architectures = ["DeepseekForCausalLM"]
        model = DeepseekForCausalLM(config)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    offset = 1 if FAMILIES[model_type].norms_add_one else 0
    experts = FAMILIES[model_type].experts
    wide = experts is not None and experts.activation == "swigluoai"  # some gates and ups are to be clamped
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("linear_attn.norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5).sub_(offset)
            elif name.endswith(("A_log", "dt_bias")):  # what is forgotten from token to token: little to most
                parameter.uniform_(-2, 1)
            else:
                parameter.normal_(std=0.4 if wide and name.endswith("gate_up_proj") else 0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # as large as scores: it decides often
                buffer.normal_(std=0.3)
    return model.eval().requires_grad_(False)


def stored_numbers(model: PreTrainedModel) -> int:
    """Numbers that `save_pretrained` writes: a router's correction bias is a buffer in Transformers."""
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    return model.num_parameters() + sum(map(torch.numel, biases))


def llama3_rope(original_max_position_embeddings: int) -> dict:
    """`rope_parameters` of Llama 3's kind, for models of a few positions."""
    factors = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    kind = {"rope_type": "llama3", "rope_theta": 500.0}
    return {**kind, **factors, "original_max_position_embeddings": original_max_position_embeddings}


def write_masked(
    directory: Path,
    model: PreTrainedModel,
    masks: dict[str, torch.Tensor],
    channel_mask_site: str = "product",
    **pruning,
) -> Path:
    """Saves a masked checkpoint; `pruning` replaces keys of pruning.json."""
    model.save_pretrained(directory)
    save_file({name: mask.clone() for name, mask in masks.items()}, directory / "pruning_masks.safetensors")
    content = {
        "format_version": 1,
        "method": "test",
        "channel_mask_site": channel_mask_site,
        "base_model": None,
        "lora_adapter": None,
    }
    (directory / "pruning.json").write_text(json.dumps(content | pruning))
    return directory


def masks_for(
    heads: list[list[float]], channels: list[torch.Tensor], model: PreTrainedModel | None = None
) -> dict[str, torch.Tensor]:
    """Mask tensors under their keys from values by layer.

    Args:
        model: whose layers with linear attention get no mask of heads.
    """
    masks = {
        HEAD_MASK.format(i): torch.tensor(values, dtype=torch.float32)
        for i, values in enumerate(heads)
        if model is None or hasattr(model.model.layers[i], "self_attn")
    }
    return masks | {CHANNEL_MASK.format(i): values.float() for i, values in enumerate(channels)}


def soft_mask(units: int, kept: int, generator: torch.Generator) -> torch.Tensor:
    """A mask that keeps `kept` units, chosen by chance, with values in (0, 8), as DDP learns them."""
    mask = torch.zeros(units)
    mask[torch.randperm(units, generator=generator)[:kept]] = 0.2 + 7.8 * torch.rand(kept, generator=generator) ** 3
    return mask


def expert_masks(
    model: PreTrainedModel,
    widths: list[list[int]],
    dense_widths: list[int] = (),
    shared_widths: list[int] = (),
    seed: int = 7,
) -> dict[str, torch.Tensor]:
    """Masks that leave these widths of the experts of each layer that has any, of each dense MLP, and of the shared
    experts of each layer that has some, in turn. What has no width, being beyond the end of a list, has no mask."""
    generator, masks = torch.Generator().manual_seed(seed), {}
    widths, dense_widths, shared_widths = iter(widths), iter(dense_widths), iter(shared_widths)
    geometry = ModelGeometry.from_config(model.config.to_dict() | {"architectures": [type(model).__name__]})
    for index, layer in enumerate(geometry.layers):
        if layer.expert_intermediate_sizes:
            rows = [soft_mask(layer.expert_width, kept, generator) for kept in next(widths)]
            masks[EXPERT_MASK.format(index)] = torch.stack(rows)
        of_all_tokens = shared_widths if layer.expert_intermediate_sizes else dense_widths
        if layer.intermediate_size and (kept := next(of_all_tokens, None)) is not None:
            masks[CHANNEL_MASK.format(index)] = soft_mask(layer.intermediate_size, kept, generator)
    return masks


def converted(
    directory: Path, model: PreTrainedModel, masks: dict[str, torch.Tensor], site: str = "product", **options
) -> Path:
    """Masked checkpoint -> converted model through the real pipeline; returns the converted directory.

    Args:
        options: of `make_plan`.
    """
    write_masked(directory / "ckpt", model, masks, site)
    convert(make_plan(directory / "ckpt", **options), directory / "out")
    return directory / "out"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte: VOCAB_SIZE of them."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="~")


def prompts() -> list[list[int]]:
    """Prompts of different lengths, so that a batch has ragged rows."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in (1, 5, 17, 40)]


@torch.no_grad()
def oracle(
    model: PreTrainedModel, masks: dict[str, torch.Tensor], site: str, prompt: list[int], continuation: list[int]
) -> tuple[list[int], torch.Tensor]:
    """What the masked dense model says of a greedy `continuation` of `prompt`.

    Returns the tokens that it prefers in place of each token of `continuation` (the same, if it would have generated
    that), and the log-probabilities [len(prompt) + len(continuation) - 1, vocab] of every position.
    """
    tokens = torch.tensor([[*prompt, *continuation]])
    with apply_masks(model, masks, site):
        log_probabilities = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
    return log_probabilities[len(prompt) - 1 :].argmax(-1).tolist(), log_probabilities
