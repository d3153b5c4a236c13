"""Memory of weights in huge pages."""

import re
from pathlib import Path

import pytest
import torch

from pruned_vllm.kernels.huge_pages import prefer_huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(address: int) -> int:
    """Of the mapping that an address is in."""
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, end = (int(part, 16) for part in mapping.split(" ", 1)[0].split("-"))
        if start <= address < end:
            return 1024 * int(re.search(r"AnonHugePages:\s+(\d+)", mapping).group(1))
    return 0


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="no transparent huge pages here")
def test_memory_comes_in_huge_pages():
    weights = torch.empty(64, 2**20, dtype=torch.int8)
    prefer_huge_pages(weights)
    weights.fill_(3)
    assert huge_bytes(weights[32].data_ptr()) >= 2**25, "half of them, at least: memory may be short of whole ones"
    assert (weights == 3).all()


@pytest.mark.parametrize("size", (0, 1, 5000))
def test_small_tensors_stay_as_they_are(size):
    weights = torch.full((size,), 7)
    prefer_huge_pages(weights)
    assert (weights == 7).all()
