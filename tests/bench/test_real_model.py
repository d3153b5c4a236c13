"""`make real`: where its model comes from."""

import pytest

from bench.real import smollm2
from bench.real.smollm2 import SOURCE_FILE, source
from pruned_vllm.common.errors import InputError


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Two sources, the first of which fails after it wrote half of a model. Returns the names of those asked."""
    asked = []

    def broken(directory):
        asked.append("hub")
        (directory / "config.json").write_text("{")
        raise ConnectionError("no route\nto host")

    def good(directory):
        asked.append("package")
        (directory / "model.safetensors").touch()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "SOURCES", {"hub": broken, "package": good})
    return asked


def test_the_second_source_is_taken_where_the_first_fails(sources):
    directory = smollm2.smollm2()
    assert {path.name for path in directory.iterdir()} >= {"model.safetensors", SOURCE_FILE}
    assert not (directory / "config.json").exists(), "half of another source's files"
    assert source(directory) == "package"
    assert smollm2.smollm2() == directory and sources == ["hub", "package"], "the second time it is in the cache"


def test_where_no_source_works_both_are_named(sources, monkeypatch, tmp_path):
    monkeypatch.setitem(smollm2.SOURCES, "package", smollm2.SOURCES["hub"])
    with pytest.raises(InputError, match="put the model into .*SmolLM2-135M-Instruct yourself") as error:
        smollm2.smollm2()
    assert error.value.problems == ("hub: to host", "package: to host")
    assert not list((tmp_path / "pruned-vllm").rglob("*.json")), "nothing is left behind"


def test_the_real_sources_are_the_hub_and_the_package():
    assert [name.split()[0] for name in smollm2.SOURCES] == [smollm2.HUB_ID, smollm2.PACKAGE]
