"""
Pico models: small causal LMs that were really trained, for demos and tests that have no network.

They are stock Hugging Face classes with a byte-level BPE tokenizer of their own, trained for about a
minute on two CPU cores on English that ships with Python: the reference topics behind `help()` and the
docstrings of the standard library. Small, but not random: their held-out perplexity is far below that of
token frequencies alone, so pruning them costs something that can be measured.

    python -m bench.pico llama        # multi-head attention, untied embeddings
    python -m bench.pico qwen3        # grouped-query attention, q/k norms, tied embeddings
    python -m bench.pico qwen3_moe    # the same with 16 experts in each layer, of which a token takes 2
    python -m bench.pico              # all

Notable facts:
- A model is trained once and cached in ${XDG_CACHE_HOME:-~/.cache}/pruned-vllm/pico. The directory's name
  hashes this file and the versions of Python and the libraries: change one and it trains anew.
- Beside the model lie train.txt and heldout.txt (no paragraph is in both) and pico.json (sizes, perplexities).
- The same seed on the same machine with the same number of threads gives the same weights.
- head_dim is 32, the smallest that vLLM's CPU attention serves.
- Routers are trained to use all experts (bench/experts/router.py); `router_load` in pico.json is the share of the
  held-out text that each expert gets.
"""

import argparse
import ast
import functools
import hashlib
import json
import math
import platform
import sys
import sysconfig
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pruned_vllm.common.command import run_command
from pruned_vllm.common.directories import atomic_directory
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import cache_directory, read_json, write_json

VOCAB_SIZE = 2048
BLOCK_SIZE = 128  # tokens per training sequence
BATCH_SIZE = 4  # sequences per step
STEPS = 1100
LEARNING_RATE = 4e-3
WARMUP_STEPS = 40
BALANCING = 0.02  # weight of the loss that keeps all experts in use
SEED = 0
SPECIAL_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}

SHARED_CONFIG = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}
# name -> (configuration class, model class, what differs from SHARED_CONFIG)
RECIPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"num_hidden_layers": 4, "num_key_value_heads": 8, "intermediate_size": 352, "tie_word_embeddings": False},
    ),
    "qwen3": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {"num_hidden_layers": 4, "num_key_value_heads": 4, "intermediate_size": 352, "tie_word_embeddings": True},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.0,  # see balancing_loss
            "tie_word_embeddings": True,
        },
    ),
}

# Folders of the standard library's directory that hold tests, applications, tables or other people's code.
SKIPPED_FOLDERS = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3",
    "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip


def documents() -> list[str]:
    """The texts: one per `help()` topic, and one per standard-library module (its docstrings in source order).

    Modules are parsed, never imported.
    """
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(stdlib).parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old string literals
            tree = ast.parse(path.read_bytes())
        nodes = [
            node for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        nodes.sort(key=lambda node: node.lineno)
        texts.append("\n\n".join(filter(None, map(ast.get_docstring, [tree, *nodes]))))
    return texts


@functools.cache
def corpus() -> tuple[str, str]:
    """(train_text, heldout_text), split by document: about one in twenty is held out.

    Topics quote each other and modules copy each other's docstrings, so each paragraph is kept once in the
    whole corpus, and the held-out documents choose first: no paragraph of theirs is trained on.
    """
    digests = {hashlib.sha256(text.encode()).hexdigest(): text for text in documents()}
    in_hash_order = [digests[digest] for digest in sorted(digests)]
    seen = set()

    def keep_new_paragraphs(texts: list[str]) -> str:
        kept = []
        for text in texts:
            for paragraph in text.split("\n\n"):
                words = " ".join(paragraph.split())
                if words and words not in seen:
                    seen.add(words)
                    kept.append(paragraph.strip("\n"))
        return "\n\n".join(kept) + "\n"

    heldout_text = keep_new_paragraphs(in_hash_order[::20])
    train_text = keep_new_paragraphs([text for i, text in enumerate(in_hash_order) if i % 20])
    return train_text, heldout_text


def train_tokenizer(text: str):
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens, as a PreTrainedTokenizerFast that adds no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=SHARED_CONFIG["max_position_embeddings"], **SPECIAL_TOKENS
    )


def unigram_perplexity(train_ids, heldout_ids) -> float:
    """What token frequencies alone reach (add-one smoothing), on the tokens that `perplexity` scores."""
    import torch

    from learner.model.perplexity import EVAL_BLOCK_SIZE

    counts = torch.bincount(train_ids, minlength=VOCAB_SIZE).double() + 1
    scored = heldout_ids[: len(heldout_ids) // EVAL_BLOCK_SIZE * EVAL_BLOCK_SIZE].view(-1, EVAL_BLOCK_SIZE)[:, 1:]
    return math.exp(-(counts / counts.sum()).log()[scored].mean().item())


def pico_model(name: str) -> Path:
    """The directory of a trained model (a name of RECIPES), trained now if it is not in the cache.

    It holds the model in float32, its tokenizer, train.txt, heldout.txt and pico.json. InputError for other names.
    """
    if name not in RECIPES:
        raise InputError(f"there is no pico model {name!r}; choose from {', '.join(RECIPES)}")
    cache = cache_directory() / "pico"
    libraries = [version(library) for library in ("torch", "transformers", "tokenizers")]
    recipe = [Path(__file__).read_text(), platform.python_version(), libraries]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    directory = cache / f"{name}-{digest}"
    if not directory.exists():
        try:
            with atomic_directory(directory, writer="bench.pico", overwrite=False) as temporary:
                _train(name, temporary)
        except InputError:
            if not directory.exists():  # another process may have finished the same model first
                raise
    return directory


def _train(name: str, directory: Path) -> None:
    import torch
    import transformers
    from tqdm import trange

    from bench.experts.router import balancing_loss, expert_load
    from learner.data.reading import BlockSampler, tokenize_files
    from learner.model.perplexity import perplexity

    config_class, model_class, differences = RECIPES[name]
    texts = dict(zip(("train", "heldout"), corpus(), strict=True))
    for part, text in texts.items():
        (directory / f"{part}.txt").write_text(text, encoding="utf-8")
    tokenizer = train_tokenizer(texts["train"])
    train_ids, heldout_ids = (tokenize_files(tokenizer, [directory / f"{part}.txt"]) for part in texts)

    torch.manual_seed(SEED)
    special_ids = {f"{token}_id": tokenizer.convert_tokens_to_ids(text) for token, text in SPECIAL_TOKENS.items()}
    config = getattr(transformers, config_class)(**SHARED_CONFIG, **differences, **special_ids)
    model = getattr(transformers, model_class)(config)
    has_router = hasattr(config, "num_experts")
    blocks = BlockSampler(train_ids, BLOCK_SIZE, SEED)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, STEPS)
    started = time.perf_counter()
    progress = trange(STEPS, desc=f"training pico {name}", unit="step")
    for _ in progress:
        batch = blocks.next_batch(BATCH_SIZE)
        if has_router:
            output = model(input_ids=batch, labels=batch, output_router_logits=True)
            loss = output.loss + BALANCING * balancing_loss(output.router_logits, config.num_experts_per_tok)
        else:
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")

    model.eval()
    facts = {
        "parameters": model.num_parameters(),
        "train_tokens": len(train_ids),
        "heldout_tokens": len(heldout_ids),
        "seconds": round(time.perf_counter() - started, 1),
        "heldout_perplexity": perplexity(model, heldout_ids),
        "unigram_perplexity": unigram_perplexity(train_ids, heldout_ids),
    }
    if has_router:
        facts["router_load"] = expert_load(model, heldout_ids)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    write_json(directory / "pico.json", facts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.pico", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(RECIPES)}; default: all")
    args = parser.parse_args(argv)

    def show() -> None:
        from bench.experts.router import describe_load

        for name in args.names or RECIPES:
            directory = pico_model(name)
            facts = read_json(directory / "pico.json")
            print(f"{directory}: {facts['parameters']:,} parameters, trained for {facts['seconds']} s")
            print(
                f"  held-out perplexity {facts['heldout_perplexity']:.2f}; "
                f"token frequencies alone {facts['unigram_perplexity']:.2f}"
            )
            if "router_load" in facts:
                print(describe_load(facts["router_load"]))

    return run_command(parser.prog, show)


if __name__ == "__main__":
    sys.exit(main())
