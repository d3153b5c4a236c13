"""The wheel in an environment of its own: everything in it, nothing else, and it works, with and without vLLM.

The environment sees the libraries of the one that runs the tests, so that nothing is downloaded. It does not see this
repository.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from helpers.masked import ragged_checkpoint

ROOT = Path(__file__).parents[1]
PACKAGES = ("pruned_vllm", "converter", "learner")
COMMANDS = ("convert-pruned", "quantize-pruned", "learn-masks", "finetune-pruned")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that an earlier build/ adds nothing to it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "demo", "shared")
    shutil.copytree(ROOT, source, ignore=ignored, dirs_exist_ok=True)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", target)
    run(sys.executable, "-m", "pip", "wheel", *options, source)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel, and without vLLM."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, with_pip=True)
    run(directory / "bin" / "python", "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel)
    site = site_packages(directory)
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (site / "vllm.py").write_text('raise ImportError("there is no vLLM in this environment")\n')
    return directory


def site_packages(environment: Path) -> Path:
    (site,) = environment.glob("lib/python3*/site-packages")
    return site


def run(*arguments, directory: Path = Path("/")) -> str:
    """Standard output; outside of the repository, which is not on the path."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [str(argument) for argument in arguments]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=directory, env=variables)
    assert done.returncode == 0, f"{arguments}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_it_holds_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    (information,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    code = {name for name in names if not name.startswith(information)}
    sources = [
        path for package in PACKAGES for suffix in ("py", "cpp", "h") for path in (ROOT / package).rglob(f"*.{suffix}")
    ]
    assert code == {path.relative_to(ROOT).as_posix() for path in sources}
    assert f"{information}/licenses/LICENSE" in names


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_explain_themselves(environment, command):
    assert f"usage: {command}" in run(environment / "bin" / command, "--help")
    assert run(environment / "bin" / command, "--version").startswith("pruned-vllm  ")


def test_without_vllm_it_converts_and_loads(environment, tmp_path):
    checkpoint, out = ragged_checkpoint(tmp_path / "ckpt"), tmp_path / "out"
    run(environment / "bin" / "convert-pruned", checkpoint, out)
    code = f"""
import pruned_vllm
from pruned_vllm.hf.loading import load_pruned
print(type(load_pruned({str(out)!r})).__name__, pruned_vllm.__file__)
"""
    name, file = run(environment / "bin" / "python", "-c", code).split()[-2:]
    assert name == "PrunedLlamaForCausalLM"
    assert Path(file).is_relative_to(site_packages(environment)), "that was not the wheel"


def test_vllm_finds_the_plugin(environment):
    (site_packages(environment) / "vllm.py").unlink()
    code = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.models.registry import ModelRegistry
import pruned_vllm
print(*(name for name in ModelRegistry.get_supported_archs() if name.startswith("Pruned")), pruned_vllm.__file__)
"""
    *architectures, file = run(environment / "bin" / "python", "-c", code).split()
    assert {"PrunedLlamaForCausalLM", "PrunedQwen3MoeForCausalLM"} <= set(architectures)
    assert Path(file).is_relative_to(site_packages(environment)), "that was not the wheel"
