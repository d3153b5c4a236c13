"""`make compare` with fake commands: which steps there are, what the tables and the picture say."""

import json
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from helpers.chat import with_template
from helpers.speed_results import offline
from helpers.tiny import byte_tokenizer, converted, masks_for, tiny_model
from safetensors.torch import save_file

from bench.compare import evaluation, pipeline, plan, results
from bench.compare.__main__ import main
from bench.tables import compare as tables
from learner.data.prompts import AGREEMENT_PROMPTS
from learner.job import METHODS
from tests.bench.test_real import CONFIG

PERPLEXITIES = {"ddp": 60.0, "depth": 90.0, "random": 4000.0, "recovered": 45.0}
KL = {"ddp": 0.8, "depth": 1.5, "random": 6.0, "recovered": 0.2}


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Commands that write what the real ones write, in no time. Returns what was called."""
    called, model = [], tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    save_file({"model.norm.weight": torch.ones(64)}, model / "model.safetensors")
    monkeypatch.setattr(pipeline, "fetched", lambda _: model)
    monkeypatch.setattr(pipeline, "corpus", lambda: ("to learn from", "held out"))

    def run(program, *arguments):
        name, words = getattr(program, "name", "python"), list(map(str, arguments))
        called.append((name, *words))
        if name == "python":
            out = words[words.index("--output-dir") + 1]
            file, result = "e2e_speedup.json", offline(1.12)
        else:
            out = words[1]
            file = {"learn-masks": "learning.json", "finetune-pruned": "finetuning.json"}.get(name, "other.json")
            result = {"results": {"learning_seconds" if name == "learn-masks" else "training_seconds": 90.0}}
        out = SimpleNamespace(path=tmp_path / out).path
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(CONFIG))
        save_file({"model.norm.weight": torch.ones(64)}, out / "model.safetensors")
        (out / file).write_text(json.dumps(result))
        return " ".join((name, *words))

    def knowledge(dense, directory, heldout, device):
        assert device == "cpu" and heldout.read_text() == "held out" and dense == model
        method = directory.parent.name.partition("-")[0]
        return {
            "perplexity": PERPLEXITIES.get(method, 40.0),
            "agreement_kl": KL.get(method, 0.0),
            "agreement_tokens": 3.25,
            "answer_tokens": 40.0,
            "answers": {prompt: f"{method} | says\n{prompt}" for prompt in plan.ANSWERED},
        } | {"tokens": 9, "right": 20, "questions": 40, "accuracy": 0.5, "standard_error": 0.08}

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(evaluation, "knowledge", knowledge)
    monkeypatch.setattr(results, "draw", lambda measured, path: path.touch())  # which takes longer than all the rest
    return called


draw = results.draw
ONLY = ["--only", "ddp-20", "depth-20", "random-20", "ddp-20-self", "recovered-20-self-250k"]


def test_a_part_of_the_run_its_results_and_tables(commands, tmp_path, capsys):
    out = tmp_path / "compare"
    assert main(["--output-dir", str(out), *ONLY]) == 0
    printed = capsys.readouterr().out
    measured = json.loads((out / "compare.json").read_text())
    names = ["ddp-20", "depth-20", "random-20", "ddp-20-self", "ddp-20-mixed", "recovered-20-self-250k"]
    assert list(measured["models"]) == ["dense", *names], "with what the last is made from"
    assert str(tmp_path) not in json.dumps(measured), "paths of this machine"
    assert (out / "compare.png").exists()
    data = {}
    for _, *words in commands:
        if "--data" in words:
            sources = words[words.index("--data") + 1 : words.index("--agreement-prompts")]
            data[words[1].rsplit("/", 2)[-2]] = [source.rsplit("/")[-1] for source in sources]
    written = ["self", "--self-tokens", plan.SELF_TOKENS]
    assert data == {
        "ddp-20": ["train.txt"],
        "depth-20": ["train.txt"],
        "ddp-20-self": written,
        "ddp-20-mixed": ["train.txt", *written],
        "recovered-20-self-250k": written,
    }
    rows = tables.methods_of(measured).splitlines()
    assert rows[3].startswith("| DDP, 20 % | 0.1M | 60.00 | 20 of 40 | 0.800 | 3.2 of 40.0 | 1.12x |")
    assert [row.split(" | ")[0] for row in rows[4:]] == ["| whole layers (ShortGPT), 20 %", "| random, 20 %"]
    rows = tables.recovery_of(measured).splitlines()
    back = math.log(60 / 45) / math.log(60 / 40)
    assert rows[2].startswith("| DDP, 20 % |") and rows[3].startswith("| DDP, 20 %, its own text |")
    assert rows[-1].startswith("| recovered, 20 %, 250k tokens of its own text | 45.00 |")
    assert f"| {100 * back:.0f} % | 75 % | 2 |" in rows[-1]
    assert r"| depth \| says Name three colors. |" in tables.answers_of(measured) and rows[-1] in printed
    assert rows[-1] in (out / "compare.md").read_text()

    done = len(commands)
    assert main(["--output-dir", str(out), *ONLY]) == 0 and len(commands) == done, "all was done before"
    assert main(["--output-dir", str(out), "--only", "flap-20"]) == 0 and len(commands) == done + 3
    measured = json.loads((out / "compare.json").read_text())
    assert list(measured["models"]) == ["dense", "ddp-20", "flap-20", *names[1:]], "with those of the runs before"
    assert main(["--output-dir", str(out), *ONLY, "--force", "speed-ddp-20"]) == 0 and len(commands) == done + 4


def test_an_interrupted_run_leaves_what_was_complete(commands, tmp_path, monkeypatch):
    run, out = pipeline.run, tmp_path / "compare"

    def interrupted(program, *arguments):
        if getattr(program, "name", "") == "convert-pruned" and "flap-20" in str(arguments[0]):
            raise KeyboardInterrupt
        return run(program, *arguments)

    monkeypatch.setattr(pipeline, "run", interrupted)
    assert main(["--output-dir", str(out), "--only", "ddp-20", "flap-20", "ddp-20-self"]) == 130
    assert list(json.loads((out / "compare.json").read_text())["models"]) == ["dense", "ddp-20"]
    monkeypatch.setattr(pipeline, "run", run)
    assert main(["--output-dir", str(out), "--only", "flap-20"]) == 0
    assert list(json.loads((out / "compare.json").read_text())["models"]) == ["dense", "ddp-20", "flap-20"]
    assert [words[1] for words in commands].count(str(out / "flap-20" / "ckpt")) == 1


def test_times_may_come_in_a_later_run(commands, tmp_path):
    options = ["--output-dir", str(tmp_path / "compare"), "--only", "depth-20"]
    rows = []
    for untimed in (["--untimed"], [], ["--untimed"]):
        assert main([*options, *untimed]) == 0
        measured = json.loads((tmp_path / "compare" / "compare.json").read_text())
        rows.append(tables.methods_of(measured).splitlines()[3])
    assert rows[0] == "| whole layers (ShortGPT), 20 % | 0.1M | 90.00 | 20 of 40 | 1.500 | 3.2 of 40.0 | 90 |"
    assert "| 1.12x |" in rows[1] and rows[1].endswith("| 90 |") and rows[2] == rows[1], "what was timed stays"
    assert [name for name, *_ in commands] == ["learn-masks", "convert-pruned", "python"]


@pytest.mark.parametrize("only", ["depth-20", "ddp-20-self", "recovered-20-text-250k"])
def test_tables_and_picture_of_any_one_model(commands, tmp_path, only):
    """Of a run of few models every table can be made, if only to say that it has nothing."""
    out = tmp_path / "compare"
    assert main(["--output-dir", str(out), "--only", only]) == 0
    measured = json.loads((out / "compare.json").read_text())
    methods, recovery = tables.methods_of(measured), tables.recovery_of(measured)
    assert (methods == tables.NOTHING) == ("speed" not in measured["models"][only])
    assert (recovery == tables.NOTHING) == (only == "depth-20")
    assert len(tables.answers_of(measured).splitlines()) == 2 + len(measured["models"])
    draw(measured, out / "compare.png")
    assert (out / "compare.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    "heights", [[0.5] * 6, [0.0, 0.01, 0.02], [1.0, 0.99, 0.98, 0.1], [0.1, 0.5, 0.52, 0.9], [1.0] * 11, []]
)
def test_names_in_the_picture_do_not_overlap(heights):
    places = results.apart({str(index): height for index, height in enumerate(heights)}, 0.1)
    ordered = sorted(places.values())
    assert all(low >= 0 and high <= 1 and high - low >= 0.1 - 1e-9 for low, high in pairwise(ordered))
    order = sorted(places, key=lambda name: places[name])
    assert order == sorted(places, key=lambda name: heights[int(name)])


def test_the_whole_plan():
    models = plan.variants()
    assert {name.partition("-")[0] for name in models} <= {*METHODS, "recovered"}
    assert set(plan.planned(models)) >= {f"know-{name}" for name in models}
    for variant in models.values():
        assert not variant.source or list(models).index(variant.source) < list(models).index(variant.name)
        tables.title(variant.name)


def test_a_gpu_makes_models_that_cpus_do_not():
    on_cpu, on_gpu = plan.chosen([]), plan.chosen([], "cuda")
    assert on_gpu.keys() - on_cpu.keys() == {name for name, variant in plan.variants().items() if variant.for_gpu}
    assert "ddp-20-mixed-1000k" in plan.chosen(["recovered-20-self-1000k-524k-long"]), (
        "asked for, a CPU makes them, too"
    )


def test_a_gpu_that_there_is_not_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--output-dir", str(tmp_path / "compare"), "--device", "cuda"]) == 2
    assert "device cuda cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "compare").exists()


def test_a_name_that_there_is_not_is_refused(tmp_path, capsys):
    assert main(["--output-dir", str(tmp_path / "compare"), "--only", "dpd-20"]) == 2
    assert "no model is called dpd-20; there are ddp-20" in capsys.readouterr().err
    assert not (tmp_path / "compare").exists()


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ({"a": (1, 9), "b": (2, 5), "c": (3, 5), "d": (4, 1)}, ["a", "b", "d"]),
        ({"a": (1, 1), "b": (2, 2)}, ["a"]),
        ({"a": (2, 1), "b": (1, 2), "c": (2, 2)}, ["b", "a"]),
    ],
)
def test_pareto_front(places, expected):
    assert tables.front(places) == expected


def test_knowledge_of_a_converted_model(tmp_path, monkeypatch):
    """The real evaluation, on a tiny model and its dense one."""
    widths = (30, 40, 20)  # so that no stock class has it
    masks = masks_for([[1, 1, 0, 0, 1, 1]] * 3, [(torch.arange(40) < width).float() for width in widths])
    out = converted(tmp_path, tiny_model("llama", 6, 3, 40), masks)
    (tmp_path / "ckpt" / "pruning.json").unlink()
    for directory in (out, tmp_path / "ckpt"):
        with_template(byte_tokenizer()).save_pretrained(directory)
    heldout = tmp_path / "heldout.txt"
    heldout.write_text("It was the best of times. " * 20)
    monkeypatch.setattr(evaluation, "AGREEMENT_PROMPTS", AGREEMENT_PROMPTS[:3])
    dense, pruned = (
        evaluation.knowledge(tmp_path / "ckpt", directory, heldout, "cpu") for directory in (tmp_path / "ckpt", out)
    )
    assert dense["agreement_kl"] < 1e-6 < pruned["agreement_kl"]
    assert dense["agreement_tokens"] == dense["answer_tokens"] == pruned["answer_tokens"] > pruned["agreement_tokens"]
    assert dense["perplexity"] != pruned["perplexity"] and pruned["questions"] == 40
    assert set(pruned["answers"]) == set(plan.ANSWERED) and pruned["answers"] != dense["answers"]
