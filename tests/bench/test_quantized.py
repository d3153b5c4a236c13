"""bench.quantized with servers that know a perplexity by the model's name, and engines that take given times."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from helpers.masked import convert_pruned, ragged_checkpoint
from helpers.tiny import byte_tokenizer
from safetensors.torch import load_file

from bench.quantized import speed, steps
from bench.quantized.__main__ import main
from bench.quantized.speed import case_record, of_product
from bench.real.plan import DTYPE
from bench.speed import server, setting
from bench.speed.setting import Timing
from bench.tables import quantized as tables
from converter.quantize import command
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.ideal import Case

SECONDS = {"dense": 8.0, "pruned": 5.0, "quantized": 4.0, "both": 2.6}
PERPLEXITIES = {"ckpt": 50.0, "out": 52.0, "dense-w8a8-int8": 50.5, "pruned-w8a8-int8": 52.5, "dense-w4a16": 55.0}


@pytest.fixture
def models(tmp_path):
    """A dense and a pruned model with a tokenizer, and text."""
    ckpt = ragged_checkpoint(tmp_path / "ckpt")
    byte_tokenizer().save_pretrained(ckpt)
    assert convert_pruned(ckpt, tmp_path / "out", "--dtype", "bfloat16") == 0
    for name in ("pruning_masks.safetensors", "pruning.json"):
        (ckpt / name).unlink()
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 10)
    return tmp_path


@pytest.fixture
def calls(models, monkeypatch):
    """Names of what was quantized, served and timed."""
    called = []

    def run(*arguments):
        arguments = [str(argument) for argument in arguments[3:]]  # less python -m module
        called.append(f"quantize {arguments[1].rpartition('/')[2]}")
        assert command.main(arguments) == 0
        return "quantize-pruned"

    @contextmanager
    def served(model, log, name, dtype, hf_overrides, tokenizer):
        called.append(f"serve {model.name}")
        assert dtype == DTYPE and hf_overrides is None and tokenizer.name == "ckpt"
        if model.name not in PERPLEXITIES:
            log.write_text("INFO fine\nValueError: no kernel takes 7 bits\nINFO goodbye\n")
            raise InputError("vllm serve ended with exit code 1")
        yield SimpleNamespace(perplexity=PERPLEXITIES[model.name])

    def time_models(wanted, dense, engines):
        called.append("time " + ", ".join(engine["model"].rpartition("/")[2] for engine in engines))
        samples = {case: [[seconds] * wanted.repeats for seconds in SECONDS.values()] for case in wanted.cases}
        return Timing(samples, torch.bfloat16, {})

    monkeypatch.setattr(steps, "run", run)
    monkeypatch.setattr(server, "served", served)
    monkeypatch.setattr("bench.served_text.served_perplexity", lambda client, name, ids: client.perplexity)
    monkeypatch.setattr(speed, "time_models", time_models)
    monkeypatch.setattr(setting, "describe_versions", dict)
    monkeypatch.setattr(setting, "describe_hardware", dict)
    return called


def options(models, *schemes) -> list[str]:
    paths = {"--dense": "ckpt", "--pruned": "out", "--eval-data": "text.txt", "--output-dir": "work"}
    words = [word for option, name in paths.items() for word in (option, str(models / name))]
    return [*words, "--repeats", "3", "--schemes", *schemes]


def test_every_form_is_quantized_served_and_timed_once(models, calls):
    assert main(options(models, "w8a8-int8", "w4a16")) == 0
    first = list(calls)
    assert first == [
        *("serve ckpt", "serve out"),
        *("quantize dense-w8a8-int8", "serve dense-w8a8-int8", "quantize pruned-w8a8-int8", "serve pruned-w8a8-int8"),
        *("quantize dense-w4a16", "serve dense-w4a16", "quantize pruned-w4a16", "serve pruned-w4a16"),
        "time ckpt, out, dense-w8a8-int8, pruned-w8a8-int8",
    ], "vLLM refused one form of w4a16, so that nothing can be timed"
    results = json.loads((models / "work" / "quantized.json").read_text())["pairs"]["ckpt"]
    found = {form: model.get("perplexity") for form, model in results["models"].items()}
    expected = {"dense": 50.0, "pruned": 52.0, "dense-w8a8-int8": 50.5, "pruned-w8a8-int8": 52.5, "dense-w4a16": 55.0}
    assert found == {**expected, "pruned-w4a16": None}
    assert results["models"]["pruned-w4a16"]["refused"] == "ValueError: no kernel takes 7 bits"
    assert results["schemes"]["w4a16"] == {"refused": {"both": "ValueError: no kernel takes 7 bits"}}
    assert [case["of_product"]["ratio"] for case in results["schemes"]["w8a8-int8"]["cases"]] == [5 * 4 / (8 * 2.6)] * 2
    assert (models / "work" / "quantized.png").stat().st_size > 1000
    assert main(options(models, "w8a8-int8", "w4a16")) == 0 and calls == first
    assert main([*options(models, "w8a8-int8", "w4a16"), "--force", "speed"]) == 0
    assert calls == [*first, first[-1]]


def test_the_ideal_counts_the_bytes_that_a_step_reads(models, calls):
    assert main([*options(models, "w8a8-int8"), "--cases", "decode:2:10:20"]) == 0
    results = json.loads((models / "work" / "quantized.json").read_text())["pairs"]["ckpt"]
    (case,) = results["schemes"]["w8a8-int8"]["cases"]
    work = models / "work" / "ckpt"
    places = [models / "ckpt", models / "out", work / "dense-w8a8-int8", work / "pruned-w8a8-int8"]
    for (name, directory), kv_heads in zip(zip(SECONDS, places, strict=True), (18, 11, 18, 11), strict=True):
        tensors = load_file(directory / "model.safetensors")
        embedding = tensors.pop("model.embed_tokens.weight")
        # Floats are served in the dtype of `calls`, bfloat16, whatever the files have.
        read = sum(tensor.numel() * (1 if tensor.dtype == torch.int8 else 2) for tensor in tensors.values())
        read += 2 * embedding.shape[1] * 2 + 2 * 20 * 2 * kv_heads * 32 * 2
        assert case[name]["bytes_per_step"] == read, name
    assert case["both"]["ideal_speedup"] == case["dense"]["bytes_per_step"] / case["both"]["bytes_per_step"]


def test_the_product_is_taken_repeat_by_repeat():
    samples = {"dense": [8.0, 16.0], "pruned": [4.0, 8.0], "quantized": [2.0, 4.0], "both": [1.0, 4.0]}
    found = of_product(samples, 1)
    assert found["ratio"] == 0.75 and (found["ratio_low"], found["ratio_high"]) == (0.5, 1.0)
    moved = {"dense": 8.0, "pruned": 4.0, "quantized": 4.0, "both": 2.0}
    record = case_record(Case.parse("decode:1:8:9"), samples, moved, 1)
    assert record["pruned"]["speedup"] == 2 and record["both"]["speedup"] == 6 and record["both"]["of_ideal"] == 1.5
    assert record["dense"]["throughput_tokens_per_s"] == 8 / 12


def test_tables_say_what_was_measured(models, calls):
    assert main(options(models, "w8a8-int8", "w4a16")) == 0
    measured = json.loads((models / "work" / "quantized.json").read_text())
    table, notes = tables.forms(measured), tables.multiplied(measured)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()}
    assert "| 52.50 |" in rows["ckpt, pruned, w8a8-int8"] and "| 3.08x" in rows["ckpt, pruned, w8a8-int8"]
    assert "| 2.00x" in rows["ckpt, dense, w8a8-int8"] and "| 1.60x" in rows["ckpt, pruned"]
    assert "| 1.00x | 1.00x |" in rows["ckpt, dense"] and "| refused |" in rows["ckpt, pruned, w4a16"]
    assert "pruned and w8a8-int8: 0.96 of the product of the two single speedups" in " ".join(notes.split())
    assert "w4a16, both: refused (ValueError: no kernel takes 7 bits)" in " ".join(notes.split())


WRONG = {
    "prefill": (["--cases", "prefill:1:32"], "--cases must decode"),
    "no model": (["--pruned", "nowhere"], "config.json is missing"),
    "no text": (["--eval-data", "nowhere.txt"], "nowhere.txt: no file"),
    "no such step": (["--force", "speech"], "no step is called speech"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_refused(models, calls, capsys, name):
    more, message = WRONG[name]
    assert main([*options(models, "w8a8-int8"), *more]) == 2
    assert message in capsys.readouterr().err and not calls


@pytest.mark.parametrize("words", [["--dense", "a"], ["--schemes", "w4a16"]])
def test_half_of_a_pair_is_no_pair(words):
    with pytest.raises(SystemExit):
        main(words)
