"""bench.methods: which runs of an earlier measurement stay beside new ones."""

import pytest

from bench.methods import _runs, with_others
from pruned_vllm.common.errors import InputError

PLANNED = _runs("ablations", (42, 43))


def results_of(question: str, answers: list[str], perplexity: float, **changes) -> dict:
    runs = [
        {
            "question": run.question,
            "answer": run.answer,
            "model": run.model,
            "sparsity": run.sparsity,
            "seed": run.seed,
            "options": list(run.options),
            "dense_perplexity": 100.0,
            "masked_perplexity": perplexity,
        }
        | changes
        for run in PLANNED
        if run.question == question and run.answer in answers
    ]
    return {"models": {"llama": {"seconds": perplexity}}, "runs": runs, "jobs": 1, "versions": {"torch": "2"}}


def test_other_answers_stay_in_the_order_of_the_table():
    search = results_of("search", ["uniform sparsity", "search (tyr)"], 1)
    gates = results_of("gate and distillation", ["hard-concrete"], 2)
    new = results_of("search", ["search without error accumulation"], 3)
    before = search | {"runs": search["runs"] + gates["runs"]}
    together = with_others(new, before, PLANNED)["runs"]
    assert [(run["masked_perplexity"], run["seed"]) for run in together] == [
        (2, 42), (2, 43), (1, 42), (1, 43), (3, 42), (3, 43), (1, 42), (1, 43)
    ]  # fmt: skip


def test_a_new_answer_replaces_the_old_one():
    old, new = (results_of("search", ["uniform sparsity"], perplexity) for perplexity in (1, 2))
    assert with_others(new, old, PLANNED) == new


@pytest.mark.parametrize("change", [{"options": ["--method", "tyr"]}, {"dense_perplexity": 101.0}])
def test_runs_that_would_be_others_today_go(change):
    old, new = results_of("search", ["search (tyr)"], 1, **change), results_of("search", ["uniform sparsity"], 2)
    assert with_others(new, old, PLANNED)["runs"] == new["runs"]


def test_runs_with_other_libraries_go():
    old, new = results_of("search", ["search (tyr)"], 1), results_of("search", ["uniform sparsity"], 2)
    assert with_others(new, old | {"versions": {"torch": "1"}}, PLANNED)["runs"] == new["runs"]


def test_only_takes_questions_and_answers():
    assert {run.answer for run in _runs("ablations", (1,), ["search"])} == {
        "uniform sparsity",
        "search without error accumulation",
        "search (tyr)",
    }
    assert {run.answer for run in _runs("ablations", (1,), ["of each layer"])} == {"of each layer"}
    with pytest.raises(InputError, match="slowly: there are"):
        _runs("ablations", (1,), ["slowly"])
