"""Settings that every test needs before vllm or torch is imported."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # engines in this process: starts in seconds
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("HF_HUB_OFFLINE", "1")
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")  # "gw0" and so on where several processes share the tests
os.environ.setdefault("HF_MODULES_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / f"modules{WORKER}"))
if WORKER:  # a core for each
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(cores[int(WORKER[2:]) % len(cores)]))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture
def ckpt(tmp_path):
    from helpers.masked import ragged_checkpoint

    return ragged_checkpoint(tmp_path / "ckpt")


@pytest.fixture
def word_model(tmp_path):
    """A saved tiny model with a tokenizer that knows digits."""
    from helpers.tiny import tiny_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(256)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny_model("qwen3", 6, 3, 40).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(str(i * i % 256) for i in range(3000)))
    return tmp_path
