"""lm-evaluation-harness reads pruned models through both of its backends. Run by `make lm-eval`, which installs it."""

import json
import math

import pytest
import torch
from helpers.serving import Geometry
from helpers.tiny import converted
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pruned_vllm.hf.loading import load_pruned

lm_eval = pytest.importorskip("lm_eval", reason="`make lm-eval` installs it")

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
metadata:
  version: 1
"""


@pytest.fixture
def ragged(tmp_path):
    """A converted model with a tokenizer that knows the numbers up to 255, and a task file of 20 questions."""
    geometry = Geometry(((3, 1, 0, 4), (0, 0, 0, 0), (4, 3, 2, 1)), (51, 99, 0), group=4)
    directory = converted(tmp_path, *geometry.model_and_masks())
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(256)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="0").save_pretrained(directory)
    numbers = torch.randint(1, 255, (20, 7), generator=torch.Generator().manual_seed(3)).tolist()
    questions = [
        {"question": " ".join(map(str, row[:4])), "choices": [str(n) for n in row[4:]], "answer": row[0] % 3}
        for row in numbers
    ]
    (tmp_path / "task").mkdir()
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "task" / "local_choice.yaml").write_text(TASK.format(data=data))
    return directory


def evaluate(model, ragged, **arguments) -> list[list[float]]:
    """The log-likelihood of every choice of every question."""
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model=model,
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(ragged.parent / "task"), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        **arguments,
    )
    assert 0 <= results["results"]["local_choice"]["acc,none"] <= 1
    samples = sorted(results["samples"]["local_choice"], key=lambda sample: sample["doc_id"])
    assert len(samples) == 20
    return [[response[0][0] for response in sample["resps"]] for sample in samples]


def test_both_backends_agree(ragged):
    from lm_eval.models.huggingface import HFLM

    tokenizer = PreTrainedTokenizerFast.from_pretrained(ragged)
    hf = evaluate(HFLM(pretrained=load_pruned(ragged, dtype=torch.float32), tokenizer=tokenizer), ragged)
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 8}
    vllm = evaluate("vllm", ragged, model_args={"pretrained": str(ragged), **options})
    for left, right in zip(hf, vllm, strict=True):
        for a, b in zip(left, right, strict=True):
            assert math.isfinite(a) and abs(float(a) - float(b)) < 1e-4
