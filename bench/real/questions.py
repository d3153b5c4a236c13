"""Multiple-choice questions, scored as lm-evaluation-harness does for its figure `acc`: the answer that the model finds
likeliest counts. The log-probabilities of an answer's tokens are summed up, not divided by its length (`acc_norm`), and
the prompt is plain text without the chat template, as there by default.

questions.json has 40 easy ones, written for this project, each with four answers. So few tell a model that knows from
one that guesses, and no more: at 20 right answers the standard error is 8 points, and a guess is right in 25 %.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from learner.data.reading import beginning
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json

QUESTIONS_FILE = Path(__file__).with_name("questions.json")
PROMPT = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Question:
    """Attributes: right: index of the right one among `answers`."""

    question: str
    answers: tuple[str, ...]
    right: int


def read_questions(path: Path = QUESTIONS_FILE) -> list[Question]:
    """Raises InputError with every question that is wrong."""
    questions, problems = [], []
    for number, entry in enumerate(read_json(path, list), 1):
        question = Question(entry["question"], tuple(entry["answers"]), entry["answers"].index(entry["right"]))
        if len(set(question.answers)) != len(question.answers):
            problems.append(f"question {number}: an answer stands twice")
        questions.append(question)
    if problems:
        raise InputError(f"{path} cannot be used:", problems)
    return questions


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answers: Sequence[str]
) -> list[float]:
    """Of each answer, after the prompt and a space: the sum of the log-probabilities of its tokens."""

    def tokens(text: str) -> list[int]:
        return beginning(tokenizer) + tokenizer(text, add_special_tokens=False)["input_ids"]

    context = tokens(prompt)
    whole = [tokens(f"{prompt} {answer}") for answer in answers]
    longest = max(map(len, whole))
    # Padded on the right, where a causal model does not look from before; what stands there is not read.
    batch = torch.tensor([ids + [0] * (longest - len(ids)) for ids in whole], device=model.device)
    scores = model(input_ids=batch).logits.float().log_softmax(-1)
    return [
        sum(scores[row, place - 1, ids[place]].item() for place in range(len(context), len(ids)))
        for row, ids in enumerate(whole)
    ]


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> dict:
    """{"right", "questions", "accuracy", "standard_error"}"""
    right = 0
    for question in questions:
        prompt = PROMPT.format(question=question.question)
        scores = log_likelihoods(model, tokenizer, prompt, question.answers)
        right += scores.index(max(scores)) == question.right
    share = right / len(questions)
    error = math.sqrt(share * (1 - share) / len(questions))
    return {"right": right, "questions": len(questions), "accuracy": share, "standard_error": error}
