"""Answers of a causal language model to prompts, many at once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from learner.model.remote_code import brings_code
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json


def end_tokens(directory: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the tokens that end an answer, as the files of a model directory and its tokenizer name them."""
    found = {tokenizer.eos_token_id}
    for name in ("config.json", "generation_config.json"):
        if (directory / name).is_file():
            named = read_json(directory / name).get("eos_token_id")
            found |= set(named if isinstance(named, list) else [named])
    return tuple(sorted(found - {None}))


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    end: Sequence[int],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    device: torch.device | None = None,
) -> list[list[int]]:
    """Token ids of an answer to each prompt, its end token included where there is one.

    Args:
        model: in evaluation mode.
        prompts: token ids, none empty; all are answered in one batch.
        new_tokens: of an answer at most. Fewer where the model has no more positions.
        end: tokens that end an answer.
        temperature: of the draw, from all tokens; 0 takes the likeliest token.
        seed: of the draw.
        device: where the model computes; None is that of its weights.

    Raises:
        InputError: a prompt fills all positions that the model was made for, or the model brings code of its own.
    """
    if brings_code(model):
        raise InputError("the code that comes with the model cannot generate text with this version of Transformers")
    longest = max(map(len, prompts))
    positions = getattr(model.config, "max_position_embeddings", None) or longest + new_tokens
    if positions <= longest:
        raise InputError(f"a prompt has {longest} tokens, and the model {positions} positions: none is left to answer")
    padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    attended = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    settings = GenerationConfig(
        max_new_tokens=min(new_tokens, positions - longest),
        eos_token_id=list(end) or None,
        pad_token_id=end[0] if end else 0,
        **sampling,
    )
    device = device or model.device
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(forked), _generation_settings(model, settings):
        torch.manual_seed(seed)
        attention_mask = torch.tensor(attended, device=device)
        tokens = model.generate(torch.tensor(padded, device=device), attention_mask=attention_mask)
    return [_until_end(answer, end) for answer in tokens[:, longest:].tolist()]


def _until_end(answer: list[int], end: Sequence[int]) -> list[int]:
    places = [place for place, token in enumerate(answer) if token in end]
    return answer[: places[0] + 1] if places else answer


@contextmanager
def _generation_settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Nothing but `settings` while the block runs: a model's own, such as a repetition penalty, would mix with them."""
    before, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = before
