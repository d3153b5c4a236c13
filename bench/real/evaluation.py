"""What a model knows, in float32: in Transformers, masked and converted, and served by vLLM."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bench.real import plan
from bench.real.questions import QUESTIONS_FILE, accuracy, read_questions
from bench.served_text import served_perplexity
from bench.speed.server import served
from learner.data.reading import beginning, blocks_of_text, tokenize_files
from learner.model.masking import apply_masks
from learner.model.perplexity import EVAL_BLOCK_SIZE, perplexity
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.masked import MASKS_FILE, PruningInfo
from pruned_vllm.hf import load_pruned

if TYPE_CHECKING:
    from openai import OpenAI

SERVED_NAME = "real"
GREEDY: dict[str, Any] = {"max_tokens": plan.ANSWER_TOKENS, "temperature": 0}


def questions_digest() -> str:
    return hashlib.sha256(QUESTIONS_FILE.read_bytes()).hexdigest()


def held_out(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Path], count: int = plan.EVAL_BLOCKS) -> torch.Tensor:
    """Ids [N] of what perplexity is measured on: `count` blocks, or all that there are, from all of the text.

    Documents differ more than models do, so blocks of one document would not do. Raises InputError for a short text.
    """
    ids = tokenize_files(tokenizer, list(texts))
    blocks = blocks_of_text(ids, EVAL_BLOCK_SIZE, beginning(tokenizer))
    if not len(blocks):
        raise InputError(f"--eval-data has {len(ids)} tokens; perplexity needs {EVAL_BLOCK_SIZE}")
    chosen = torch.linspace(0, len(blocks) - 1, min(count, len(blocks))).round().long()
    return blocks[chosen].flatten()


def masked_perplexity(checkpoint: Path, texts: Sequence[Path], blocks: int) -> float:
    """Perplexity of the dense model under the masks of `checkpoint`, which is what a served model is held to."""
    info = PruningInfo.read(checkpoint)
    directory = info.base_model or checkpoint
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if info.lora_adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, checkpoint / info.lora_adapter).merge_and_unload()
    ids = held_out(AutoTokenizer.from_pretrained(directory), texts, blocks)
    with apply_masks(model, load_file(checkpoint / MASKS_FILE), info.channel_mask_site):
        return perplexity(model.eval(), ids, title="masked perplexity", show_progress=True)


def knowledge(directory: Path, texts: Sequence[Path], blocks: int) -> dict:
    """Of a converted model, or of a dense one: "perplexity", and what `accuracy` says."""
    model = load_pruned(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = held_out(tokenizer, texts, blocks)
    found = accuracy(model, tokenizer, read_questions())
    return {"tokens": len(ids), "perplexity": perplexity(model, ids, show_progress=True), **found}


def ask_served(directory: Path, prompts: Sequence[str], texts: Sequence[Path], blocks: int, log: Path) -> dict:
    """Of `vllm serve DIRECTORY`, through the OpenAI client: "perplexity", and "chat": prompts with answers.

    A model without a chat template goes on with the prompts.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = held_out(tokenizer, texts, blocks).tolist()
    answer = _chat if tokenizer.chat_template else _continuation
    with served(directory, log, SERVED_NAME) as client:
        chat = [{"prompt": prompt, "answer": answer(client, prompt)} for prompt in prompts]
        return {"perplexity": served_perplexity(client, SERVED_NAME, ids), "chat": chat}


def _chat(client: "OpenAI", prompt: str) -> str | None:
    answer = client.chat.completions.create(model=SERVED_NAME, messages=[{"role": "user", "content": prompt}], **GREEDY)
    return answer.choices[0].message.content


def _continuation(client: "OpenAI", prompt: str) -> str:
    return client.completions.create(model=SERVED_NAME, prompt=prompt, **GREEDY).choices[0].text
