"""What bench.quantized measures: pairs of models, the schemes, and the steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config import read_config
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import read_headers
from pruned_vllm.formats.ideal import Case

PICO_SPARSITY = 0.2
PICO_NAME = "qwen3-moe-pico"
SECONDS = {"learn": 600, "quantize": 20, "serve": 90, "speed": 420}


@dataclass(frozen=True)
class Settings:
    """What is measured of every pair."""

    schemes: tuple[str, ...]
    cases: tuple[Case, ...]
    repeats: int
    rounds: int
    compile: bool


@dataclass(frozen=True)
class Pair:
    """A model before and after pruning.

    Attributes:
        texts: held-out text.
        learned: whether `pruned` is to be made by the step "learn".
        through_plugin: serve the dense form by the plugin's class, too: stock vLLM has no quantized experts on CPUs.
    """

    name: str
    dense: Path
    pruned: Path
    texts: tuple[Path, ...]
    learned: bool = False
    through_plugin: bool = False

    def directories(self, work: Path, schemes: Sequence[str]) -> dict[str, Path]:
        """All forms by name: "dense", "pruned", and either with the name of a scheme behind it."""
        found = {"dense": self.dense, "pruned": self.pruned}
        for scheme in schemes:
            found |= {f"{form}-{scheme}": work / self.name / f"{form}-{scheme}" for form in ("dense", "pruned")}
        return found


def named_pair(dense: Path, pruned: Path, texts: Sequence[Path], work: Path) -> Pair:
    """Two directories. Raises InputError where one is no model, or a text is missing."""
    problems = [f"{path}: no file" for path in texts if not path.is_file()]
    for directory in (dense, pruned):
        try:
            ModelGeometry.from_config(read_config(directory))
            read_headers(directory)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("These cannot be measured:", problems)
    return Pair(dense.resolve().name, dense, pruned, tuple(texts) or (_heldout(work),))


def pico_pair(work: Path) -> Pair:
    """The pico Qwen3-MoE, trained now if it is not in the cache; its pruned form is still to be learned."""
    from bench.pico import pico_model

    dense = pico_model("qwen3_moe")
    return Pair(PICO_NAME, dense, work / PICO_NAME / "out", (dense / "heldout.txt",), True, True)


def planned(pairs: Sequence[Pair], settings: Settings) -> dict[str, float]:
    """All steps in their order, with the seconds that each is expected to take."""
    steps: dict[str, float] = {}
    for pair in pairs:
        names = [f"learn-{pair.name}"] * pair.learned
        forms = list(pair.directories(Path(), settings.schemes))
        names += [f"quantize-{pair.name}-{form}" for form in forms if "-" in form]
        names += [f"serve-{pair.name}-{form}" for form in forms]
        names += [f"speed-{pair.name}-{scheme}" for scheme in settings.schemes]
        steps |= {name: SECONDS[name.partition("-")[0]] for name in names}
    return steps


def _heldout(work: Path) -> Path:
    from bench.pico import corpus

    path = work / "heldout.txt"
    path.write_text(corpus()[1], encoding="utf-8")
    return path
