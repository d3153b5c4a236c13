"""What the online benchmark asks: lengths of the documented distributions that fit, and conversations of ShareGPT."""

import argparse
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from bench.pico import pico_model
from bench.speed.workload import (
    LARGEST_INPUT,
    LARGEST_TOTAL,
    SMALLEST_LENGTH,
    describe_lengths,
    draw_lengths,
    random_requests,
    sharegpt_requests,
    text_requests,
    workload,
)
from pruned_vllm.common.errors import InputError


def test_chat_has_the_means_that_the_docstring_names():
    lengths = draw_lengths("chat", 20_000, LARGEST_TOTAL)
    inputs, outputs = zip(*lengths, strict=True)
    assert sum(inputs) / len(inputs) == pytest.approx(217, rel=0.02)
    assert sum(outputs) / len(outputs) == pytest.approx(198, rel=0.02)


@pytest.mark.parametrize("max_model_len", [64, 512, 2048, 131072])
def test_chat_is_what_vllm_keeps_of_sharegpt_and_fits_into_the_context(max_model_len):
    lengths = draw_lengths("chat", 2000, max_model_len)
    for input_len, output_len in lengths:
        assert SMALLEST_LENGTH <= input_len <= LARGEST_INPUT and output_len >= SMALLEST_LENGTH
        assert input_len + output_len <= min(LARGEST_TOTAL, max_model_len)
    assert max(map(sum, lengths)) > min(LARGEST_TOTAL, max_model_len) * 0.8, "the context is used"


@pytest.mark.parametrize("max_model_len", [64, 1000, 8192])
def test_long_context_fills_the_context(max_model_len):
    for input_len, output_len in draw_lengths("long-context", 500, max_model_len):
        assert 5 / 8 <= input_len / max_model_len <= 7 / 8 and 1 / 16 <= output_len / max_model_len <= 1 / 8


@pytest.mark.parametrize("kind", ["chat", "long-context"])
def test_lengths_depend_on_the_seed_alone(kind):
    assert draw_lengths(kind, 20, 512) == draw_lengths(kind, 20, 512) != draw_lengths(kind, 20, 512, seed=1)


def test_fixed_lengths():
    assert draw_lengths("32:64", 3, 96) == [(32, 64)] * 3
    with pytest.raises(InputError, match="--workload 32:64 needs 96 tokens of context; --max-model-len allows 95"):
        draw_lengths("32:64", 3, 95)


@pytest.mark.parametrize("kind", ["chat", "long-context"])
def test_a_context_that_hardly_any_request_fits_into_is_refused(kind):
    with pytest.raises(InputError, match=f"--max-model-len 63 is too short for --workload {kind}; it needs 64"):
        draw_lengths(kind, 1, 63)


@pytest.mark.parametrize("text", ["chats", "", "32", "0:5", "5:0", "1:2:3", "a:b", "-1:5"])
def test_no_workload(text):
    with pytest.raises(argparse.ArgumentTypeError, match="neither chat nor long-context nor INPUT:OUTPUT"):
        workload(text)


def test_random_prompts_have_the_lengths_and_ids_of_the_vocabulary():
    requests = random_requests([(5, 2), (30, 9)], vocab_size=7)
    assert [len(request.prompt) for request in requests] == [5, 30] == [request.input_len for request in requests]
    assert {token for request in requests for token in request.prompt} == set(range(7))
    assert describe_lengths(requests)["output_tokens"] == {"mean": 5.5, "p50": 5.5, "p90": 8.3, "max": 9}


def test_text_prompts_are_pieces_of_english_of_exact_length(monkeypatch):
    from transformers import AutoTokenizer

    model = pico_model("llama")
    text = (model / "heldout.txt").read_text()
    monkeypatch.setattr("bench.pico.corpus", lambda: (text, ""))  # reading all of Python's takes long
    first, second = text_requests([(40, 3), (7, 5)], model)
    assert (len(first.prompt), len(second.prompt)) == (40, 7)
    assert AutoTokenizer.from_pretrained(model).decode(first.prompt) in text


CONVERSATION = {"conversations": [{"from": "human", "value": "a b c d"}, {"from": "gpt", "value": "e f g h i"}]}


@pytest.mark.parametrize(
    "content, message",
    [
        ("[", "is not valid JSON"),
        ({"conversations": []}, "it holds a JSON object, not a list"),
        ([], "it holds no entries"),
        ([CONVERSATION, 5], "entry 1 is no object with a list of conversations"),
        ([{"conversations": "abc"}], "entry 0 is no object with a list of conversations"),
        ([{"conversations": [{"from": "human"}, {"value": "x"}]}], "entry 0: a turn has no text under the key value"),
        ([{"conversations": [{"value": 5}, {"value": "x"}]}], "entry 0: a turn has no text under the key value"),
        ([7] * 9, "and 4 more"),
    ],
)
def test_a_malformed_sharegpt_file_is_refused(content, message, tmp_path):
    path = tmp_path / "sharegpt.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message):
        sharegpt_requests(path, tmp_path, 1, 100)


def test_conversations_that_do_not_fit_are_passed_over(tmp_path, monkeypatch):
    """vLLM's class is asked for more until enough fit; here it has conversations of 20, 19, 18 ... input tokens."""

    class Dataset:
        def __init__(self, dataset_path: str, random_seed: int) -> None:
            assert dataset_path == str(path) and random_seed == 3

        def sample(self, tokenizer, num_requests: int, no_oversample: bool) -> list:
            assert no_oversample
            sizes = range(10, 10 + min(num_requests, 20))
            return [SimpleNamespace(prompt=f"{n}", prompt_len=30 - n, expected_output_len=4) for n in sizes]

    datasets = ModuleType("vllm.benchmarks.datasets")
    datasets.ShareGPTDataset = Dataset
    for name in ("vllm", "vllm.benchmarks"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.benchmarks.datasets", datasets)
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([CONVERSATION, {"id": "no conversation"}]))
    requests = sharegpt_requests(path, pico_model("llama"), 5, max_model_len=20, seed=3)
    assert [(request.input_len, request.output_len) for request in requests] == [(n, 4) for n in (15, 14, 13, 12, 11)]
    with pytest.raises(
        InputError, match="holds only 15 conversations that fit into 20 tokens.*choose --num-prompts 15"
    ):
        sharegpt_requests(path, pico_model("llama"), 16, max_model_len=20, seed=3)
