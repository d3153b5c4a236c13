"""How a converted model is served, and what may surprise whoever does it."""

import shlex

from converter.dropped_experts import NOT_EXACT
from converter.plan import Plan
from pruned_vllm.formats.companions import has_mistral_tokenizer, has_tokenizer, tokenizer_code
from pruned_vllm.formats.geometry import ModelGeometry

# vLLM 0.32, vllm/v1/attention/backends/cpu_attn.py, get_supported_head_sizes; GPUs take any multiple of 8.
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)

CPU_LATENT_SIZES = (512, 64)  # vllm/v1/attention/backends/mla/cpu_mla.py: what is cached of a token, and turned by RoPE


def serve_command(plan: Plan, out: str, dense: str | None = None) -> str:
    """The command for a shell that serves the converted model in `out`, quoted, with the tokenizer of the dense one.

    The name of the dense model is quoted here: it may come from a pruning.json, which must not add a command.

    Args:
        dense: what stands for a dense model that is not on the hub; None is the directory where it is.
    """
    directory, hub_id = plan.source.companions, plan.source.hub_id
    command = f"vllm serve {out}"
    if directory is not None and (code := tokenizer_code(directory)) is not None:
        # A class in a repository of the hub is fetched from there. Code in the dense directory stays where it is.
        name = dense if dense is not None and hub_id is None else shlex.quote(hub_id or str(directory))
        command += "" if "--" in code else f" --tokenizer {name}"
        command += " --trust-remote-code"
    if _is_mistral_repository(plan):
        command += " --tokenizer-mode mistral"
    return command


def warnings(plan: Plan) -> list[str]:
    """Sentences about a result that some machines cannot serve, or not without more options."""
    found = []
    if plan.dropped is not None:
        found.append(f"--drop-empty-experts changed routing: {NOT_EXACT}")
    if (warning := head_dim_warning(plan.dense)) is not None:
        found.append(warning)
    companions = plan.source.companions
    if companions is None or not has_tokenizer(companions):
        found.append(
            "there is no tokenizer beside the weights, so OUT has none: copy the files of the dense model's, or "
            "name it when you serve (vllm serve OUT --tokenizer DENSE_MODEL)"
        )
    if companions is not None and (code := tokenizer_code(companions)) is not None:
        found.append(
            f"the tokenizer is code of the dense model ({code}), which is not copied; read it before you let vLLM run "
            "it with --trust-remote-code"
        )
    if _is_mistral_repository(plan):
        found.append(
            "the dense model brings a tokenizer of mistral-common, which vLLM prefers for directories of Mistral; "
            "without --tokenizer-mode mistral it takes the one of Hugging Face, whose chat template may differ"
        )
    return found


def head_dim_warning(geometry: ModelGeometry) -> str | None:
    """A sentence about a size of heads that CPUs cannot serve, without a full stop; None for others."""
    head_dim, latent = geometry.head_dim, geometry.latent
    if latent is not None:
        sizes = (latent.kv_lora_rank, latent.qk_rope_head_dim)
        if sizes == CPU_LATENT_SIZES:
            return None
        return (
            f"kv_lora_rank and qk_rope_head_dim are {sizes[0]} and {sizes[1]}; vLLM's attention on CPUs takes "
            f"{CPU_LATENT_SIZES[0]} and {CPU_LATENT_SIZES[1]} alone, so this model, pruned or not, can be served on "
            "GPUs only"
        )
    if head_dim in CPU_HEAD_DIMS:
        return None
    return (
        f"head_dim is {head_dim}; vLLM's attention on CPUs takes {', '.join(map(str, CPU_HEAD_DIMS))} alone, so this "
        "model, pruned or not, can be served on GPUs only"
    )


def _is_mistral_repository(plan: Plan) -> bool:
    """Whether vLLM would read text for the dense model with mistral-common.

    It does so beside `consolidated*.safetensors`, which are not downloaded from the hub; there, Mistral's repositories
    have them.
    """
    dense = plan.source.companions
    if dense is None or not has_mistral_tokenizer(dense):
        return False
    return plan.source.hub_id is not None or any(dense.glob("consolidated*.safetensors"))
