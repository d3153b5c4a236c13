"""What other projects write that no model here can compute: recognised, so that it is refused by its name."""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json
from pruned_vllm.formats.family import PRUNED_PREFIX
from pruned_vllm.formats.headers import read_headers
from pruned_vllm.formats.masked import MASKS_FILE
from pruned_vllm.formats.weights import has_weight_files

LARGEST_PICKLE = 1 << 26  # bytes of the pickle in a file of torch.save that is searched for a name
# Families whose layers hold q, k and v in one tensor, and the name of that tensor.
FUSED = {"baichuan": "W_pack", "qwen": "c_attn", "bloom": "query_key_value"}
_QUANTIZED = (".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv")


class _Input:
    """What INPUT shows without anything in it being run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.directory = path if path.is_dir() else path.parent
        try:
            self.names = {file.name for file in path.iterdir()} if path.is_dir() else {path.name}
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from None

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json of a directory; empty where there is none that can be read, which others report."""
        try:
            return read_json(self.path / "config.json") if self.path.is_dir() else {}
        except (InputError, OSError):
            return {}

    @cached_property
    def tensor_names(self) -> list[str]:
        try:
            return list(read_headers(self.path)) if has_weight_files(self.path) else []
        except (InputError, OSError):
            return []


@dataclass(frozen=True)
class Kind:
    """A kind of files that is refused.

    Attributes:
        name: what wrote them.
        sign: says what in INPUT is theirs; None: nothing is.
        why: the reason, and what to give instead.
    """

    name: str
    sign: Callable[[_Input], str | None]
    why: str


def refuse_inexpressible(path: Path) -> None:
    """Raises InputError, with name and reason, where INPUT is of a kind that cannot be converted."""
    given = _Input(path)
    for kind in KINDS:
        if (saw := kind.sign(given)) is not None:
            raise InputError(f"{path} ({saw}) is from {kind.name} and cannot be converted: {kind.why}")


def _slicegpt(given: _Input) -> str | None:
    name = next((name for name in given.tensor_names if name.endswith("shortcut_Q")), None)
    files = (given.directory / name for name in sorted(given.names) if name.endswith(".pt"))
    return name or next((f"{file.name} with {saw}" for file in files if (saw := _slicing(file))), None)


def _slicing(file: Path) -> str | None:
    """What says that a file of torch.save is SliceGPT's: its config beside it, or a name in its pickle."""
    config = file.with_suffix(".json")
    if not file.is_file():  # a pipe would be waited for
        return None
    try:
        is_small = config.is_file() and config.stat().st_size < LARGEST_PICKLE
        if is_small and "attention_input_dimensions" in read_json(config):
            return f"slicing dimensions in {config.name}"
        with zipfile.ZipFile(file) as archive:
            entry = next((entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")), None)
            if entry is None or entry.compress_type != zipfile.ZIP_STORED or entry.file_size >= LARGEST_PICKLE:
                return None
            found = b"shortcut_Q" in archive.read(entry)
    except (OSError, ValueError, RuntimeError, OverflowError, EOFError, zipfile.BadZipFile):  # others report damage
        return None
    return "attn_shortcut_Q or mlp_shortcut_Q" if found else None


def _file(*names: str) -> Callable[[_Input], str | None]:
    return lambda given: next((name for name in names if name in given.names), None)


def _cofi(given: _Input) -> str | None:
    masks = given.names & {"zs.pt", "l0_module.pt"}
    model_type = given.config.get("model_type")
    return f"{min(masks)} beside a {model_type} model" if masks and model_type in ("bert", "roberta") else None


def _gguf(given: _Input) -> str | None:
    if given.path.is_file():
        with given.path.open("rb") as file:
            return given.path.name if file.read(4) == b"GGUF" else None
    files = [name for name in sorted(given.names) if name.endswith(".gguf")]
    others = [name for name in given.names if name.endswith((".safetensors", ".bin", ".pt", ".pth"))]
    return files[0] if files and not others else None


def _removed_components(given: _Input) -> str | None:
    keys = ("attention_layer_to_prune", "mlp_layer_to_prune")
    return next((f"{key} in config.json" for key in keys if given.config.get(key)), None)


def _fused(given: _Input) -> str | None:
    model_type = given.config.get("model_type")
    return f"model_type {model_type!r}" if isinstance(model_type, str) and model_type in FUSED else None


def _quantized(given: _Input) -> str | None:
    if given.config.get("quantization_config"):
        return None  # refused by whoever reads config.json
    return next((name for name in given.tensor_names if name.endswith(_QUANTIZED)), None)


def _converted(given: _Input) -> str | None:
    names = given.config.get("architectures")
    is_ours = isinstance(names, list) and any(str(name).startswith(PRUNED_PREFIX) for name in names)
    return f"architectures {names}" if is_ours and MASKS_FILE not in given.names else None


KINDS = (
    Kind(
        "SliceGPT",
        _slicegpt,
        "its layers multiply the residual stream by matrices of their own (attn_shortcut_Q, mlp_shortcut_Q), for which "
        "the models that vLLM serves have no place",
    ),
    Kind(
        "NVIDIA ModelOpt",
        _file("modelopt_state.pth"),
        "how its layers were changed is in a pickled state that ModelOpt alone can apply. Restore the model with it, "
        "and give what save_pretrained writes then; if the weights beside the state are all there is to the model, "
        "move modelopt_state.pth away",
    ),
    Kind("CoFiPruning", _cofi, "BERT and RoBERTa generate no text; language models are converted alone"),
    Kind(
        "CarveLM",
        _removed_components,
        "where it removed a sublayer, its model adds the normalised input of that sublayer to the hidden states (its "
        "AttentionPasser and FeedForwardPasser hand it on), which no layer of a stock model does. Sublayers that add "
        "nothing can be converted: --from depth",
    ),
    Kind(
        "CarveLM",
        _file("llm_pruner_manifest.json", "vlm_pruner_manifest.json"),
        "the weights are a pickled state_dict for a model that its manifest rebuilds. Load it with CarveLM "
        "(load_pruned), and give the directory that result.model.save_pretrained writes",
    ),
    Kind(
        "a family whose layers hold q, k and v in one tensor (W_pack, c_attn, query_key_value)",
        _fused,
        "these families are not supported; for Baichuan and Qwen there are scripts that write them as Llama",
    ),
    Kind(
        "llama.cpp (GGUF)",
        _gguf,
        "give the Hugging Face directory that it was made of",
    ),
    Kind(
        "a quantizer",
        _quantized,
        "the model is quantized; masks fold into float weights only: quantize afterwards",
    ),
    Kind(
        "convert-pruned itself",
        _converted,
        "its layers have their real sizes already. Serve it as it is (vllm serve), or convert the masked checkpoint "
        "anew",
    ),
)
