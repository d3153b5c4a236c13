"""`make real` with fake commands: what must agree, what decides that a step is done again, and what the tables say."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from bench.real import evaluation, pipeline, plan, records, results
from bench.real.__main__ import main
from bench.real.models import MODELS
from bench.real.pipeline import check_same
from bench.real.plan import PLANS, Learning, Plan
from bench.tables import real as tables
from pruned_vllm.common.errors import InputError
from tests.helpers.speed_results import offline

KINDS = ("model", "text", "learn", "convert", "know", "serve", "recover", "speed")


@pytest.mark.parametrize(
    ("known", "served", "complaints"),
    [
        ({"perplexity": 52.78}, 52.7801, []),
        ({"perplexity": 52.78}, 52.80, ["served by vLLM 52.8000, in Transformers 52.7800"]),
        ({"perplexity": 52.78, "masked_perplexity": 52.75}, 52.78, []),
        ({"perplexity": 3939.5, "masked_perplexity": 3903.3}, 3939.5, []),  # what learning has broken
        ({"perplexity": 4000.0, "masked_perplexity": 3903.3}, 4000.0, ["converted 4000.0000, masked 3903.3000"]),
        ({"perplexity": 52.78, "masked_perplexity": 52.6}, 52.78, ["converted 52.7800, masked 52.6000"]),
        ({"perplexity": 52.78, "masked_perplexity": 50.0}, 52.78, ["converted 52.7800, masked 50.0000"]),
        ({"perplexity": 52.78, "masked_perplexity": 50.0}, 40.0, ["converted", "served"]),
        ({"perplexity": 52.78}, float("nan"), ["served"]),
    ],
)
def test_perplexities_that_must_agree(known, served, complaints):
    if not complaints:
        check_same("ddp-20", known, served)
        return
    with pytest.raises(InputError) as error:
        check_same("ddp-20", known, served)
    assert len(error.value.problems) == len(complaints)
    assert all(problem.startswith(text) for problem, text in zip(error.value.problems, complaints, strict=True))


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "hidden_act": "silu",
}


PERPLEXITIES = {"ddp": 60.0, "tyr": 70.0, "maskprune": 80.0, "wanda": 50.0, "magnitude": 200.0}


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The whole run with commands that write what the real ones write, in no time. Returns what was called."""
    called = []

    def fetched(chosen):
        directory = tmp_path / chosen.name
        if not directory.exists():
            directory.mkdir()
            (directory / "config.json").write_text(json.dumps(CONFIG))
            save_file({"model.norm.weight": torch.ones(64)}, directory / "model.safetensors")
        return directory

    monkeypatch.setattr(pipeline, "fetched", fetched)
    monkeypatch.setattr(pipeline, "corpus", lambda: ("to learn from", "held out"))

    def run(program, *arguments):
        name = getattr(program, "name", "python")
        words = list(map(str, arguments))
        called.append((name, *words))
        if name == "python":
            out = SimpleNamespace(path=tmp_path / "real" / words[words.index("--output-dir") + 1].rsplit("/")[-1])
            result, file = offline(1.12), "e2e_speedup.json"
        else:
            out = SimpleNamespace(path=tmp_path / "real" / "/".join(words[1].rsplit("/")[-2:]))
            result = {"results": {"head_sparsity": 0.5, "channel_sparsity": 0.5, "learning_seconds": 90.0}}
            file = {"learn-masks": "learning.json", "finetune-pruned": "finetuning.json"}.get(name, "config.json")
        out.path.mkdir(parents=True, exist_ok=True)
        (out.path / "config.json").write_text(json.dumps(CONFIG))
        if file != "config.json":
            (out.path / file).write_text(json.dumps(result))
        return " ".join((name, *words))

    def knowledge(directory, texts, blocks):
        assert [text.read_text() for text in texts] == ["held out"]
        perplexity = PERPLEXITIES.get(directory.parent.name.split("-")[0], 40.0)
        return {"tokens": 9, "perplexity": perplexity, "right": 20, "questions": 40, "accuracy": 0.5} | {
            "standard_error": 0.08
        }

    def ask_served(directory, prompts, texts, blocks, log):
        chat = [{"prompt": prompt, "answer": f"{directory.parent.name} | *says*\n{prompt}"} for prompt in prompts]
        return {"perplexity": 1.00005 * knowledge(directory, texts, blocks)["perplexity"], "chat": chat}

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(evaluation, "knowledge", knowledge)
    monkeypatch.setattr(
        evaluation, "masked_perplexity", lambda ckpt, *_: 1.0001 * PERPLEXITIES[ckpt.parent.name.split("-")[0]]
    )
    monkeypatch.setattr(evaluation, "ask_served", ask_served)
    return called


def test_the_whole_run_its_results_and_tables(commands, tmp_path, monkeypatch, capsys):
    out = tmp_path / "real"
    assert main(["--output-dir", str(out)]) == 0
    smollm2 = PLANS["smollm2"]
    assert f"about 1 min; at most {round(sum(smollm2.steps().values()) / 60)} min" in capsys.readouterr().out
    measured = json.loads((out / "real.json").read_text())
    assert (out / "real.png").stat().st_size > 10_000
    assert "## Offline: Wanda, 50 %" in (out / "report.md").read_text()
    assert str(tmp_path) not in (out / "report.html").read_text()
    assert list(measured["steps"]) == list(smollm2.steps())
    assert list(measured["models"]) == ["dense", *smollm2.names(), *smollm2.recovered_names()]
    assert str(tmp_path) not in json.dumps(measured), "paths of this machine"
    assert measured["models"]["recovered-50"]["from"] == measured["speed"]["50"]["pruned"] == "wanda-50"
    learned = measured["models"]["ddp-20"]["commands"]["learn"]
    assert learned.startswith("learn-masks SmolLM2-135M-Instruct real/ddp-20/ckpt --sparsity 0.2 ")

    monkeypatch.setattr(tables, "results", lambda name: measured)
    rows = tables.table().splitlines()
    assert rows[2] == "| dense | 0M | | | 40.00 | 40.00 | 20 of 40 | |"
    assert rows[4] == "| DDP, 50 % | 0M | 50.0 % | 50.0 % | 60.01 | 60.00 | 20 of 40 | 2 |"
    assert rows[-3] == "| magnitude, 50 % | 0M | 50.0 % | 50.0 % | 200.02 | 200.01 | 20 of 40 | 2 |"
    assert rows[-1].startswith("| Wanda, 50 %, recovered | 0M | | | 40.00 | 40.00 | 20 of 40 |")
    speeds = tables.speed().splitlines()
    assert speeds[2].startswith("| Wanda, 20 % | decode, batch 8, 32 + 64 tokens | 1.12x (1.1")
    assert speeds[2].endswith(") of 1.75x | 0.64 |")
    best = tables.headline().splitlines()
    assert [row.split(" | ")[0] for row in best[2:]] == [
        "| dense",
        *("| Wanda, 20 %", "| Wanda, 20 %, recovered", "| Wanda, 50 %", "| Wanda, 50 %, recovered"),
    ]
    assert best[3].startswith("| Wanda, 20 % | 0M | 50.0 | 20 of 40 | 1.12x (1.1")
    assert r"wanda-50 \| \*says\* What is the capital" in tables.chat()
    assert "9 held-out tokens" in tables.notes() and "3.2 answers" in tables.notes()

    first = len(commands)
    assert main(["--output-dir", str(out)]) == 0
    assert len(commands) == first, "all was done before"
    assert main(["--output-dir", str(out), "--force", "speed"]) == 0
    assert [name for name, *_ in commands[first:]] == ["python", "python"]


def test_gemma_3_goes_through_its_own_plan(commands, tmp_path, monkeypatch):
    """Into the directory of its name; few methods, no chat; tables of its results."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").symlink_to("real-gemma3")  # where the fake commands write
    assert main(["--model", "gemma3"]) == 0
    measured = json.loads((tmp_path / "real-gemma3" / "real.json").read_text())
    gemma3 = PLANS["gemma3"]
    assert list(measured["steps"]) == list(gemma3.steps())
    assert list(measured["models"]) == ["dense", *gemma3.names(), "recovered-20"]
    learned = measured["models"]["ddp-20"]["commands"]["learn"]
    assert learned.startswith("learn-masks gemma-3-270m real-gemma3/ddp-20/ckpt --sparsity 0.2 ")
    assert [turn["prompt"] for turn in measured["models"]["dense"]["chat"]] == list(gemma3.prompts)

    monkeypatch.setattr(tables, "results", {"real_gemma3/real.json": measured}.__getitem__)
    firsts = [row.split(" | ")[0] for row in tables.table("real_gemma3").splitlines()[2:]]
    assert firsts == ["| dense", "| DDP, 20 %", "| Wanda, 20 %", "| Wanda, 20 %, recovered"]
    assert "The capital of France is" in tables.chat("real_gemma3")
    assert tables.speed("real_gemma3").splitlines()[2].startswith("| Wanda, 20 % | decode, batch 8, 32 + 64 tokens |")
    assert f"All {len(gemma3.steps())} steps" in " ".join(tables.notes("real_gemma3").split())


def test_every_model_has_a_plan():
    assert list(PLANS) == list(MODELS)


def test_a_directory_with_another_models_run_is_refused(commands, tmp_path, capsys):
    assert main(["--output-dir", str(tmp_path / "real")]) == 0
    first = len(commands)
    assert main(["--model", "gemma3", "--output-dir", str(tmp_path / "real")]) == 2
    assert "has a run with SmolLM2-135M-Instruct; choose another for gemma-3-270m" in capsys.readouterr().err
    assert len(commands) == first


def test_a_run_does_not_go_on_with_another_model(commands, tmp_path, capsys):
    assert main(["--output-dir", str(tmp_path / "real")]) == 0
    first = len(commands)
    save_file({"model.norm.weight": torch.zeros(64)}, tmp_path / MODELS["smollm2"].name / "model.safetensors")
    assert main(["--output-dir", str(tmp_path / "real"), "--force", "speed"]) == 2
    assert "holds another model than the one that this run began with" in capsys.readouterr().err
    assert len(commands) == first, "nothing was done with it"
    assert main(["--output-dir", str(tmp_path / "real"), "--force", "model"]) == 0
    assert len(commands) == 2 * first, "all of it again"


def test_results_say_with_which_versions_each_step_was_done(commands, tmp_path, monkeypatch):
    out = tmp_path / "real"
    for version, force in (("1", []), ("2", ["--force", "speed"])):
        for module in (records, results):
            monkeypatch.setattr(module, "library_versions", lambda _, version=version: {"vllm": version})
        assert main(["--output-dir", str(out), *force]) == 0
    measured = json.loads((out / "real.json").read_text())
    found = {name: step["versions"]["vllm"] for name, step in measured["steps"].items()}
    assert measured["versions"] == {"vllm": "2"}
    assert {name for name, version in found.items() if version == "2"} == {"speed-20", "speed-50"}


def changed(**differences) -> dict[str, Plan]:
    return {"smollm2": replace(PLANS["smollm2"], **differences)}


@pytest.mark.parametrize(
    ("owner", "name", "value", "again"),
    [
        (pipeline, "PLANS", changed(eval_blocks=5), {"know", "serve"}),
        (evaluation, "questions_digest", lambda: "others", {"know", "serve"}),
        (plan, "ANSWER_TOKENS", 9, {"serve"}),
        (pipeline, "PLANS", changed(prompts=("Who are you?",)), {"serve"}),
        (plan, "SPEED_REPEATS", 9, {"speed"}),
        (pipeline, "PLANS", changed(recovery=Learning(("--steps", "1"), 9)), {"recover", "know", "serve"}),
        (plan, "DTYPE", "float16", {"learn", "convert", "know", "serve", "recover", "speed"}),
        (pipeline, "corpus", lambda: ("other", "held out"), set(KINDS) - {"model"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_decides_a_result_does_its_steps_again(owner, name, value, again, commands, tmp_path, monkeypatch):
    before = steps_of(tmp_path)
    monkeypatch.setattr(owner, name, value)
    after = steps_of(tmp_path)
    changed = {step.partition("-")[0] for step in after if after[step] != before[step]}
    assert changed == again


def steps_of(directory) -> dict[str, float]:
    """When each step of a run was finished."""
    assert main(["--output-dir", str(directory / "real")]) == 0
    paths = (directory / "real" / "records").glob("*.json")
    return {path.stem: json.loads(path.read_text())["finished"] for path in paths}


def test_a_changed_text_is_noticed_in_a_file_and_in_a_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "corpus", lambda: ("to learn from", "held out"))
    (tmp_path / "texts").mkdir()
    text = tmp_path / "texts" / "a.txt"
    for source in (str(text), str(tmp_path / "texts")):
        found = []
        for content in ("one", "two", "two"):
            text.write_text(content)
            found.append(pipeline._digests(pipeline.Inputs("smollm2", data=(source,))))
        assert found[0] != found[1] == found[2] and len(found[0]) == 3, source
    assert len(pipeline._digests(pipeline.Inputs("smollm2", data=("owner/name",)))) == 2


def test_a_converted_model_that_is_not_the_masked_one_fails_the_command(commands, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "masked_perplexity", lambda *_: 1.01 * 60.0)
    assert main(["--output-dir", str(tmp_path / "real")]) == 2
    assert "ddp-20: perplexities differ that must not" in capsys.readouterr().err
    assert not (tmp_path / "real" / "records" / "serve-ddp-20.json").exists()


def test_a_run_that_is_interrupted_goes_on(commands, tmp_path, monkeypatch):
    """The command that was interrupted gets --resume, those before are not run again."""
    run, interrupted = pipeline.run, []

    def interrupted_run(program, *arguments):
        if "maskprune" in arguments and not interrupted:
            interrupted.append(arguments)
            raise KeyboardInterrupt
        return run(program, *arguments)

    monkeypatch.setattr(pipeline, "run", interrupted_run)
    assert main(["--output-dir", str(tmp_path / "real")]) == 130
    done = len(commands)
    assert main(["--output-dir", str(tmp_path / "real")]) == 0
    assert "maskprune" in commands[done] and commands[done][-1] == "--resume"
    assert all("--resume" not in command for command in commands[:done] + commands[done + 1 :])


def test_a_served_model_that_differs_fails_the_command(commands, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "ask_served", lambda *_: {"perplexity": 40.1, "chat": []})
    assert main(["--output-dir", str(tmp_path / "real")]) == 2
    assert "dense: perplexities differ that must not" in capsys.readouterr().err


def test_eval_data_must_be_files(tmp_path, capsys):
    assert main(["--output-dir", str(tmp_path / "real"), "--eval-data", str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in capsys.readouterr().err
    assert not (tmp_path / "real").exists()
