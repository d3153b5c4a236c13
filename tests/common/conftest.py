"""Fixtures of the tests of output directories."""

import pytest

from pruned_vllm.common import directories


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    """Both ways of taking a directory's place."""
    if request.param == "two renames":
        monkeypatch.setattr(directories, "exchange", lambda one, other: False)
    return request.param


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out[1]"  # a name that means something else to glob
