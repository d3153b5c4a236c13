"""A model that lost hidden dimensions, in an engine."""

import json

import pytest
import torch
from helpers.l0 import Shape, lora_weights, merged
from helpers.llama import Rules, logits
from helpers.masked import convert_pruned
from helpers.serving import NUM_TOKENS, engine, generate
from helpers.tiny import prompts


@pytest.mark.slow
def test_served_model_is_the_masked_model(tmp_path):
    """What NutePrune writes; 108 of 128 dimensions are left, which is no multiple of 8."""
    shape = Shape((2, 0, 4), (11, 37, 0), 106, head_dim=32)
    model, zs = shape.model(), {key: mask.detach() for key, mask in shape.zs().items()}
    lora = lora_weights(model.state_dict(), 8, "q_proj", "v_proj")
    model.save_pretrained(tmp_path / "base")
    torch.save(zs, tmp_path / "zs.pt")
    torch.save(lora, tmp_path / "lora_weights.pt")
    args = ("--from", "nuteprune", "--base-model", tmp_path / "base")
    assert convert_pruned(tmp_path / "zs.pt", tmp_path / "out", *args) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 108
    with engine(tmp_path / "out") as llm:
        outputs = generate(llm)
    tensors, hidden = merged(model.state_dict(), lora, 1), zs["hidden_z"]
    rules = Rules(
        heads=dict(enumerate(zs["head_z"].flatten(1))),
        channels=dict(enumerate(zs["intermediate_z"].flatten(1))),
        embedding=hidden,
        outputs=hidden,
        divisor=4096,
    )
    for prompt, output in zip(prompts(), outputs, strict=True):
        served = list(output.outputs[0].token_ids)
        expected = logits(tensors, 32, [*prompt, *served[:-1]], rules).log_softmax(-1)
        assert served == expected[-NUM_TOKENS:].argmax(-1).tolist()
        for position, logprobs in enumerate([*output.prompt_logprobs[1:], *output.outputs[0].logprobs]):
            for token, logprob in logprobs.items():
                assert logprob.logprob == pytest.approx(expected[position, token].item(), abs=1e-4)
