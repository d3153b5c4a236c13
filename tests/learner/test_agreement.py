"""Agreement with the dense model, against answers and probabilities that are made token by token."""

import json
from pathlib import Path

import pytest
import torch
from helpers.chat import with_template
from helpers.tiny import byte_tokenizer, masks_for, tiny_model

from learner.data.prompts import AGREEMENT_PROMPTS, GENERATION_PROMPTS, prompt_tokens
from learner.job import Job
from learner.model.agreement import ANSWER_TOKENS, Reference
from learner.model.dense import DenseModel, load_dense
from learner.model.generation import end_tokens, generate
from learner.model.masking import apply_masks
from pruned_vllm.common.errors import InputError

END = list(range(0, 256, 6))  # so many that some answers end early
NUM_PROMPTS = 5
# Norms and caches of all kinds that see padding, and a head that divides logits. With each a mask of one head in every
# layer, which changes some of the answers.
MODELS = {"llama": 0.95, "qwen3_moe": 0.95, "qwen3_next": 0.95, "granite": 0.95, "gemma3_text": -4.0}


def dense_of(directory: Path, name: str = "llama", end: list[int] = END, **config) -> DenseModel:
    tiny_model(name, 6, 3, 40, **config).save_pretrained(directory)
    with_template(byte_tokenizer()).save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": end, "repetition_penalty": 9.0}))
    return load_dense(Job(model=str(directory), method="magnitude"), "cpu")


@torch.no_grad()
def greedy(model, prompt: list[int], end: tuple[int, ...]) -> list[int]:
    answer: list[int] = []
    while len(answer) < ANSWER_TOKENS and (not answer or answer[-1] not in end):
        answer.append(model(torch.tensor([prompt + answer])).logits[0, -1].argmax().item())
    return answer


def prefix(one: list[int], other: list[int]) -> int:
    return next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "gemma3_text" else ()) for name in MODELS]
)
def test_agreement_is_that_of_answers_made_token_by_token(tmp_path, name):
    dense = dense_of(tmp_path, name)
    model, end = dense.model, end_tokens(dense.directory, dense.tokenizer)
    assert set(end) == {*END, dense.tokenizer.eos_token_id}
    prompts = prompt_tokens(dense.tokenizer, AGREEMENT_PROMPTS[:NUM_PROMPTS])
    answers = [greedy(model, prompt, end) for prompt in prompts]
    reference = Reference.of(dense, NUM_PROMPTS, print)
    assert [answer.tokens.tolist() for answer in reference.answers] == [
        prompt + answer for prompt, answer in zip(prompts, answers, strict=True)
    ]
    masks = masks_for([[1, 1, MODELS[name], 1, 1, 1]] * 3, [], model)
    with apply_masks(model, masks):
        found = reference.agreement(model)
        ours = [greedy(model, prompt, end) for prompt in prompts]
    same, kl = [], []
    for prompt, answer, our in zip(prompts, answers, ours, strict=True):
        same.append(prefix(answer, our))
        tokens, places = torch.tensor([prompt + answer]), slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        with torch.no_grad():
            p = model(tokens).logits[0, places].double().softmax(-1)
            with apply_masks(model, masks):
                q = model(tokens).logits[0, places].double().softmax(-1)
        kl += (p * (p / q).log()).sum(-1).tolist()
    assert found["agreement_tokens"] == pytest.approx(sum(same) / NUM_PROMPTS)
    assert found["answer_tokens"] == pytest.approx(sum(map(len, answers)) / NUM_PROMPTS)
    assert found["agreement_kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert 0 < found["agreement_tokens"] < found["answer_tokens"]
    itself = reference.agreement(model)
    assert itself["agreement_tokens"] == itself["answer_tokens"] and abs(itself["agreement_kl"]) < 1e-6


def test_the_dense_model_may_change_but_for_its_head(tmp_path):
    """Tyr and MaskPrune change weights of the model that the reference was made on."""
    dense = dense_of(tmp_path)
    reference, other = Reference.of(dense, NUM_PROMPTS, print), tiny_model("llama", 6, 3, 40)
    other.model.layers[0].mlp.down_proj.weight *= 0.9
    expected = reference.agreement(other)
    dense.model.model.layers[0].mlp.down_proj.weight *= 0.9
    assert reference.agreement(dense.model) == pytest.approx(expected) and expected["agreement_kl"] > 0


@pytest.mark.parametrize(
    ("config", "prompts", "message"),
    [
        ({}, 0, None),
        ({"vocab_size": 100}, 5, "makes token"),
        ({"max_position_embeddings": 40}, 50, "none is left to answer"),
    ],
)
def test_where_agreement_cannot_be_measured_the_run_goes_on(tmp_path, config, prompts, message):
    dense, told = dense_of(tmp_path, end=[1], vocab_size=config.get("vocab_size", 256)), []
    dense.model.config.max_position_embeddings = config.get("max_position_embeddings", 256)
    assert Reference.of(dense, prompts, told.append) is None
    assert [message in text for text in told] == [True] * bool(message)


def test_prompts():
    assert len(set(AGREEMENT_PROMPTS)) == 50 and len(set(GENERATION_PROMPTS)) == len(GENERATION_PROMPTS) > 1000
    assert not {prompt.lower() for prompt in AGREEMENT_PROMPTS} & {prompt.lower() for prompt in GENERATION_PROMPTS}
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(prompt_tokens(tokenizer, ["Hi!"])[0]) == "Hi!"
    chat = with_template(tokenizer)
    assert tokenizer.decode(prompt_tokens(chat, ["Hi!"])[0]) == "<user>Hi!~<assistant>"
    chat.chat_template = "{{ raise_exception('no such turn') }}"
    with pytest.raises(InputError, match="chat template cannot be used.*no such turn"):
        prompt_tokens(chat, ["Hi!"])


def test_draws_depend_on_the_seed_alone_and_follow_the_probabilities(tmp_path):
    dense = dense_of(tmp_path)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    draw = [generate(dense.model, [[5, 9]] * 2000, 1, (), temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2] and torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        expected = (dense.model(torch.tensor([[5, 9]])).logits[0, -1] / 2).softmax(-1)
    shares = torch.bincount(torch.tensor([answer[0] for answer in draw[0]]), minlength=256) / 2000
    assert (shares - expected).abs().sum() / 2 < 0.15  # total variation
