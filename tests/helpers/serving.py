"""Pruned models served by vLLM in this process, held to the oracle; and the table of what the masks may leave."""

import contextlib
import copy
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from helpers.tiny import masks_for, oracle, prompts, tiny_model
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams, _custom_ops
from vllm.distributed import cleanup_dist_env_and_memory

from pruned_vllm.formats.linear_attention import FULL, LINEAR

NUM_TOKENS = 12
WIDTH = 100  # FFN channels of the dense models


def rotary_embedding_as_on_cuda(positions, query, key, head_size, *args, **kwargs) -> None:
    """vLLM's op, with the check that its CUDA kernel makes and its CPU kernel does not."""
    heads, kv_heads = query.shape[-1] // head_size, key.shape[-1] // head_size
    assert query.dim() > 2 or heads % kv_heads == 0, f"{heads} query heads for {kv_heads} KV heads"
    ROTARY_EMBEDDING(positions, query, key, head_size, *args, **kwargs)


ROTARY_EMBEDDING = _custom_ops.rotary_embedding
_custom_ops.rotary_embedding = rotary_embedding_as_on_cuda


@contextlib.contextmanager
def engine(directory, **options):
    """An in-process vLLM engine."""
    llm = LLM(
        str(directory),
        **{
            "dtype": "float32",
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "max_model_len": 128,
            "max_num_seqs": 8,
        }
        | options,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(llm: LLM, alone: bool = False, **options) -> list:
    """The outputs of `prompts()`, greedy, with log-probabilities.

    Args:
        alone: whether each prompt comes when the one before is done.
    """
    defaults = {"temperature": 0, "max_tokens": NUM_TOKENS, "logprobs": 5, "prompt_logprobs": 1}
    params = SamplingParams(**defaults | options, detokenize=False, ignore_eos=True)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts()]
    batches = [[prompt] for prompt in inputs] if alone else [inputs]
    return [output for batch in batches for output in llm.generate(batch, params, use_tqdm=False)]


def assert_computes(outputs, log_probabilities: Callable[[list[int]], torch.Tensor]) -> None:
    """Tokens equal, log-probabilities of prompt and output tokens within 1e-4.

    Args:
        log_probabilities: tokens -> [len(tokens) - 1, vocabulary], of what follows each token but the last.
    """
    for prompt, output in zip(prompts(), outputs, strict=True):
        served_tokens = list(output.outputs[0].token_ids)
        expected = log_probabilities([*prompt, *served_tokens])
        assert served_tokens == expected[len(prompt) - 1 :].argmax(-1).tolist() and len(served_tokens) == NUM_TOKENS
        served = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        assert len(served) == len(expected) == len(prompt) + NUM_TOKENS - 1
        differences = [
            abs(logprob.logprob - expected[position, token].item())
            for position, logprobs in enumerate(served)
            for token, logprob in logprobs.items()
        ]
        assert all(difference < 1e-4 for difference in differences), f"up to {max(differences):.2e}"  # NaN fails too


def assert_is_as_near_as_bfloat16(outputs, model, masks, site="product") -> None:
    """Log-probabilities of prompt and output tokens are, on average, as near to those of the masked model as its own in
    bfloat16 are.

    For what vLLM computes in bfloat16 alone. Tokens may differ: two are as likely as each other now and then.
    """
    rounded, served_differences, rounded_differences = copy.deepcopy(model).bfloat16(), [], []
    for prompt, output in zip(prompts(), outputs, strict=True):
        tokens = [*prompt, *output.outputs[0].token_ids]
        exact = oracle(model, masks, site, tokens[:1], tokens[1:])[1]
        in_bfloat16 = oracle(rounded, masks, site, tokens[:1], tokens[1:])[1].float()
        served = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        assert len(served) == len(exact) == len(prompt) + NUM_TOKENS - 1
        for position, logprobs in enumerate(served):
            for token, logprob in logprobs.items():
                served_differences.append(abs(logprob.logprob - exact[position, token].item()))
                rounded_differences.append(abs(in_bfloat16[position, token] - exact[position, token]).item())
    mean, allowed = (torch.tensor(found).mean().item() for found in (served_differences, rounded_differences))
    assert mean < 1.5 * allowed + 0.01, f"{mean:.3f} on average, in bfloat16 {allowed:.3f}"  # NaN fails too
    assert allowed < 0.25, f"{allowed:.3f}: the model is too sensitive for bfloat16 to tell anything"


def assert_is_the_masked_model(outputs, model, masks, site="product") -> None:
    assert_computes(outputs, lambda tokens: oracle(model, masks, site, tokens[:1], tokens[1:])[1])


def assert_serves_the_masked_model(directory, model, masks, site="product", **options) -> None:
    """Exactly in float32. vLLM's CPU kernels for linear attention know bfloat16 alone: there as near as that can be."""
    (architecture,) = json.loads((Path(directory) / "config.json").read_text())["architectures"]
    if architecture.startswith("Qwen3_5"):
        pytest.importorskip("torchvision", reason="vLLM's own Qwen3.5 imports it")
    has_linear_attention = LINEAR in (getattr(model.config, "layer_types", None) or [])
    with engine(directory, **({"dtype": "bfloat16"} if has_linear_attention else {}) | options) as llm:
        outputs = generate(llm)
    compare = assert_is_as_near_as_bfloat16 if has_linear_attention else assert_is_the_masked_model
    compare(outputs, model, masks, site)


def soft(generator: torch.Generator, count: int) -> torch.Tensor:
    """Mask values in (0, 8), as DDP learns them."""
    return 0.2 + 7.8 * torch.rand(count, generator=generator) ** 3


@dataclass(frozen=True)
class Geometry:
    """What the masks leave of a model: for each layer the query heads that each KV head keeps, and the FFN width."""

    groups: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]
    model_type: str = "llama"
    group: int = 1  # query heads of each KV head in the dense model
    site: str = "product"
    negative: bool = False
    stock: bool = False  # expected: a stock architecture can say it
    config: dict = field(default_factory=dict)

    def model_and_masks(self):
        kv_heads = len(self.groups[0])
        config = {"num_hidden_layers": len(self.groups)} | self.config
        model = tiny_model(self.model_type, kv_heads * self.group, kv_heads, WIDTH, **config)
        generator = torch.Generator().manual_seed(7)
        heads, channels = [], []
        for kept, width in zip(self.groups, self.widths, strict=True):
            head_mask = torch.zeros(kv_heads, self.group)
            for kv_head, count in enumerate(kept):
                chosen = torch.randperm(self.group, generator=generator)[:count]
                head_mask[kv_head, chosen] = soft(generator, count)
            channel_mask = torch.zeros(WIDTH)
            channel_mask[torch.randperm(WIDTH, generator=generator)[:width]] = soft(generator, width)
            heads.append(head_mask.flatten().tolist())
            channels.append(channel_mask)
        masks = masks_for(heads, channels, model)
        if self.negative:
            masks = {name: mask * torch.tensor([1.0, -1.0]).repeat(len(mask) // 2) for name, mask in masks.items()}
        return model, masks


ALL = (1, 1, 1, 1, 1, 1)
MHA = ((1, 1, 1, 0, 0, 1), (0, 0, 0, 1, 0, 0), ALL)
GQA = ((2, 0, 2), (0, 2, 0), (2, 2, 2))
UNEVEN = ((3, 1, 0, 4), (1, 0, 0, 2), (4, 3, 2, 1))  # groups of 4
NONE = (0, 0, 0, 0, 0, 0)
ODD = (51, 1, 99)
BIASES = {"attention_bias": True, "mlp_bias": True}
LAYER_TYPES = {
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 8,
    "use_sliding_window": True,
}
FULL_ATTENTION = {"layer_types": [FULL] * 3}  # what vLLM computes in float32 on CPUs, too
QWEN3_BIAS = {"attention_bias": True}
# For layers that norm what few channels add, which makes rounding larger: where one is left, Hugging Face's own float32
# is up to 3e-4 away from float64, and over 1e-4 for 4 % of random prompts. With 20 it is 7e-5, for Llama's layer 2e-5.
NOT_FEW = (51, 20, 99)
# Keys that Hugging Face's Llama ignores and vLLM acts on.
VLLM_ONLY = {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3, "logit_scale": 0.5, "rotary_pct": 0.5}

GEOMETRIES = {
    "llama ragged": Geometry(MHA, ODD),
    "llama gate and up": Geometry(MHA, ODD, site="gate_and_up"),
    "llama negative masks": Geometry(MHA, ODD, negative=True),
    "llama negative gate and up": Geometry(MHA, ODD, site="gate_and_up", negative=True),
    "llama biases": Geometry(MHA, ODD, config=BIASES),
    "llama biases gate and up": Geometry(MHA, ODD, config=BIASES, site="gate_and_up"),
    "llama gqa, keys that vLLM alone acts on": Geometry(GQA, ODD, group=2, config=VLLM_ONLY),
    "llama gqa, one query head of each group": Geometry(((1, 0, 1), (0, 1, 0), (1, 1, 1)), ODD, group=4),
    "llama mqa": Geometry(((4,), (1,), (3,)), ODD, group=6),
    "llama one head left everywhere": Geometry(
        ((0, 0, 0, 0, 0, 1), (1, 0, 0, 0, 0, 0), (0, 0, 1, 0, 0, 0)), (1, 1, 1), stock=True
    ),
    "llama tied embeddings": Geometry(MHA, ODD, config={"tie_word_embeddings": True}),
    "llama only soft": Geometry((ALL,) * 3, (100,) * 3, stock=True),
    "llama uniform, keys that vLLM alone acts on": Geometry(
        ((1, 1, 0, 0, 1, 0), (0, 1, 1, 1, 0, 0), (0, 0, 0, 1, 1, 1)), (40,) * 3, config=VLLM_ONLY, stock=True
    ),
    "llama uniform with heads that llama refuses": Geometry(((1, 1, 1, 1, 1, 0),) * 3, (40,) * 3),
    "llama uneven groups": Geometry(UNEVEN, ODD, group=4),
    "llama uneven groups, biases": Geometry(UNEVEN, ODD, group=4, config=BIASES, site="gate_and_up"),
    "llama uneven groups, negative masks": Geometry(UNEVEN, ODD, group=4, negative=True),
    "llama very uneven groups": Geometry(((8, 1), (1, 8), (0, 5)), ODD, group=8),
    "llama the same uneven groups everywhere": Geometry(((3, 1, 2),) * 3, (40,) * 3, group=4),
    "llama no attention in the first layer": Geometry((NONE, *MHA[1:]), ODD),
    "llama no mlp in the first layer": Geometry(MHA, (0, 51, 99)),
    "llama nothing in the first layer": Geometry((NONE, *MHA[1:]), (0, 51, 99)),
    "llama nothing in the last layer": Geometry((*MHA[:2], NONE), (51, 1, 0)),
    # vLLM's CPU attention has no heads of 24 numbers: nothing may ask it for some.
    "llama no attention at all": Geometry((NONE,) * 3, ODD, config={"head_dim": 24}),
    "llama no mlp at all": Geometry(MHA, (0, 0, 0)),
    "llama nothing at all": Geometry((NONE,) * 3, (0, 0, 0)),
    "llama biases survive the first layer": Geometry((NONE, *MHA[1:]), (0, 51, 99), config=BIASES),
    "llama biases survive everywhere": Geometry((MHA[0], NONE, NONE), (0, 51, 0), config=BIASES),
    "llama more than ten layers": Geometry(MHA * 4, ODD * 4),
    "mistral ragged": Geometry(MHA, ODD, "mistral", config={"sliding_window": None}),
    "mistral gqa, sliding window": Geometry(GQA, ODD, "mistral", 2, config={"sliding_window": 8}),
    "mistral uneven groups, sliding window": Geometry(UNEVEN, ODD, "mistral", 4, config={"sliding_window": 8}),
    "mistral skips": Geometry((NONE, MHA[0], MHA[1]), (51, 0, 99), "mistral", config={"sliding_window": None}),
    "qwen2 biases": Geometry(MHA, ODD, "qwen2"),
    "qwen2 gqa": Geometry(GQA, ODD, "qwen2", 2, site="gate_and_up"),
    "qwen2 uneven groups": Geometry(UNEVEN, ODD, "qwen2", 4),
    "qwen2 skips": Geometry((NONE, MHA[0], MHA[1]), (0, 51, 99), "qwen2"),
    "qwen2 uniform heads": Geometry(((2, 2, 0), (0, 2, 2), (2, 0, 2)), (40,) * 3, "qwen2", 2),
    "qwen2 nothing pruned": Geometry(((2, 2, 2),) * 3, (100,) * 3, "qwen2", 2),
    "qwen2 uniform widths, heads wider than hidden": Geometry(((2, 2, 2),) * 3, (40,) * 3, "qwen2", 2),
    "qwen2 uniform widths": Geometry(((2, 2, 2),) * 3, (40,) * 3, "qwen2", 2, config={"hidden_size": 192}, stock=True),
    "qwen3 gqa": Geometry(GQA, ODD, "qwen3", 2),
    "qwen3 mha": Geometry(MHA, ODD, "qwen3", negative=True),
    "qwen3 gqa, 2 of 4 query heads": Geometry(((2, 0, 2), (0, 2, 0), (2, 2, 2)), ODD, "qwen3", 4),
    "qwen3 uniform": Geometry(((2, 2, 0), (0, 2, 2), (2, 0, 2)), (33,) * 3, "qwen3", 2, stock=True),
    "qwen3 uneven groups": Geometry(UNEVEN, ODD, "qwen3", 4),
    "qwen3 very uneven groups": Geometry(((8, 1), (1, 8), (0, 5)), ODD, "qwen3", 8, site="gate_and_up"),
    "qwen3 skips": Geometry(((0, 0, 0, 0), UNEVEN[0], UNEVEN[1]), (0, 51, 0), "qwen3", 4),
    "qwen3 biases, uneven groups": Geometry(UNEVEN, ODD, "qwen3", 4, config=QWEN3_BIAS),
    "qwen2 uneven groups, a layer with a sliding window": Geometry(UNEVEN, ODD, "qwen2", 4, config=LAYER_TYPES),
    "qwen3 uneven groups, a layer with a sliding window": Geometry(UNEVEN, ODD, "qwen3", 4, config=LAYER_TYPES),
    "qwen3 biases, skips": Geometry((NONE, *MHA[1:]), ODD, "qwen3", config=QWEN3_BIAS),
    "granite uneven groups, biases": Geometry(UNEVEN, ODD, "granite", 4, config=BIASES),
    "granite skips": Geometry((NONE, MHA[0], MHA[1]), (0, 51, 99), "granite"),
    "granite uniform": Geometry(((2, 2, 0), (0, 2, 2), (2, 0, 2)), (33,) * 3, "granite", 2, stock=True),
    "gemma3 gqa": Geometry(GQA, NOT_FEW, "gemma3_text", 2, site="gate_and_up"),
    "gemma3 uniform": Geometry(((2, 2, 0), (0, 2, 2), (2, 0, 2)), (33,) * 3, "gemma3_text", 2, stock=True),
    "gemma3 uneven groups, biases": Geometry(UNEVEN, NOT_FEW, "gemma3_text", 4, config=QWEN3_BIAS),
    "gemma3 skips": Geometry((NONE, MHA[0], NONE), (51, 0, 0), "gemma3_text"),
    "phi3 ragged": Geometry(MHA, ODD, "phi3", negative=True),
    "phi3 uneven groups, sliding window": Geometry(UNEVEN, ODD, "phi3", 4, config={"sliding_window": 8}),
    "phi3 skips, half of a head rotated": Geometry(
        (NONE, *MHA[1:]), (0, 51, 0), "phi3", config={"partial_rotary_factor": 0.5}
    ),
    "qwen3.5 uneven groups": Geometry(UNEVEN, ODD, "qwen3_5_text", 4),
    "qwen3.5 uneven groups, full attention alone": Geometry(UNEVEN, ODD, "qwen3_5_text", 4, config=FULL_ATTENTION),
    "qwen3.5 gqa, biases": Geometry(GQA, ODD, "qwen3_5_text", 2, site="gate_and_up", config=QWEN3_BIAS),
    "qwen3.5 skips, tied": Geometry(
        ((0, 0, 0, 0), UNEVEN[1], UNEVEN[0]), (51, 0, 99), "qwen3_5_text", 4, config={"tie_word_embeddings": True}
    ),
    "ministral3 uneven groups": Geometry(UNEVEN, ODD, "ministral3", 4),
    "ministral3 skips, sliding window": Geometry(
        (NONE, *MHA[1:]), (0, 51, 0), "ministral3", config={"sliding_window": 8}
    ),
}


def rewrite(directory, change) -> None:
    """Lets `change` edit the tensors of a model that is one file."""
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
