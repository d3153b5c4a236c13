"""Every way to generate with a loaded model gives the tokens of the masked dense model, whatever cache it uses."""

import pytest
import torch
from helpers.tiny import converted, masks_for, prompts, tiny_model
from transformers.cache_utils import Cache, QuantizedLayer

from learner.model.masking import apply_masks
from pruned_vllm.hf.loading import load_pruned

NUM_TOKENS = 6
UNEVEN, NONE = [1, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1], [0] * 12  # groups of 4 become [3, 1, 2]
WINDOW = {"sliding_window": 8}
LAYER_TYPES = {
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "use_sliding_window": True,
    **WINDOW,
}
MODELS = {  # model_type, which heads stay in each layer, config
    "no layer skipped": ("llama", [UNEVEN, UNEVEN, UNEVEN], {}),
    "first skipped": ("llama", [NONE, UNEVEN, UNEVEN], {}),
    "last skipped": ("llama", [UNEVEN, UNEVEN, NONE], {}),
    "all skipped": ("llama", [NONE, NONE, NONE], {}),
    "sliding window, first skipped": ("mistral", [NONE, UNEVEN, UNEVEN], WINDOW),
    "sliding window, all skipped": ("mistral", [NONE, NONE, NONE], WINDOW),
    "layer types, full attention skipped": ("qwen2", [NONE, UNEVEN, NONE], LAYER_TYPES),
    "layer types, sliding attention skipped": ("qwen3", [UNEVEN, NONE, UNEVEN], LAYER_TYPES),
}
CHUNKS = {"prefill_chunk_size": 4}  # which a static cache is allotted for before the first layer runs
WAYS = {
    "beams": {"num_beams": 3},
    "chunks": CHUNKS,
    "static cache": {"cache_implementation": "static"},
    "static cache, chunks": {"cache_implementation": "static", **CHUNKS},
    "static cache, beams, chunks": {"cache_implementation": "static", "num_beams": 3, **CHUNKS},
    "no cache": {"use_cache": False},
}


def masked_and_pruned(directory, name: str):
    model_type, heads, config = MODELS[name]
    model, masks = tiny_model(model_type, 12, 3, 40, **config), masks_for(heads, [])
    return model, masks, load_pruned(converted(directory, model, masks), dtype=torch.float32)


def generate(model, **options) -> torch.Tensor:
    batch = torch.tensor([prompts()[-1], prompts()[-1][::-1]])
    return model.generate(
        batch, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0, disable_compile=True, **options
    )


@pytest.mark.parametrize("name", MODELS)
def test_ways_to_generate(tmp_path, name):
    model, masks, pruned = masked_and_pruned(tmp_path, name)
    for way, options in WAYS.items():
        with apply_masks(model, masks):
            expected = generate(model, **options)
        assert torch.equal(generate(pruned, **options), expected), way


class GroupedLayer(QuantizedLayer):
    """Quantizes nothing, but like the real ones takes only what can be cut into groups."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        if tensor[0].numel() % self.q_group_size:
            raise ValueError(f"{list(tensor.shape)} has no groups of {self.q_group_size}")
        return tensor

    def _dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.mark.parametrize("name", ["first skipped", "last skipped", "all skipped"])
def test_quantized_cache(tmp_path, name):
    model, masks, pruned = masked_and_pruned(tmp_path, name)

    def cache() -> Cache:
        return Cache(layers=[GroupedLayer(q_group_size=32, residual_length=4) for _ in range(3)])

    with apply_masks(model, masks):
        expected = generate(model, past_key_values=cache())
    assert torch.equal(generate(pruned, past_key_values=cache()), expected)
