"""llama.cpp itself, where llama-cpp-python is installed, on what convert-pruned export writes.

pip install llama-cpp-python, into an environment of your own: it compiles llama.cpp.
"""

import numpy as np
import pytest
import torch
from helpers.gguf_cases import CASES, export
from helpers.tiny import converted, prompts

from learner.model.masking import apply_masks

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.slow
NUM_TOKENS = 8


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_says_what_the_masked_model_says(tmp_path, name):
    """Greedy tokens equal, log-probabilities within 1e-4, with a KV cache in float32."""
    model, masks = CASES[name].model_and_masks()
    assert export(converted(tmp_path, model, masks), tmp_path / "model.gguf") == 0
    cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    path = str(tmp_path / "model.gguf")
    served = llama_cpp.Llama(path, n_ctx=64, n_threads=1, logits_all=True, verbose=False, **cache)
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
