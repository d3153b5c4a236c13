"""convert-pruned export: a converted model in the form of another project.

convert-pruned export out/ out.gguf     # llama-server -m out.gguf
convert-pruned export out/ mone/        # vllm serve mone/, from vLLM 0.33 on, without the plugin
"""

import argparse
import importlib.util
from pathlib import Path

from pruned_vllm.common.command import run_command
from pruned_vllm.common.errors import InputError

DESCRIPTION = """\
Writes a converted model in the form of another project.

FILE.gguf, for llama.cpp: Llama, Mistral, Qwen2 and Qwen3, every layer at its real size where llama.cpp can say it.
Query groups that differ within a layer, and sublayers that are gone, are filled up with zeros, which changes no
output. Needs the package gguf, and sentencepiece for tokenizers of that kind.

DIRECTORY, as MoNE has it (approximate_experts): a model that lost whole experts and nothing else, which vLLM serves
without the plugin from 0.33 on. Experts without channels become constants, those of MoNE or zeros."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="convert-pruned export", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="what convert-pruned wrote, or a stock model")
    parser.add_argument("target", metavar="FILE.gguf|DIRECTORY", type=Path, help="to write; must not exist")
    parser.add_argument(
        "--without-tokenizer",
        action="store_true",
        help="leave the tokenizer out of FILE.gguf; the file then takes and gives ids of tokens",
    )
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: _export(args))


def _export(args: argparse.Namespace) -> None:
    if args.target.suffix != ".gguf":
        if args.without_tokenizer:
            raise InputError(f"--without-tokenizer is for FILE.gguf, and {args.target} does not end in .gguf")
        from converter.mone_export import export_mone

        count = export_mone(args.out, args.target)
        print(f"Wrote {args.target}, with constants in the place of {count:,} experts, for vLLM 0.33 and later.")
        return
    if importlib.util.find_spec("gguf") is None:
        raise InputError("GGUF files need the package gguf, which is not installed: pip install gguf sentencepiece")
    from converter.llama_cpp.file import export_gguf

    architecture, notes = export_gguf(args.out, args.target, without_tokenizer=args.without_tokenizer)
    print("\n".join([f"Wrote {args.target}, for llama.cpp's architecture {architecture!r}.", *notes]))
