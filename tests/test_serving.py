"""The oracle: a converted model served by vLLM computes what the masked dense model computes."""

import contextlib
import gc
import json
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import NUM_LAYERS, converted, masks_for, oracle, prompts, tiny_model
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

NUM_TOKENS = 12


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


def assert_serves_the_masked_model(directory, model, masks, site="product", **options) -> None:
    """Tokens equal, log-probabilities of prompt and output tokens within 1e-4."""
    params = SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, logprobs=5, prompt_logprobs=1, detokenize=False, ignore_eos=True
    )
    with engine(directory, **options) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts()], params, use_tqdm=False)
    for prompt, output in zip(prompts(), outputs, strict=True):
        tokens, expected = oracle(model, masks, site, prompt, NUM_TOKENS)
        assert list(output.outputs[0].token_ids) == tokens
        served = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        assert len(served) == len(expected) == len(prompt) + NUM_TOKENS - 1
        worst = max(
            abs(logprob.logprob - expected[position, token].item())
            for position, logprobs in enumerate(served)
            for token, logprob in logprobs.items()
        )
        assert worst < 1e-4, f"log-probabilities differ by up to {worst:.2e}"


def soft(generator: torch.Generator, count: int) -> torch.Tensor:
    """Mask values in (0, 8), as DDP learns them."""
    return 0.2 + 7.8 * torch.rand(count, generator=generator) ** 3


@dataclass(frozen=True)
class Geometry:
    """What the masks leave: KV heads of each layer by index, FFN width of each layer."""

    kv_heads: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]
    model_type: str = "llama"
    heads: tuple[int, int] = (6, 6)  # dense query and KV heads
    site: str = "product"
    negative: bool = False
    query_heads_kept: int | None = None  # of each group; None keeps all
    stock: bool = False  # expected: a stock architecture can say it
    config: dict = field(default_factory=dict)

    def model_and_masks(self):
        num_query_heads, num_kv_heads = self.heads
        group = num_query_heads // num_kv_heads
        model = tiny_model(self.model_type, num_query_heads, num_kv_heads, 100, **self.config)
        generator = torch.Generator().manual_seed(7)
        heads, channels = [], []
        for kept, width in zip(self.kv_heads, self.widths, strict=True):
            head_mask = torch.zeros(num_kv_heads, group)
            head_mask[list(kept), : self.query_heads_kept] = soft(
                generator, len(kept) * (self.query_heads_kept or group)
            ).view(len(kept), -1)
            channel_mask = torch.zeros(100)
            channel_mask[torch.randperm(100, generator=generator)[:width]] = soft(generator, width)
            heads.append(head_mask.flatten().tolist())
            channels.append(channel_mask)
        masks = masks_for(heads, channels)
        if self.negative:
            masks = {name: mask * torch.tensor([1.0, -1.0]).repeat(len(mask) // 2) for name, mask in masks.items()}
        return model, masks


MHA_RAGGED = ((0, 1, 2, 5), (3,), (0, 1, 2, 3, 4, 5))
GQA_RAGGED = ((0, 2), (1,), (0, 1, 2))
ODD_WIDTHS = (51, 1, 99)
BIASES = {"attention_bias": True, "mlp_bias": True}

GEOMETRIES = {
    "llama ragged": Geometry(MHA_RAGGED, ODD_WIDTHS),
    "llama gate and up": Geometry(MHA_RAGGED, ODD_WIDTHS, site="gate_and_up"),
    "llama negative masks": Geometry(MHA_RAGGED, ODD_WIDTHS, negative=True),
    "llama negative gate and up": Geometry(MHA_RAGGED, ODD_WIDTHS, site="gate_and_up", negative=True),
    "llama biases": Geometry(MHA_RAGGED, ODD_WIDTHS, config=BIASES),
    "llama biases gate and up": Geometry(MHA_RAGGED, ODD_WIDTHS, config=BIASES, site="gate_and_up"),
    "llama gqa": Geometry(GQA_RAGGED, ODD_WIDTHS, heads=(6, 3)),
    "llama gqa, one query head of each group": Geometry(GQA_RAGGED, ODD_WIDTHS, heads=(12, 3), query_heads_kept=1),
    "llama mqa": Geometry(((0,), (0,), (0,)), ODD_WIDTHS, heads=(6, 1), query_heads_kept=4),
    "llama one head left everywhere": Geometry(((5,), (0,), (2,)), (1, 1, 1), stock=True),
    "llama tied embeddings": Geometry(MHA_RAGGED, ODD_WIDTHS, config={"tie_word_embeddings": True}),
    "llama only soft": Geometry(((0, 1, 2, 3, 4, 5),) * NUM_LAYERS, (100,) * NUM_LAYERS, stock=True),
    "llama uniform": Geometry(((0, 1, 4), (1, 2, 3), (3, 4, 5)), (40, 40, 40), stock=True),
    "llama uniform with heads that llama refuses": Geometry(((0, 1, 2, 3, 4),) * NUM_LAYERS, (40, 40, 40), stock=True),
    "mistral ragged": Geometry(MHA_RAGGED, ODD_WIDTHS, "mistral", config={"sliding_window": None}),
    "mistral gqa, sliding window": Geometry(GQA_RAGGED, ODD_WIDTHS, "mistral", (6, 3), config={"sliding_window": 8}),
    "qwen2 biases": Geometry(MHA_RAGGED, ODD_WIDTHS, "qwen2"),
    "qwen2 gqa": Geometry(GQA_RAGGED, ODD_WIDTHS, "qwen2", (6, 3), site="gate_and_up"),
    "qwen2 uniform heads": Geometry(((0, 1), (1, 2), (0, 2)), (40, 40, 40), "qwen2", (6, 3)),
    "qwen2 nothing pruned": Geometry(((0, 1, 2),) * NUM_LAYERS, (100,) * NUM_LAYERS, "qwen2", (6, 3)),
    "qwen2 uniform widths, heads wider than hidden": Geometry(((0, 1, 2),) * NUM_LAYERS, (40, 40, 40), "qwen2", (6, 3)),
    "qwen2 uniform widths": Geometry(
        ((0, 1, 2),) * NUM_LAYERS, (40, 40, 40), "qwen2", (6, 3), config={"hidden_size": 192}, stock=True
    ),
    "qwen3 gqa": Geometry(GQA_RAGGED, ODD_WIDTHS, "qwen3", (6, 3)),
    "qwen3 mha": Geometry(MHA_RAGGED, ODD_WIDTHS, "qwen3", negative=True),
    "qwen3 gqa, 2 of 4 query heads": Geometry(GQA_RAGGED, ODD_WIDTHS, "qwen3", (12, 3), query_heads_kept=2),
    "qwen3 uniform": Geometry(((0, 1), (1, 2), (0, 2)), (33, 33, 33), "qwen3", (6, 3), stock=True),
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_served_model_is_the_masked_model(tmp_path, geometry):
    model, masks = geometry.model_and_masks()
    directory = converted(tmp_path, model, masks, geometry.site)
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"][0].startswith("Pruned") != geometry.stock
    assert_serves_the_masked_model(directory, model, masks, geometry.site)


@pytest.mark.parametrize("name", ["llama ragged", "qwen3 gqa"])
def test_compiled(tmp_path, name):
    model, masks = GEOMETRIES[name].model_and_masks()
    directory = converted(tmp_path, model, masks)
    assert_serves_the_masked_model(directory, model, masks, enforce_eager=False)


def test_kv_cache_capacity_grows_by_the_heads_removed(tmp_path):
    model, masks = GEOMETRIES["llama ragged"].model_and_masks()
    directory = converted(tmp_path, model, masks)
    model.save_pretrained(tmp_path / "dense")
    capacity = {}
    for name, where in (("dense", tmp_path / "dense"), ("pruned", directory)):
        with engine(where) as llm:
            cache = llm.llm_engine.vllm_config.cache_config
            capacity[name] = cache.num_gpu_blocks
            # 2 (key, value) * 18 heads before, 11 after * head_dim 32 * 4 bytes
            bytes_per_block = cache.block_size * 2 * {"dense": 18, "pruned": 11}[name] * 32 * 4
            assert cache.num_gpu_blocks == cache.kv_cache_memory_bytes // bytes_per_block
    assert capacity["pruned"] / capacity["dense"] == pytest.approx(18 / 11, rel=1e-3)


def rewrite(directory, change) -> None:
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_checkpoint_that_does_not_fit_is_refused_with_every_mismatch(tmp_path):
    """Stock vLLM truncates a tensor that is too large and leaves what is missing uninitialised."""
    model, masks = GEOMETRIES["llama ragged"].model_and_masks()
    directory = converted(tmp_path, model, masks)

    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(52, 96)
        tensors["model.layers.1.self_attn.q_proj.weight"] = torch.ones(64, 96)
        tensors["model.layers.2.mlp.extra.weight"] = torch.ones(3)
        del tensors["model.layers.2.self_attn.k_proj.weight"]

    rewrite(directory, change)
    with pytest.raises(ValueError, match="does not fit its config.json in 4 tensors") as error, engine(directory):
        pass
    for line in (
        "model.layers.0.mlp.up_proj.weight: the file has [52, 96], config.json says [51, 96]",
        "model.layers.1.self_attn.q_proj.weight: the file has [64, 96], config.json says [32, 96]",
        "model.layers.2.mlp.extra.weight [3]: not a tensor of this model",
        "model.layers.2.self_attn.k_proj.weight [192, 96]: missing",
    ):
        assert line in str(error.value)


def test_what_cannot_be_served_is_refused_with_a_sentence(tmp_path):
    model, masks = GEOMETRIES["qwen3 gqa"].model_and_masks()
    directory = converted(tmp_path, model, masks)
    config = json.loads((directory / "config.json").read_text())
    config["per_layer_config"]["0"] |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "query_heads_per_kv_head": [1, 3],
    }
    config["query_heads_per_kv_head"] = None  # Hugging Face wants every per-layer key at the top level too
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layer 0 has uneven query groups \[1, 3\]"), engine(directory):
        pass
