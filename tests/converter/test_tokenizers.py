"""Text in, same ids out: what AutoTokenizer and vLLM make of the dense directory they make of the converted one."""

import pytest
import torch
from helpers.masked import convert_pruned
from helpers.text import TOKENIZERS, tokens_of
from helpers.tiny import masks_for, tiny_model, write_masked
from transformers import AutoTokenizer

OUTCOMES = {  # query heads kept of 6, FFN channels kept of 40, in each of three layers
    "stock": ([3, 3, 3], [8, 8, 8]),
    "ragged": ([4, 1, 6], [17, 1, 20]),
    "as many heads as Llama's config refuses": ([5, 5, 5], [40, 40, 40]),
}


def written(directory, model_type: str, outcome: str, tokenizer: str):
    """A dense directory with a tokenizer, and the converted one."""
    heads, channels = OUTCOMES[outcome]
    masks = masks_for(
        [[1.0] * kept + [0.0] * (6 - kept) for kept in heads], [torch.arange(40) < kept for kept in channels]
    )
    dense = write_masked(directory / "dense", tiny_model(model_type, 6, 6, 40), masks)
    TOKENIZERS[tokenizer](dense)
    assert convert_pruned(dense, directory / "out") == 0
    return dense, directory / "out"


@pytest.fixture(scope="module")
def get_tokenizer():
    """vLLM's loader, which knows the plugin's architectures."""
    from vllm.tokenizers import get_tokenizer

    return get_tokenizer


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_text_becomes_the_same_tokens(tmp_path, get_tokenizer, tokenizer, outcome):
    model_type = "qwen2" if "Qwen2" in tokenizer else "llama"
    dense, out = written(tmp_path, model_type, outcome, tokenizer)
    expected = tokens_of(AutoTokenizer.from_pretrained(dense))
    assert tokens_of(AutoTokenizer.from_pretrained(out)) == expected
    served = [tokens_of(get_tokenizer(directory)) for directory in (dense, out)]
    assert served[0] == served[1]


@pytest.mark.parametrize("model_type", ["mistral", "qwen3"])
def test_other_families_keep_their_tokenizer(tmp_path, get_tokenizer, model_type):
    dense, out = written(tmp_path, model_type, "ragged", "normalizer, LlamaTokenizer")
    for load in (AutoTokenizer.from_pretrained, get_tokenizer):
        assert tokens_of(load(out)) == tokens_of(load(dense))
