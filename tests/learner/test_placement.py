"""Where weights are and in which dtype, where nobody said it."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from helpers.learning import run
from helpers.tiny import tiny_model

from learner.job import PLACES
from learner.model import placement
from pruned_vllm.common import environment
from pruned_vllm.common.errors import InputError

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [
    (BF16, "cpu", ["AVX2", "AVX-512"], F32),
    (BF16, "cpu", ["AVX-512 BF16"], BF16),
    (BF16, "cpu", ["AMX BF16"], BF16),
    (F16, "cpu", ["AVX-512 BF16", "AMX BF16"], F32),
    (F32, "cpu", [], F32),
    (BF16, "cuda:1", [], BF16),
    (F16, "cuda", [], F16),
]


@pytest.mark.parametrize(("stored", "device", "features", "expected"), DTYPES)
def test_a_cpu_computes_in_what_it_has_instructions_for(monkeypatch, stored, device, features, expected):
    monkeypatch.setattr(environment, "cpu_features", lambda: features)
    assert placement.fast_dtype(stored, device) == expected


@pytest.mark.parametrize("method", ["magnitude", "tyr"])
def test_it_is_said_and_weights_are_written_as_they_were(word_model, monkeypatch, capsys, method):
    monkeypatch.setattr(environment, "cpu_features", lambda: [])
    tiny_model("qwen3", 6, 3, 40).bfloat16().save_pretrained(word_model / "model")
    arguments = [word_model / "model", word_model / "ckpt", "--method", method, "--device", "cpu"]
    if method == "tyr":
        arguments += ["--data", word_model / "text.txt", "--calibration-sequences", 2, "--sequence-length", 32]
        arguments += ["--iterations", 0]
    assert run(*arguments) == 0
    assert "Computing in torch.float32: this CPU has no fast torch.bfloat16; see --dtype" in capsys.readouterr().out
    if method == "tyr":
        assert json.loads((word_model / "ckpt" / "config.json").read_text())["dtype"] == "bfloat16"


def processes(number: int, kind: DistributedType) -> SimpleNamespace:
    return SimpleNamespace(num_processes=number, distributed_type=kind, device=torch.device("cpu"))


CHOICES = [
    (None, 1, DistributedType.NO, "whole"),
    (None, 2, DistributedType.MULTI_CPU, "whole"),
    (None, 2, DistributedType.FSDP, "sharded"),
    ("whole", 2, DistributedType.FSDP, "whole"),
    ("sharded", 2, DistributedType.MULTI_CPU, "sharded"),
    ("sharded", 1, DistributedType.NO, "whole"),
    ("spread", 1, DistributedType.NO, "spread"),
]


@pytest.mark.parametrize(("asked", "number", "kind", "expected"), CHOICES)
def test_the_place_of_weights(asked, number, kind, expected):
    assert placement.place_of(asked, processes(number, kind), PLACES) == expected


def test_a_place_that_cannot_be_is_refused(word_model, capsys):
    with pytest.raises(InputError, match="--weights spread is for one process"):
        placement.place_of("spread", processes(2, DistributedType.MULTI_GPU), PLACES)
    arguments = [word_model / "model", word_model / "ckpt", "--method", "wanda", "--data", word_model / "text.txt"]
    assert run(*arguments, "--weights", "sharded") == 2
    assert "wanda cannot learn with --weights sharded; it can with whole, spread" in capsys.readouterr().err
    arguments = [word_model / "model", word_model / "ckpt", "--data", word_model / "text.txt", "--weights", "offloaded"]
    assert run(*arguments) == 2
    assert "--weights offloaded needs --gradient-checkpointing too" in capsys.readouterr().err
