"""Settings that every test needs before vllm or torch is imported."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # engines in this process: starts in seconds
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_MODULES_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "modules"))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture
def ckpt(tmp_path):
    from masked import ragged_checkpoint

    return ragged_checkpoint(tmp_path / "ckpt")
