"""The steps of bench.quantized: quantize, serve, time; each leaves a record and is not done again."""

import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from bench.commands import run, script
from bench.quantized.plan import PICO_SPARSITY, Pair, Settings
from bench.real.plan import DTYPE
from bench.real.records import Records
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import read_config
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import read_headers
from pruned_vllm.formats.weights import find_weight_files

SERVED_NAME = "quantized"
# Exceptions by which vLLM says that it does not take a model; others mean that something broke.
REFUSAL = re.compile(r"\b(?:ValueError|NotImplementedError|AssertionError|InputError): ")


def run_steps(pairs: Sequence[Pair], settings: Settings, work: Path, records: Records) -> None:
    """All steps of `planned`. What vLLM refuses is a result, too. Raises InputError when something else fails."""
    for pair in pairs:
        before = [f"learn-{pair.name}"] * pair.learned
        if pair.learned:
            records.step(before[0], {"sparsity": PICO_SPARSITY}, partial(_learn, pair, work), outputs=(pair.pruned,))
        directories = pair.directories(work, settings.schemes)
        for form, directory in directories.items():
            after = list(before)
            if "-" in form:
                after.append(f"quantize-{pair.name}-{form}")
                quantize = partial(_quantize, pair, form, directory)
                weights = find_weight_files(pair.dense if form.startswith("dense") else pair.pruned)
                of = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in weights}
                records.step(after[-1], {"of": of}, quantize, after=before, outputs=(directory,))
            serve = partial(_serve, pair, directory, work / pair.name / f"server-{form}.log")
            records.step(f"serve-{pair.name}-{form}", {"texts": list(map(str, pair.texts))}, serve, after=after)
        for scheme in settings.schemes:
            forms = ("dense", "pruned", f"dense-{scheme}", f"pruned-{scheme}")
            compared = dict(zip(("dense", "pruned", "quantized", "both"), forms, strict=True))
            served = {name: records.done[f"serve-{pair.name}-{form}"]["result"] for name, form in compared.items()}
            about = {**vars(settings), "cases": [case.name for case in settings.cases], "schemes": [scheme]}
            speed = partial(_time, pair, {name: directories[form] for name, form in compared.items()}, served, settings)
            after = [f"serve-{pair.name}-{form}" for form in forms]
            records.step(f"speed-{pair.name}-{scheme}", about, speed, after=after)


def describe(directory: Path) -> dict:
    """Of a model's files: parameters, padding included, and bytes of the weights."""
    tensors = read_headers(directory)
    geometry = ModelGeometry.from_config(read_config(directory))
    size = sum(tensor.span[1] - tensor.span[0] for tensor in tensors.values())
    return {"path": str(directory), "parameters": geometry.num_parameters, "bytes": size}


def _learn(pair: Pair, work: Path, was_interrupted: bool) -> Mapping:
    import shutil

    from bench.pico_moe import learn_one

    checkpoint = work / pair.name / "ckpt"
    shutil.rmtree(checkpoint, ignore_errors=True)
    found = learn_one(pair.dense, checkpoint, PICO_SPARSITY, "ddp", "global", 42)
    run(script("convert-pruned"), checkpoint, pair.pruned, "--overwrite")
    return {"expert_sparsity": found["expert_sparsity"], "masked_perplexity": found["masked_perplexity"]}


def _quantize(pair: Pair, form: str, directory: Path, was_interrupted: bool) -> Mapping:
    source, _, scheme = form.partition("-")
    model = pair.dense if source == "dense" else pair.pruned
    command = [sys.executable, "-m", "converter.quantize.command", model, directory, "--scheme", scheme, "--overwrite"]
    return {"command": run(*command)}


def _serve(pair: Pair, directory: Path, log: Path, was_interrupted: bool) -> Mapping:
    """{"perplexity", "tokens"}, or {"refused"} with the last line of vLLM's log in which it refuses the model."""
    from transformers import AutoTokenizer

    from bench.real.evaluation import held_out
    from bench.served_text import served_perplexity
    from bench.speed.engines import through_plugin
    from bench.speed.server import served

    log.parent.mkdir(parents=True, exist_ok=True)
    ids = held_out(AutoTokenizer.from_pretrained(pair.dense), pair.texts).tolist()
    geometry = ModelGeometry.from_config(read_config(directory))
    overrides = through_plugin(geometry)["hf_overrides"] if pair.through_plugin else None
    try:
        with served(directory, log, SERVED_NAME, DTYPE, overrides, pair.dense) as client:
            return {
                "perplexity": served_perplexity(client, SERVED_NAME, ids),
                "tokens": len(ids),
                **describe(directory),
            }
    except InputError:
        refusals = [line.strip() for line in log.read_text(errors="replace").splitlines() if REFUSAL.search(line)]
        if not refusals:  # it crashed, or did not answer in time
            raise
        return {"refused": refusals[-1], **describe(directory)}


def _time(
    pair: Pair,
    directories: Mapping[str, Path],
    served: Mapping[str, Mapping],
    settings: Settings,
    was_interrupted: bool,
) -> Mapping:
    from bench.quantized.speed import compare

    if refused := {name: found["refused"] for name, found in served.items() if "refused" in found}:
        return {"refused": refused}
    return compare(directories, settings, through_plugin=pair.through_plugin)
