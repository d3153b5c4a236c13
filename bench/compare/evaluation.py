"""What a model of the comparison knows, in float32 in Transformers, and how far it answers as the dense one does."""

import functools
import hashlib
from pathlib import Path

import torch

from bench.compare import plan
from bench.real.evaluation import held_out
from bench.real.questions import QUESTIONS_FILE, accuracy, read_questions
from learner.data.prompts import AGREEMENT_PROMPTS, prompt_tokens
from learner.job import Job
from learner.model.agreement import ANSWER_TOKENS, Reference
from learner.model.dense import DenseModel, load_dense
from learner.model.generation import end_tokens, generate
from learner.model.perplexity import perplexity
from pruned_vllm.hf import load_pruned


def digests() -> dict:
    """Of what is asked."""
    asked = {"questions": QUESTIONS_FILE.read_bytes(), "agreement": "\n".join(AGREEMENT_PROMPTS).encode()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in asked.items()}


@functools.cache
def _dense(directory: Path, device: str) -> tuple[DenseModel, Reference | None]:
    """Loaded, and asked, once a process."""
    dense = load_dense(Job(model=str(directory), method="magnitude", dtype="float32"), device)
    return dense, Reference.of(dense, len(AGREEMENT_PROMPTS), print)


def knowledge(dense_directory: Path, directory: Path, heldout: Path, device: str) -> dict:
    """Of a converted model, or of the dense one: "perplexity", what `accuracy` says, what `Reference.agreement` says,
    and "answers" to plan.ANSWERED."""
    dense, reference = _dense(dense_directory, device)
    model, tokenizer = load_pruned(directory, dtype=torch.float32).eval().to(device), dense.tokenizer
    ids = held_out(tokenizer, [heldout])
    found = {"tokens": len(ids), "perplexity": perplexity(model, ids, show_progress=True)}
    found |= accuracy(model, tokenizer, read_questions())
    if reference is not None:
        found |= reference.agreement(model)
    prompts = prompt_tokens(tokenizer, plan.ANSWERED)
    answers = generate(model, prompts, ANSWER_TOKENS, end_tokens(dense.directory, tokenizer))
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    return {**found, "answers": dict(zip(plan.ANSWERED, texts, strict=True))}
