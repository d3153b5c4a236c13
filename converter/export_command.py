"""convert-pruned export: a converted model as one GGUF file, which llama.cpp serves.

convert-pruned export out/ out.gguf
llama-server -m out.gguf
"""

import argparse
import importlib.util
from pathlib import Path

from pruned_vllm.common.command import run_command
from pruned_vllm.common.errors import InputError

DESCRIPTION = """\
Writes a converted model as one GGUF file for llama.cpp: Llama, Mistral, Qwen2 and Qwen3, every layer at its real size
where llama.cpp can say it. Query groups that differ within a layer, and sublayers that are gone, are filled up with
zeros, which changes no output. Needs the package gguf, and sentencepiece for tokenizers of that kind."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="convert-pruned export", description=DESCRIPTION)
    parser.add_argument("out", metavar="OUT", type=Path, help="what convert-pruned wrote, or a stock model")
    parser.add_argument("file", metavar="FILE.gguf", type=Path, help="file to write; must not exist")
    parser.add_argument(
        "--without-tokenizer",
        action="store_true",
        help="leave the tokenizer out; the file then takes and gives ids of tokens",
    )
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: _export(args))


def _export(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise InputError("GGUF files need the package gguf, which is not installed: pip install gguf sentencepiece")
    from converter.llama_cpp.file import export_gguf

    architecture, notes = export_gguf(args.out, args.file, without_tokenizer=args.without_tokenizer)
    print("\n".join([f"Wrote {args.file}, for llama.cpp's architecture {architecture!r}.", *notes]))
