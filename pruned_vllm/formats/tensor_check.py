"""Compares the tensors of a checkpoint with its config.json: names, shapes and dtypes, quantized or not. Pure Python.

    check = TensorCheck(geometry, Quantization.from_config(config))
    for name, shape, dtype in ...:
        check.accepts(name, shape, dtype)
    check.finish("out/")

Stock loaders `narrow()` a tensor that is too large, leave the rest of a fused parameter uninitialised when one is
missing, and turn int8 into float8 by value, without a word.
"""

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.quantization import Quantization
from pruned_vllm.formats.quantized_tensors import Choices, Parts, Stored, disagreements, expected_tensors
from pruned_vllm.formats.tensors import IGNORED_SUFFIXES


class TensorCheck:
    """Judges a stream of tensors, each once.

    Args:
        quantization: how the checkpoint is quantized; None if it is not.
        all_expected: whether the stream must bring every tensor of the model, and no other.
    """

    def __init__(
        self, geometry: ModelGeometry, quantization: Quantization | None = None, all_expected: bool = True
    ) -> None:
        self._expected = expected_tensors(geometry, quantization)
        self._all_expected = all_expected
        self._seen: dict[str, set[str]] = {}
        self._problems = [] if quantization is None else disagreements(geometry, quantization)

    @property
    def unjudged(self) -> list[str]:
        """Modules whose tensors only vLLM can judge."""
        return [module for module, choices in self._expected.items() if choices is None]

    def accepts(self, name: str, shape: tuple[int, ...], dtype: str) -> bool:
        """Whether to load a tensor; if not, it is one that nobody needs or a problem.

        Args:
            name: as `canonical_name` gives it.
            dtype: in the words of safetensors ("BF16").
        """
        if name.endswith(IGNORED_SUFFIXES):
            return False
        module, _, part = name.rpartition(".")
        if self._is_unjudged(module):
            return True
        seen = self._seen.setdefault(module, set())
        found = _find(self._expected.get(module, ()), part)
        problem = None
        if not found or part in seen:
            if self._all_expected:
                problem = f"{name} {list(shape)}: not a tensor of this model, or given twice"
        elif all(shape not in stored.shapes for stored in found):
            problem = f"{name}: the file has {list(shape)}, config.json says {list(found[0].shapes[0])}"
        elif all(dtype not in stored.dtypes for stored in found):
            problem = f"{name}: the file has {dtype} numbers, config.json says {' or '.join(found[0].dtypes)}"
        seen.add(part)
        if problem is not None:
            self._problems.append(problem)
        return problem is None

    def finish(self, source: str = "The checkpoint") -> None:
        """To be called after the last tensor.

        Raises:
            InputError: with everything that is wrong, missing or unknown.
        """
        problems = list(self._problems)
        if self._all_expected:
            problems += [problem for module in self._expected for problem in self._missing(module)]
        if problems:
            raise InputError(
                f"{source} does not fit its config.json in {len(problems)} tensors; nothing is loaded. "
                "Convert it again with convert-pruned, or restore the config.json that belongs to it:",
                problems,
            )

    def _is_unjudged(self, module: str) -> bool:
        """Also parts of such a module may have parts (`weight_quantizer.scale`)."""
        return self._expected.get(module, ()) is None or self._expected.get(module.rpartition(".")[0], ()) is None

    def _missing(self, module: str) -> list[str]:
        """What the file lacks of the way in which it stores most of the module, and what it has beside it."""
        choices = self._expected[module]
        if choices is None:
            return []
        seen = self._seen.get(module, set())
        parts: Parts = max(choices, key=lambda choice: len(seen & choice.keys()))
        problems = [
            f"{module}.{part} {list(stored.shapes[0])}: missing"
            for part, stored in parts.items()
            if stored.is_required and part not in seen
        ]
        others = {part for choice in choices for part in choice} - parts.keys()
        return problems + [f"{module}.{part}: beside tensors of another kind" for part in sorted(seen & others)]


def _find(choices: Choices, part: str) -> list[Stored]:
    return [choice[part] for choice in choices or () if part in choice]
