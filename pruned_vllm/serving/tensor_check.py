"""Compares the tensors of a checkpoint with the geometry, by name and shape, before anything is built from them.

Stock loaders `narrow()` a tensor that is too large and leave the rest of a fused parameter uninitialised when one is
missing, without a word. A directory is checked from the headers of its files before vLLM starts a process, so that the
user reads the sentence and not that some worker failed; whatever is loaded is checked again, tensor by tensor.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.families import IGNORED_SUFFIXES
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.tensors import canonical_name
from pruned_vllm.formats.weights import find_weight_files, open_safetensors

if TYPE_CHECKING:  # this file is imported while the plugin registers, before vLLM may be set up
    from vllm.config import VllmConfig

# Values of --load-format that read the safetensors of a model directory as they are.
SAFETENSORS_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")


class TensorCheck:
    """Judges a stream of tensors, each once.

    Args:
        is_quantized: the checkpoint has tensors of its own (scales, packed weights) that only vLLM can judge.
        all_expected: whether the stream must bring every tensor of the model, and no other.
    """

    def __init__(self, geometry: ModelGeometry, is_quantized: bool, all_expected: bool) -> None:
        self._missing = geometry.tensor_shapes()
        self._optional = {}
        if geometry.tie_word_embeddings:  # vLLM skips it then
            self._optional["lm_head.weight"] = self._missing["model.embed_tokens.weight"]
        layers = enumerate(geometry.layers)
        self._uneven = tuple(f"model.layers.{index}.self_attn." for index, layer in layers if not layer.has_even_groups)
        self._is_quantized = is_quantized
        self._all_expected = all_expected
        self._problems: list[str] = []

    def accepts(self, name: str, shape: tuple[int, ...], is_floating_point: bool) -> bool:
        """Whether to load a tensor; if not, it is one that nobody needs or a problem."""
        if name.endswith(IGNORED_SUFFIXES):
            return False
        expected = self._missing.pop(name, None) or self._optional.get(name)
        if expected is None and self._all_expected:
            problem = f"{name} {list(shape)}: not a tensor of this model, or given twice"
        elif name.startswith(self._uneven) and name.endswith((".k_scale", ".v_scale")):  # vLLM would drop them silently
            problem = f"{name}: KV-cache scales need even query groups; convert with --gqa-layout padded"
        elif expected not in (None, tuple(shape)) and (is_floating_point or not self._is_quantized):
            problem = f"{name}: the file has {list(shape)}, config.json says {list(expected)}"
        else:
            return True
        self._problems.append(problem)
        return False

    def finish(self, source: str = "The checkpoint") -> None:
        """To be called after the last tensor.

        Raises:
            InputError: with every wrong shape, missing and unknown tensor.
        """
        problems = list(self._problems)
        if self._all_expected:
            problems += [f"{name} {list(shape)}: missing" for name, shape in self._missing.items()]
        if problems:
            raise InputError(
                f"{source} does not fit its config.json in {len(problems)} tensors; nothing is served. "
                "Convert it again with convert-pruned, or restore the config.json that belongs to it:",
                problems,
            )


def check_directory(vllm_config: "VllmConfig", geometry: ModelGeometry) -> None:
    """Checks the files that vLLM will load, where they lie in a directory; of quantized ones which files they are.

    Raises:
        InputError: files that are missing, cannot be read or that other readers would not take, or tensors that do not
            fit config.json.
    """
    directory, config = Path(vllm_config.model_config.model), vllm_config.model_config.hf_config
    if not directory.is_dir() or vllm_config.load_config.load_format not in SAFETENSORS_FORMATS:
        return
    paths = find_weight_files(directory)
    if getattr(config, "quantization_config", None) is not None:
        return
    check = TensorCheck(geometry, is_quantized=False, all_expected=True)
    for path in paths:
        with open_safetensors(path) as file:  # reads the header alone
            for name in file.keys():  # noqa: SIM118
                shape = tuple(file.get_slice(name).get_shape())
                check.accepts(canonical_name(name), shape, is_floating_point=True)
    check.finish(str(directory))
