"""The multiple-choice questions of `make real`, and how answers are scored."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.real.questions import PROMPT, QUESTIONS_FILE, Question, accuracy, log_likelihoods, read_questions
from pruned_vllm.common.errors import InputError


@pytest.mark.parametrize("bos", [[], ["255"]], ids=["no bos", "bos"])
def test_questions_are_scored_by_the_likelihood_of_their_answers(bos, word_model):
    """As without padding, one answer at a time."""
    model = AutoModelForCausalLM.from_pretrained(word_model / "model", dtype=torch.float32).eval()
    special = {"bos_token": bos[0], "add_bos_token": True} if bos else {}
    tokenizer = AutoTokenizer.from_pretrained(word_model / "model", **special)
    prompt, answers = "5 17 33", ["3", "8 9 250", "77 1"]
    expected = []
    for answer in answers:
        ids = torch.tensor([[int(word) for word in [*bos, *f"{prompt} {answer}".split()]]])
        scores = model(input_ids=ids).logits.log_softmax(-1)[0]
        expected.append(sum(scores[place - 1, ids[0, place]].item() for place in range(len(bos) + 3, ids.shape[1])))
    assert log_likelihoods(model, tokenizer, prompt, answers) == pytest.approx(expected, abs=1e-4)

    template = PROMPT.format(question="7")
    scores = log_likelihoods(model, tokenizer, template, answers)
    found = [Question("7", tuple(answers), index) for index in (scores.index(max(scores)), scores.index(min(scores)))]
    assert accuracy(model, tokenizer, found) == {
        "right": 1,
        "questions": 2,
        "accuracy": 0.5,
        "standard_error": pytest.approx(0.3536, abs=1e-4),
    }


def test_the_committed_questions():
    questions = read_questions()
    assert len(questions) == 40
    assert {len(question.answers) for question in questions} == {4}
    assert len({question.question for question in questions}) == 40
    assert {question.right for question in questions} == {0, 1, 2, 3}


def test_questions_with_the_same_answer_twice_are_refused(tmp_path):
    entries = json.loads(QUESTIONS_FILE.read_text())
    entries[2]["answers"] = [entries[2]["right"]] * 4
    (tmp_path / "questions.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match="question 3: an answer stands twice"):
        read_questions(tmp_path / "questions.json")
