"""What is asked of a server: prompts, and how many tokens answer each.

`chat` imitates ShareGPT as vLLM's own benchmark takes it: the first question of a conversation and the length of its
first answer, at least 4 tokens each, a question of at most 1024 tokens, 2048 together. Of 1,000 such conversations
vLLM's users report 215 to 230 thousand input and 198 to 203 thousand output tokens, by tokenizer (229,711 and 203,068
in vLLM pull request 18566). Both lengths are drawn from log-normal distributions that have means of 217 and 198 tokens
within these bounds. How wide they are is an assumption: sigma 1.5 for questions, which go from a few words to a pasted
file, and 1.0 for answers.

`long-context` fills the context: questions of 5/8 to 7/8 of it, answers of 1/16 to 1/8, all equally likely. It is what
asking about a long document looks like, and where a cache of keys and values is full first.

Whatever does not fit into the context is drawn again, so a small one makes both shorter.
"""

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json

SMALLEST_LENGTH = 4  # these three are what vLLM's benchmark keeps of ShareGPT
LARGEST_INPUT = 1024
LARGEST_TOTAL = 2048
CHAT_INPUT_MEDIAN, CHAT_INPUT_SIGMA = 155, 1.5
CHAT_OUTPUT_MEDIAN, CHAT_OUTPUT_SIGMA = 124, 1.0
SHAREGPT_FORMAT = '[{"conversations": [{"from": "human", "value": "..."}, ...]}, ...]'
SMALLEST_CONTEXT = 64  # tokens; below, hardly any draw would fit
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")

Lengths = tuple[int, int]  # of the input and of the output, in tokens


@dataclass(frozen=True)
class Request:
    """A prompt, as text or as token ids, and its lengths in tokens; exactly `output_len` are generated."""

    prompt: str | list[int]
    input_len: int
    output_len: int


def workload(text: str) -> str:
    """Type of a command line argument."""
    if text not in ("chat", "long-context"):
        try:
            _fixed_lengths(text)
        except ValueError:
            message = f"{text!r} is neither chat nor long-context nor INPUT:OUTPUT, two numbers of tokens"
            raise argparse.ArgumentTypeError(message) from None
    return text


def _fixed_lengths(text: str) -> Lengths:
    input_len, output_len = map(int, text.split(":"))
    if min(input_len, output_len) < 1:
        raise ValueError(text)
    return input_len, output_len


def draw_lengths(kind: str, count: int, max_model_len: int, seed: int = 0) -> list[Lengths]:
    """`count` pairs of lengths; the same for the same arguments. Raises InputError when the context is too short."""
    if kind not in ("chat", "long-context"):
        lengths = _fixed_lengths(kind)
        if sum(lengths) > max_model_len:
            raise InputError(
                f"--workload {kind} needs {sum(lengths)} tokens of context; --max-model-len allows {max_model_len}"
            )
        return [lengths] * count
    if max_model_len < SMALLEST_CONTEXT:
        raise InputError(
            f"--max-model-len {max_model_len} is too short for --workload {kind}; it needs {SMALLEST_CONTEXT}"
        )
    generator = random.Random(seed)
    draw = _draw_chat if kind == "chat" else _draw_long_context
    return [draw(generator, max_model_len) for _ in range(count)]


def _draw_chat(generator: random.Random, max_model_len: int) -> Lengths:
    while True:
        input_len = round(generator.lognormvariate(math.log(CHAT_INPUT_MEDIAN), CHAT_INPUT_SIGMA))
        output_len = round(generator.lognormvariate(math.log(CHAT_OUTPUT_MEDIAN), CHAT_OUTPUT_SIGMA))
        total = input_len + output_len
        fits = input_len <= LARGEST_INPUT and total <= min(LARGEST_TOTAL, max_model_len)
        if fits and min(input_len, output_len) >= SMALLEST_LENGTH:
            return input_len, output_len


def _draw_long_context(generator: random.Random, max_model_len: int) -> Lengths:
    input_len = generator.randint(math.ceil(max_model_len * 5 / 8), max_model_len * 7 // 8)
    return input_len, generator.randint(math.ceil(max_model_len / 16), max_model_len // 8)


def random_requests(lengths: Sequence[Lengths], vocab_size: int, seed: int = 0) -> list[Request]:
    """Prompts of random token ids."""
    ids = random.Random(seed)
    return [
        Request([ids.randrange(vocab_size) for _ in range(input_len)], input_len, output_len)
        for input_len, output_len in lengths
    ]


def text_requests(lengths: Sequence[Lengths], tokenizer_directory: Path, seed: int = 0) -> list[Request]:
    """Prompts that are pieces of the English that ships with Python, as token ids, so that they have exact lengths."""
    from transformers import AutoTokenizer

    from bench.pico import corpus

    text, _ = corpus()
    ids = AutoTokenizer.from_pretrained(tokenizer_directory)(text, add_special_tokens=False, verbose=False).input_ids
    starts = random.Random(seed)
    requests = []
    for input_len, output_len in lengths:
        start = starts.randrange(len(ids) - input_len)
        requests.append(Request(ids[start : start + input_len], input_len, output_len))
    return requests


def sharegpt_requests(
    path: Path, tokenizer_directory: Path, count: int, max_model_len: int, seed: int = 0
) -> list[Request]:
    """The conversations that `vllm bench serve --dataset-name sharegpt` takes, in its order, less what does not fit.

    Raises:
        InputError: the file is not in ShareGPT's format, or holds fewer than `count` that fit.
    """
    _check_sharegpt(path)
    from transformers import AutoTokenizer
    from vllm.benchmarks.datasets import ShareGPTDataset

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    dataset = ShareGPTDataset(dataset_path=str(path), random_seed=seed)
    asked = count
    while True:
        samples = dataset.sample(tokenizer, num_requests=asked, no_oversample=True)
        # The server may put a token in front of the text.
        fitting = [
            Request(sample.prompt, sample.prompt_len, sample.expected_output_len)
            for sample in samples
            if sample.prompt_len + sample.expected_output_len < max_model_len
        ]
        if len(fitting) >= count:
            return fitting[:count]
        if len(samples) < asked:
            raise InputError(
                f"{path} holds only {len(fitting)} conversations that fit into {max_model_len} tokens and that vLLM's "
                f"benchmark takes (at least {SMALLEST_LENGTH} tokens a side, a question of at most {LARGEST_INPUT}, "
                f"{LARGEST_TOTAL} together); choose --num-prompts {len(fitting)} or another --max-model-len"
            )
        asked *= 2


def _check_sharegpt(path: Path) -> None:
    """Raises InputError with what is wrong with the file."""
    entries, problems = read_json(path, dict | list), []
    if isinstance(entries, dict):
        raise InputError(f"{path} is not in ShareGPT's format, {SHAREGPT_FORMAT}: it holds a JSON object, not a list")
    for index, entry in enumerate(entries):
        turns = entry.get("conversations", []) if isinstance(entry, dict) else None
        if not isinstance(turns, list):
            problems.append(f"entry {index} is no object with a list of conversations")
        elif not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns[:2]):
            problems.append(f"entry {index}: a turn has no text under the key value")
    if not entries:
        problems = ["it holds no entries"]
    if problems:
        more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise InputError(
            f"{path} is not in ShareGPT's format, {SHAREGPT_FORMAT}:",
            problems[:5] + more,
        )


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).exists() for name in TOKENIZER_FILES)


def describe_lengths(requests: Sequence[Request]) -> dict[str, dict[str, float]]:
    """Mean, median, 90th percentile and largest of both lengths."""
    import numpy

    def summary(lengths: list[int]) -> dict[str, float]:
        p50, p90 = (float(numpy.percentile(lengths, p)) for p in (50, 90))
        return {"mean": float(numpy.mean(lengths)), "p50": p50, "p90": p90, "max": max(lengths)}

    return {
        "input_tokens": summary([request.input_len for request in requests]),
        "output_tokens": summary([request.output_len for request in requests]),
    }
