"""The plugin on a vLLM that it does not know: one line in the log, and every other model starts as ever."""

import subprocess
import sys

import pytest
from helpers.masked import RAGGED
from helpers.tiny import converted, tiny_model

# What a future vLLM may have moved, renamed or changed: done before vLLM loads its plugins.
MOVED = {
    "a class": "from vllm.model_executor.models import config; del config.VerifyAndUpdateConfig",
    "a module": "sys.modules['vllm.model_executor.models.registry'] = None",
    "a method": "from vllm.model_executor.models import registry; "
    "registry.ModelRegistry.register_model = lambda architecture: None",
}
# vLLM calls the plugins of this process without a net, as in every process of its own.
START = """
import sys
{change}
from vllm.plugins import load_general_plugins
load_general_plugins()
for name in [name for name, module in sys.modules.items() if module is None and name.startswith("vllm.")]:
    del sys.modules[name]
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
print("hooks of ours:", [name for name in MODELS_CONFIG_MAP if name.startswith("Pruned")])
from vllm.model_executor.models.registry import ModelRegistry
print("models of ours:", [name for name in ModelRegistry.get_supported_archs() if name.startswith("Pruned")])
print("stock:", "LlamaForCausalLM" in ModelRegistry.get_supported_archs())
"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("change", MOVED.values(), ids=MOVED.keys())
def test_steps_aside_with_one_line(change):
    result = run(START.format(change=change))
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    lines = [line for line in output.splitlines() if "steps aside" in line]
    assert len(lines) == 1, output
    for part in ("pruned-vllm 0.", "does not know vLLM 0.", "Install a vLLM that its README names"):
        assert part in lines[0], lines[0]
    assert "Traceback" not in output and "hooks of ours: []" in output and "models of ours: []" in output, output
    assert "stock: True" in output


def test_a_pruned_model_is_then_not_supported(tmp_path):
    """The sentence is vLLM's own."""
    directory = converted(tmp_path, tiny_model("llama", 6, 6, 40), RAGGED)
    result = run(
        START.format(change=MOVED["a class"])
        + f"""
from vllm.engine.arg_utils import EngineArgs
EngineArgs(model={str(directory)!r}, skip_tokenizer_init=True).create_engine_config()
"""
    )
    assert "Model architectures ['PrunedLlamaForCausalLM'] are not supported for now" in result.stderr, result.stderr


def test_known_vllm_gets_everything():
    result = run(START.format(change=""))
    assert "'PrunedOlmoeForCausalLM'" in result.stdout and "steps aside" not in result.stdout + result.stderr
