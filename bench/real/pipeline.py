"""The steps of `make real`: each is a public command that a user would type, or what a user would ask of its output."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.commands import run, script
from bench.pico import corpus
from bench.real import plan
from bench.real.models import MODELS, Model, fetched, source
from bench.real.plan import PLANS, Plan
from bench.real.records import Records
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import FINETUNING_FILE, read_json
from pruned_vllm.formats.config import read_config
from pruned_vllm.formats.fingerprint import Fingerprint
from pruned_vllm.formats.geometry import ModelGeometry

ROUNDING = 2e-3  # of a perplexity: converted weights were folded in float32, then rounded to the model's bfloat16
BROKEN, ROUNDING_OF_BROKEN = 1000, 2e-2  # learning has broken a model of such a perplexity, and rounding moves it more
SAME_WEIGHTS = 1e-4  # of a perplexity: Transformers and vLLM in float32


@dataclass(frozen=True)
class Inputs:
    """What the user chose.

    Attributes:
        model: name of it in MODELS.
        data: sources for `learn-masks --data`; empty takes the English that ships with Python.
        eval_data: text files to measure perplexity on; empty takes documents of the same that are held out.
    """

    model: str
    data: tuple[str, ...] = ()
    eval_data: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Run:
    """A run in a directory.

    Attributes:
        work: where everything lies.
        model: directory of the dense model.
        data, eval_data: see Inputs.
    """

    plan: Plan
    records: Records
    work: Path
    model: Path
    data: tuple[str, ...]
    eval_data: tuple[Path, ...]

    def directory(self, kind: str, name: str) -> Path:
        """Of "ckpt", "out" or "speed"; `name` is "dense", "ddp-20" or "recovered-20"."""
        return self.model if name == "dense" else self.work / name / kind


def run_steps(inputs: Inputs, work: Path, records: Records) -> None:
    """All steps of the model's plan. Raises InputError when one fails, or a served model is not the masked one."""
    chosen = MODELS[inputs.model]
    model = records.step("model", {}, lambda _: _model(chosen))
    check_model(model, chosen)
    text = {"data": list(inputs.data), "eval_data": list(map(str, inputs.eval_data)), "digests": _digests(inputs)}
    texts = (work / "train.txt", work / "heldout.txt")
    records.step("text", text, lambda _: _write_text(*texts), outputs=texts)
    data = inputs.data or (str(texts[0]),)
    chosen_plan = PLANS[inputs.model]
    steps = Run(chosen_plan, records, work, Path(model["directory"]), data, inputs.eval_data or (texts[1],))

    _examine(steps, "dense", ())
    for method in chosen_plan.methods:
        for sparsity in chosen_plan.sparsities:
            _prune(steps, method, sparsity)
    for sparsity in chosen_plan.sparsities:
        _recover(steps, sparsity)
    for sparsity in chosen_plan.sparsities:
        _time(steps, sparsity)


def best(steps: Run, sparsity: float) -> str:
    """The pruned model of the lowest perplexity on held-out text."""
    candidates = [f"{method}-{plan.percent(sparsity)}" for method in steps.plan.methods]
    return min(candidates, key=lambda name: steps.records.done[f"know-{name}"]["result"]["perplexity"])


def _model(model: Model) -> dict:
    directory = fetched(model)
    fingerprint = str(Fingerprint.from_directory(directory))
    where = {"directory": str(directory.resolve()), "source": source(directory)}
    return {**where, "fingerprint": fingerprint, **_sizes(directory)}


def check_model(model: Mapping, chosen: Model) -> None:
    """Raises InputError where the step `model` was done with another model, or the model's directory has changed."""
    directory, before = Path(model["directory"]), model.get("fingerprint")  # runs begun before 0.2 lack it
    if directory.name != chosen.name:
        raise InputError(f"--output-dir has a run with {directory.name}; choose another for {chosen.name}")
    if before and before != str(Fingerprint.from_directory(directory)):
        raise InputError(
            f"{directory} holds another model than the one that this run began with: choose another --output-dir, or "
            "--force model, which does everything again"
        )


def _write_text(train: Path, heldout: Path) -> dict:
    texts = corpus()
    for path, text in zip((train, heldout), texts, strict=True):
        path.write_text(text, encoding="utf-8")
    return {path.name: {"characters": len(text)} for path, text in zip((train, heldout), texts, strict=True)}


def _digests(inputs: Inputs) -> list[str]:
    """Of the texts, as far as they are files here: a changed text makes all results others."""
    files = [path for source in (*inputs.data, *map(str, inputs.eval_data)) for path in _files(source)]
    texts = (*(text.encode() for text in corpus()), *(path.read_bytes() for path in files))
    return [hashlib.sha256(text).hexdigest() for text in texts]


def _files(source: str) -> list[Path]:
    """Of a source for `learn-masks --data`: a file, or those of a directory; none of a data set on the hub."""
    path = Path(source)
    return [path] if path.is_file() else sorted(inside for inside in path.rglob("*") if inside.is_file())


def _prune(steps: Run, method: str, sparsity: float) -> None:
    """Masks by `method`, the converted model, and what it can do."""
    name = f"{method}-{plan.percent(sparsity)}"
    checkpoint, out = steps.directory("ckpt", name), steps.directory("out", name)
    data = [] if method == "magnitude" else ["--data", *steps.data]
    budget = ["--sparsity", str(sparsity), "--device", "cpu", "--dtype", plan.DTYPE]
    options = [*budget, "--method", method, *steps.plan.methods[method].options, *data]

    def learn(resume: bool) -> dict:
        how = _how(checkpoint, resume)
        command = run(script("learn-masks"), steps.model, checkpoint, *options, how)
        return {"command": command, **read_json(checkpoint / "learning.json")["results"]}

    def convert(resume: bool) -> dict:
        return {"command": run(script("convert-pruned"), checkpoint, out, "--overwrite"), **_sizes(out)}

    records = steps.records
    records.step(f"learn-{name}", {"options": options}, learn, after=("model", "text"), outputs=(checkpoint,))
    records.step(f"convert-{name}", {}, convert, after=(f"learn-{name}",), outputs=(out,))
    _examine(steps, name, (f"convert-{name}",))


def _recover(steps: Run, sparsity: float) -> None:
    """Trains the best model of this sparsity further, distilled from the dense one."""
    name, pruned = f"recovered-{plan.percent(sparsity)}", best(steps, sparsity)
    out = steps.directory("out", name)
    options = [*steps.plan.recovery.options, "--dtype", plan.DTYPE, "--device", "cpu", "--data", *steps.data]

    def recover(resume: bool) -> dict:
        teacher = ["--teacher", steps.model]
        before = steps.directory("out", pruned)
        command = run(script("finetune-pruned"), before, out, *options, *teacher, _how(out, resume))
        return {"command": command, "from": pruned, **read_json(out / FINETUNING_FILE)["results"], **_sizes(out)}

    step = f"recover-{plan.percent(sparsity)}"
    settings = {"options": options, "from": pruned}
    steps.records.step(step, settings, recover, after=(f"convert-{pruned}",), outputs=(out,))
    _examine(steps, name, (step,))


def _how(output: Path, resume: bool) -> str:
    """The option that goes on with an interrupted command, or that begins anew."""
    return "--resume" if resume and not output.exists() else "--overwrite"


def _examine(steps: Run, name: str, after: Sequence[str]) -> None:
    """Perplexity in Transformers and served, questions, and what the served model says in a chat."""
    from bench.real import evaluation

    directory = steps.directory("out", name)
    checkpoint = steps.directory("ckpt", name) if f"learn-{name}" in steps.records.planned else None

    def know(resume: bool) -> dict:
        found = evaluation.knowledge(directory, eval_data, blocks)
        if checkpoint is not None:
            found["masked_perplexity"] = evaluation.masked_perplexity(checkpoint, eval_data, blocks)
        return found

    def serve(resume: bool) -> dict:
        served = evaluation.ask_served(directory, steps.plan.prompts, eval_data, blocks, log)
        check_same(name, known, served["perplexity"])
        return served

    eval_data, blocks, log = list(steps.eval_data), steps.plan.eval_blocks, steps.work / f"server-{name}.log"
    inputs = ("model", "text", *after)
    settings = {"questions": evaluation.questions_digest(), "eval_blocks": steps.plan.eval_blocks}
    known = steps.records.step(f"know-{name}", settings, know, after=inputs)
    settings = {"chat": list(steps.plan.prompts), "chat_tokens": plan.ANSWER_TOKENS}
    steps.records.step(f"serve-{name}", settings, serve, after=(f"know-{name}", *inputs))


def check_same(name: str, known: dict, served: float) -> None:
    """Raises InputError unless the model that is served is the one that was masked."""
    converted, problems = known["perplexity"], []
    masked = known.get("masked_perplexity", converted)
    rounding = ROUNDING if masked < BROKEN else ROUNDING_OF_BROKEN
    if not abs(converted / masked - 1) <= rounding:
        problems.append(f"converted {converted:.4f}, masked {masked:.4f}: more than rounding ({rounding:.1%})")
    if not abs(served / converted - 1) <= SAME_WEIGHTS:
        problems.append(f"served by vLLM {served:.4f}, in Transformers {converted:.4f}: more than {SAME_WEIGHTS:.2%}")
    if problems:
        raise InputError(f"{name}: perplexities differ that must not:", problems)


def _time(steps: Run, sparsity: float) -> None:
    """The best model of this sparsity against the dense one, on vLLM."""
    pruned = best(steps, sparsity)
    out = steps.work / f"speed-{plan.percent(sparsity)}"
    directories = ["--dense", str(steps.model), "--pruned", str(steps.directory("out", pruned))]
    options = ["--dtype", plan.DTYPE, "--repeats", str(plan.SPEED_REPEATS), "--cases", *plan.SPEED_CASES]

    def speed(resume: bool) -> dict:
        command = run(sys.executable, "-m", "bench.e2e_speedup", *directories, "--output-dir", out, *options)
        return {"pruned": pruned, **read_json(out / "e2e_speedup.json"), "command": command}

    step = f"speed-{plan.percent(sparsity)}"
    steps.records.step(step, {"pruned": pruned, "options": options}, speed, after=(f"convert-{pruned}",))


def _sizes(directory: Path) -> dict:
    geometry = ModelGeometry.from_config(read_config(directory))
    return {"parameters": geometry.num_parameters, "kv_cache_bytes_per_token": geometry.kv_cache_bytes_per_token(2)}
