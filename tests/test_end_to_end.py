"""The public commands one after the other, on a really trained model: learn, convert, serve, measure."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from bench.commands import script
from bench.pico import pico_model
from bench.served_text import served_perplexity
from bench.speed.server import served
from learner.data.reading import tokenize_files

NAME = "pruned"


def run(*arguments, **options) -> str:
    """Runs a command; its output. Fails the test with its error output."""
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def pico() -> Path:
    return pico_model("llama")


@pytest.fixture(scope="session")
def learned(pico, tmp_path_factory) -> Path:
    """A directory with ckpt/ and out/, made by the commands."""
    directory = tmp_path_factory.mktemp("end_to_end")
    text = ["--data", pico / "train.txt", "--eval-data", pico / "heldout.txt"]
    small = ["--steps", 40, "--batch-size", 4, "--sequence-length", 64]
    run(script("learn-masks"), pico, directory / "ckpt", "--sparsity", 0.4, *text, *small)
    run(script("convert-pruned"), directory / "ckpt", directory / "out")
    return directory


@pytest.fixture(scope="session")
def client(learned):
    with served(learned / "out", learned / "server.log", NAME) as client:
        yield client


def test_pico_model_knows_more_than_token_frequencies(pico):
    facts = json.loads((pico / "pico.json").read_text())
    assert facts["heldout_perplexity"] < facts["unigram_perplexity"] / 3


def test_server_answers_through_the_openai_client(client):
    answer = client.completions.create(model=NAME, prompt="Return the", max_tokens=5, temperature=0, logprobs=2)
    assert answer.usage.completion_tokens == 5 and answer.choices[0].text
    again = client.completions.create(model=NAME, prompt=["Return the", "A class"], max_tokens=5, temperature=0, n=1)
    assert again.choices[0].text == answer.choices[0].text and len(again.choices) == 2
    streamed = client.completions.create(model=NAME, prompt="Return the", max_tokens=5, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == answer.choices[0].text


def test_served_perplexity_is_the_masked_perplexity(client, learned, pico):
    masked = json.loads((learned / "ckpt" / "learning.json").read_text())["results"]["masked_perplexity"]
    ids = tokenize_files(AutoTokenizer.from_pretrained(pico), [pico / "heldout.txt"]).tolist()
    converted = served_perplexity(client, NAME, ids)
    assert math.isfinite(converted) and converted == pytest.approx(masked, rel=1e-3)


def test_server_log_says_what_was_pruned(client, learned):
    (line,) = [line for line in (learned / "server.log").read_text().splitlines() if "fewer than the dense" in line]
    assert "PrunedLlamaForCausalLM" in line and "distinct layer shapes" in line


def test_speedup_benchmark_on_converted_model(learned, pico):
    results = learned / "results"
    run(
        *(sys.executable, Path("bench") / "e2e_speedup.py", "--dense", pico, "--pruned", learned / "out"),
        *("--output-dir", results, "--eager", "--repeats", 1, "--cases", "decode:2:8:4", "prefill:1:16"),
        cwd=Path(__file__).parents[1],
    )
    report = json.loads((results / "e2e_speedup.json").read_text())
    assert (results / "e2e_speedup.png").stat().st_size > 5000
    assert {"versions", "hardware", "command", "models"} <= set(report)
    decode, prefill = report["cases"]
    assert decode["name"] == "decode:2:8:4" and (decode["batch_size"], decode["input_len"], decode["output_len"]) == (
        2,
        8,
        4,
    )
    for case in (decode, prefill):
        assert case["ideal_speedup"] > 1 and case["speedup"] > 0
        for side in ("dense", "pruned"):
            assert case[side]["median_latency_s"] > 0 and case[side]["throughput_tokens_per_s"] > 0
            assert 0 < case[side]["of_bandwidth"] < 1 and 0 < case[side]["of_gemm_rate"] < 1, "a limit that is passed"
        assert "1 repeat gives no interval" in case["warnings"][0]
    assert report["machine"]["threads"] >= 1 and report["settings"]["compile"] is False
    models = report["models"]
    assert models["pruned"]["kv_cache_tokens_per_gib"] > models["dense"]["kv_cache_tokens_per_gib"]


@pytest.mark.slow
def test_a_compiled_model_is_timed_through_the_stock_and_the_plugins_class(learned, pico, tmp_path):
    """As users serve; what it says of times is not tested."""
    run(
        *(sys.executable, "-m", "bench.e2e_speedup", "--dense", pico, "--pruned", learned / "out", "--plugin-dense"),
        *("--output-dir", tmp_path, "--repeats", 2, "--cases", "decode:2:8:4"),
        cwd=Path(__file__).parents[1],
    )
    results = json.loads((tmp_path / "e2e_speedup.json").read_text())
    assert results["settings"]["compile"] is True and set(results["models"]) == {"dense", "pruned", "plugin_dense"}
    (case,) = results["cases"]
    assert (
        case["plugin_dense"]["speedup"] > 0
        and case["plugin_dense"]["bytes_per_step"] == case["dense"]["bytes_per_step"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--eager"]], ids=["compiled", "eager"])
def test_a_breakdown_names_the_parts_of_a_step(learned, pico, tmp_path, mode):
    run(
        *(sys.executable, "-m", "bench.breakdown", "--dense", pico, "--pruned", learned / "out", *mode),
        *("--output-dir", tmp_path, "--repeats", 2, "--cases", "decode:2:8:8", "prefill:2:32"),
        cwd=Path(__file__).parents[1],
    )
    for case in json.loads((tmp_path / "breakdown.json").read_text())["cases"]:
        assert set(case["contestants"]) == {"dense", "pruned", "narrow"}
        for contestant in case["contestants"].values():
            parts = contestant["parts_s"]
            assert sum(parts.values()) == pytest.approx(contestant["step_s"])
            named = ("GEMMs", "attention op", "KV-cache update", "norms", "input preparation", "attention metadata")
            assert all(parts[name] > 0 for name in (*named, "sampler", "scheduler, messages")), parts


@pytest.mark.slow
def test_a_null_test_says_whether_the_machine_can_be_trusted(pico, tmp_path):
    """On a machine that is shared it may say no; but it must say so of both halves."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bench.e2e_speedup", "--dense", str(pico), "--null-test", "--eager"),
            *("--output-dir", str(tmp_path), "--repeats", "3", "--cases", "decode:2:8:16"),
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    (case,) = json.loads((tmp_path / "null_test.json").read_text())["cases"]
    assert (done.returncode, "passed: equal engines" in done.stdout) == ((0, True) if case["passed"] else (2, False))
    assert len(case["equal"]["samples_s"]) == len(case["slowed"]["samples_s"]) == 2
    assert all(problem in done.stderr for problem in case["problems"])


def test_learned_pattern_can_be_scaled_up(learned, tmp_path):
    printed = run(sys.executable, "-m", "bench.scale", learned / "out", tmp_path, cwd=Path(__file__).parents[1])
    assert "distinct layer shapes" in printed
    small, large = (json.loads((d / "config.json").read_text()) for d in (learned / "out", tmp_path / "pruned"))
    assert large["architectures"] == small["architectures"] and large["num_hidden_layers"] > 10
    share = [layer["intermediate_size"] / large["intermediate_size"] for layer in large["per_layer_config"].values()]
    kept = small["per_layer_config"]["0"]["intermediate_size"] / small["intermediate_size"]
    assert share[0] == pytest.approx(kept, abs=0.02)
