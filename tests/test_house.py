"""Who may import whom: the rooms of the house stay apart, and no two modules need each other."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pruned_vllm", "converter", "learner", "bench")

# What code below a folder must not import, and why a user would notice.
FORBIDDEN = {
    "pruned_vllm/common": ("vllm", "transformers", "pruned_vllm.formats", "pruned_vllm.serving", "pruned_vllm.hf"),
    "pruned_vllm/formats": ("torch", "vllm", "transformers", "pruned_vllm.serving", "pruned_vllm.hf"),
    "pruned_vllm/kernels": ("vllm", "pruned_vllm.serving", "pruned_vllm.hf"),
    "pruned_vllm/hf": ("vllm", "pruned_vllm.serving"),
    "pruned_vllm/serving": ("pruned_vllm.hf",),
    "pruned_vllm": ("converter", "learner", "bench"),
    "converter": ("vllm", "learner", "bench", "pruned_vllm.serving"),
    "learner": ("vllm", "converter", "bench", "pruned_vllm.serving"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports, its functions included."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            # `from package import module` needs the module, `from module import name` the module alone.
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES) or {node.module}
    return names


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_rooms_import_only_what_they_may(folder):
    wrong = []
    for module, path in MODULES.items():
        if not path.is_relative_to(ROOT / folder):
            continue
        for name in imported(path):
            if any(name == other or name.startswith(f"{other}.") for other in FORBIDDEN[folder]):
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_two_modules_need_each_other():
    graph = {module: imported(path) & set(MODULES) for module, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_the_plugin_is_imported_without_torch_and_vllm():
    """vLLM imports it in every process it starts; converter and learner must work where there is no vLLM."""
    code = "import sys, pruned_vllm; print(*{'torch', 'vllm', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.split() == []
