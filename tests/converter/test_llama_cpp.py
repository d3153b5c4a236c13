"""llama.cpp itself, where llama-cpp-python is installed, on what convert-pruned export writes.

pip install llama-cpp-python, into an environment of your own: it compiles llama.cpp. Last run with 0.3.36.
"""

import numpy as np
import pytest
import torch
from helpers.gguf_cases import CASES, MHA, export
from helpers.gguf_tokenizers import TOKENIZERS, sentencepiece_model
from helpers.tiny import converted, masks_for, prompts, tiny_model

from learner.model.masking import apply_masks

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.slow
NUM_TOKENS = 8
SENTENCES = (
    "the lazy dog, 123456 times: doesn't IT'S?\n\n  two spaces\t\ttabs   ",
    "öäü 你好 \U0001f999\U0001f999 3.14159\r\nend ",
    "a",
)


def loaded(path):
    cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    return llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False, **cache)


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_says_what_the_masked_model_says(tmp_path, name):
    """Greedy tokens equal, log-probabilities within 1e-4, with a KV cache in float32."""
    model, masks = CASES[name].model_and_masks()
    assert export(converted(tmp_path, model, masks), tmp_path / "model.gguf") == 0
    served = loaded(tmp_path / "model.gguf")
    for prompt in prompts():
        served.reset()
        tokens = list(prompt)
        served.eval(tokens)
        for _ in range(NUM_TOKENS):
            tokens.append(int(np.argmax(served.scores[len(tokens) - 1])))
            served.eval(tokens[-1:])
        with torch.no_grad(), apply_masks(model, masks):
            expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        found = torch.from_numpy(served.scores[: len(tokens)].copy()).log_softmax(-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert tokens[len(prompt) :] == expected[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("name", [*TOKENIZERS, "sentencepiece"])
def test_llama_cpp_reads_text_as_the_tokenizer_does(tmp_path, name):
    model = tiny_model("llama", 4, 4, 40, vocab_size=320)
    out = converted(tmp_path, model, masks_for([list(kept) for kept in MHA], []))
    if name == "sentencepiece":
        processor = sentencepiece_model(out)
        expected = [processor.encode(text) for text in SENTENCES]
    else:
        tokenizer = TOKENIZERS[name]()
        tokenizer.save_pretrained(out)
        expected = [tokenizer.encode(text, add_special_tokens=False) for text in SENTENCES]
    assert export(out, tmp_path / "model.gguf") == 0
    served = loaded(tmp_path / "model.gguf")
    found = [served.tokenize(text.encode(), add_bos=False) for text in SENTENCES]
    assert found == expected
