"""The steps of `make compare`: public commands, and what a user would ask of the models that they make."""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.commands import run, script
from bench.compare import plan
from bench.compare.plan import Variant
from bench.pico import corpus
from bench.real.models import MODELS, fetched, source
from bench.real.records import Records
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import FINETUNING_FILE, read_json
from pruned_vllm.formats.config import read_config
from pruned_vllm.formats.fingerprint import Fingerprint
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import read_headers

SPEED_FILE = "e2e_speedup.json"


@dataclass(frozen=True)
class Run:
    """A run in a directory.

    Attributes:
        work: where everything lies.
        model: directory of the dense model.
        train, heldout: text to learn from, and to measure perplexity on.
        timed: whether decoding is timed.
        device: that models are learned, trained and examined on.
    """

    records: Records
    work: Path
    model: Path
    train: Path
    heldout: Path
    timed: bool
    device: str

    def converted(self, name: str) -> Path:
        return self.model if name == "dense" else self.work / name / "out"

    def sources(self, variant: Variant) -> list[str]:
        """Words of --data."""
        named = {"text": str(self.train), "self": "self"}
        if not variant.data:
            return []
        parts = plan.DATA[variant.data]
        written = ["--self-tokens", variant.self_tokens] if "self" in parts else []
        return ["--data", *(named[part] for part in parts), *written]


def run_steps(
    models: dict[str, Variant], work: Path, records: Records, model: str, *, timed: bool, device: str
) -> Iterator[dict[str, Variant]]:
    """Does all steps of `plan.planned(models)`; after each of the models, yields what is complete by then, also of
    earlier runs in the same directory.

    Args:
        model: the dense model, a name of MODELS or a directory.
        timed: whether decoding is timed.
        device: see `Run`.

    Raises:
        InputError: a step fails.
    """
    found = records.step("model", {"model": model}, lambda _: _model(model))
    dense = Path(found["directory"])
    if found["fingerprint"] != str(Fingerprint.from_directory(dense)):
        raise InputError(f"{dense} holds another model than before: choose another --output-dir, or --force model")
    texts = (work / "train.txt", work / "heldout.txt")
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in corpus()]
    records.step("text", {"digests": digests}, lambda _: _write_text(*texts), outputs=texts)
    steps = Run(records, work, dense, *texts, timed, device)
    _examine(steps, "dense", ("model", "text"))
    for variant in models.values():
        _make_and_measure(steps, variant)
        yield {
            name: other
            for name, other in plan.variants().items()
            if records.are_done(partial(_make_and_measure, steps, other))
        }


def _make_and_measure(steps: Run, variant: Variant) -> None:
    last = (_learn if variant.command == "learn" else _recover)(steps, variant)
    _examine(steps, variant.name, (last,))
    if variant.timed:
        time = partial(_time, steps, variant.name, last)
        if steps.timed:
            time()
        else:
            steps.records.are_done(time)  # then the results have what an earlier run timed


def _model(model: str) -> dict:
    directory = fetched(MODELS[model]) if model in MODELS else Path(model)
    where = {"directory": str(directory.resolve()), "source": source(directory)}
    return {**where, "fingerprint": str(Fingerprint.from_directory(directory)), **_sizes(directory)}


def _write_text(train: Path, heldout: Path) -> dict:
    texts = dict(zip((train, heldout), corpus(), strict=True))
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return {path.name: {"characters": len(text)} for path, text in texts.items()}


def _learn(steps: Run, variant: Variant) -> str:
    """Masks and the converted model; returns the last step's name."""
    checkpoint, out = steps.work / variant.name / "ckpt", steps.converted(variant.name)
    # Agreement is measured on the converted model, as everything else in the table.
    options = [*variant.options, *plan.place(steps.device), *steps.sources(variant), "--agreement-prompts", "0"]

    def learn(resume: bool) -> dict:
        command = run(script("learn-masks"), steps.model, checkpoint, *options, _how(checkpoint, resume))
        return {"command": command, **read_json(checkpoint / "learning.json")["results"]}

    def convert(resume: bool) -> dict:
        return {"command": run(script("convert-pruned"), checkpoint, out, "--overwrite"), **_sizes(out)}

    name = variant.name
    steps.records.step(f"learn-{name}", {"options": options}, learn, after=("model", "text"), outputs=(checkpoint,))
    steps.records.step(f"convert-{name}", {}, convert, after=(f"learn-{name}",), outputs=(out,))
    return f"convert-{name}"


def _recover(steps: Run, variant: Variant) -> str:
    """Trains a converted model further, distilled from the dense one; returns the step's name."""
    out, before = steps.converted(variant.name), steps.converted(variant.source)
    options = [*variant.options, *plan.place(steps.device), *steps.sources(variant), "--agreement-prompts", "0"]

    def recover(resume: bool) -> dict:
        teacher = ["--teacher", steps.model]
        command = run(script("finetune-pruned"), before, out, *options, *teacher, _how(out, resume))
        return {"command": command, **read_json(out / FINETUNING_FILE)["results"], **_sizes(out)}

    step = f"recover-{variant.name}"
    settings = {"options": options, "from": variant.source}
    steps.records.step(step, settings, recover, after=(f"convert-{variant.source}",), outputs=(out,))
    return step


def _how(output: Path, resume: bool) -> str:
    """The option that goes on with an interrupted command, or that begins anew."""
    return "--resume" if resume and not output.exists() else "--overwrite"


def _examine(steps: Run, name: str, after: tuple[str, ...]) -> None:
    from bench.compare import evaluation

    def know(resume: bool) -> dict:
        return evaluation.knowledge(steps.model, steps.converted(name), steps.heldout, steps.device)

    settings = plan.EVALUATION | evaluation.digests()
    if steps.device != "cpu":
        settings["device"] = steps.device
    steps.records.step(f"know-{name}", settings, know, after=("model", "text", *after))


def _time(steps: Run, name: str, last: str) -> None:
    """A model against the dense one, on vLLM."""
    out = steps.work / name / "speed"
    directories = ["--dense", str(steps.model), "--pruned", str(steps.converted(name)), "--output-dir", str(out)]
    options = ["--dtype", plan.DTYPE, "--repeats", str(plan.SPEED_REPEATS), "--cases", *plan.SPEED_CASES]

    def speed(resume: bool) -> dict:
        command = run(sys.executable, "-m", "bench.e2e_speedup", *directories, *options)
        return {**read_json(out / SPEED_FILE), "command": command}

    steps.records.step(f"speed-{name}", {"options": options}, speed, after=(last,))


def _sizes(directory: Path) -> dict:
    tensors = read_headers(directory).values()
    return {
        "parameters": ModelGeometry.from_config(read_config(directory)).num_parameters,
        "bytes": sum(end - start for start, end in (tensor.span for tensor in tensors)),
    }
