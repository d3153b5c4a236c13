"""A whole pickled model: LLM-Pruner's pytorch_model.bin, FLAP's pruned_model.pt, DDP's results (zip or legacy files).

Reads the file, or a directory that holds it. Block-wise, global and channel-wise pruning, also of models with fewer KV
heads than query heads: every layer's sizes are those of its tensors. config.json comes from the pickled configuration,
or from --base-model, which also gives the tokenizer: a pickled tokenizer is not used. A LoRA adapter that was trained
afterwards is merged if adapter_config.json and adapter_model.bin (or .safetensors) lie beside the file. Nothing in a
pickle is run. EvoPress's final_model.pth is refused, since what it drops is not in the weights: see --from depth.
"""

from dataclasses import replace
from pathlib import Path

from converter.base_model import CONFIG_FILES, find_base_model
from converter.checkpoint import Checkpoint
from converter.importers.shapes import source_from_shapes
from converter.lora import WEIGHTS_FILE, LoraAdapter
from converter.pickled_models import (
    config_of,
    family_of,
    fitted_config,
    hidden_size_before,
    model_class,
    replaced_parts,
)
from converter.pickles import Stub
from converter.source import Request, Source
from converter.state_dicts import ADAPTER_FILE, describe, tied_copies
from converter.torch_files import is_torch_file, module_tensors, read_torch_file, texts_at_start
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.companions import has_tokenizer
from pruned_vllm.formats.config import read_config
from pruned_vllm.formats.families import find_family
from pruned_vllm.formats.tensors import canonical_name
from pruned_vllm.formats.weights import ADAPTER_CONFIG, has_weight_files

NAME = "LLM-Pruner, and others that pickle the whole model"

SUFFIXES = (".bin", ".pt", ".pth")
DROP_CONFIG = "layer_drop_config.txt"  # of EvoPress
PROJECT = "LLMPruner."  # what the names of its own classes begin with


def recognise(path: Path) -> str | None:
    if (path / DROP_CONFIG).exists():
        return None
    found = _models(path)
    return "; ".join(f"{file.name} is a pickled {name}" for file, name in found.items()) or None


def read(request: Request) -> Source:
    file = _find_model(request.path)
    content = read_torch_file(file)
    model = content.get("model") if isinstance(content, dict) else content
    if not isinstance(model, Stub):
        raise InputError(f"{file} holds no pickled model, but {describe(content)}")
    if changed := replaced_parts(model):
        raise InputError(
            f"{file}: the forward pass of {changed[0]} and {len(changed) - 1} more modules was replaced in the object, "
            "and what it computes now is not in the file. EvoPress drops sublayers so: give its "
            f"{DROP_CONFIG} with --from depth and --base-model"
        )
    weights, tokenizer, notes = _weights(file, model, request)
    is_llm_pruner = model.module.startswith(PROJECT) or isinstance(content, dict)
    source = source_from_shapes(weights, request, "llm-pruner" if is_llm_pruner else "shapes")
    if isinstance(content, dict) and content.get("tokenizer") is not None and request.base_model is None:
        notes.append(
            f"The tokenizer in {file.name} is an object, not files, and is not used; "
            + ("those beside it are copied." if tokenizer else "give the dense model with --base-model for its files.")
        )
    adapter = _adapter(file, weights, source)
    if adapter is None:
        notes.append(
            f"No LoRA adapter lies beside {file.name}. If the model was tuned after pruning, put {ADAPTER_CONFIG} and "
            f"{ADAPTER_FILE} there, and they are merged."
        )
    before = source.before
    if before is not None and (hidden_size := hidden_size_before(model)) is not None:
        before = replace(before, hidden_size=hidden_size)
    return replace(
        source,
        before=before,
        changes=adapter,
        inputs=(request.path, *([tokenizer] if tokenizer else [])),
        companions=tokenizer,
        notes=(*source.notes, *notes),
    )


def _weights(file: Path, model: Stub, request: Request) -> tuple[Checkpoint, Path | None, list[str]]:
    """The weights with their config.json, the directory of the tokenizer, and notes."""
    tokenizer = file.parent if has_tokenizer(file.parent) else None
    try:
        family = family_of(model)
        if request.base_model is not None:
            tokenizer, _ = find_base_model(request, "a pickled model", CONFIG_FILES)
            config = read_config(tokenizer)
            if find_family(config) is not family:
                raise InputError(f"the pickled model is a {family.architecture}, that of --base-model is not")
        else:
            config = config_of(model, family)
        tensors = {canonical_name(name): tensor for name, tensor in module_tensors(model).items()}
        config = fitted_config(config, model, tensors)
        left_out = tied_copies(tensors, config)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    kept = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    notes = [
        f"{file.name} is a pickled {model.module}.{model.name}. Nothing in it was run; its tensors were taken out."
    ]
    before, after = hidden_size_before(model), config.get("hidden_size")
    if before is not None and before != after:
        notes.append(f"The hidden size was {before} before pruning and is {after} in all layers.")
    return Checkpoint.from_tensors(file, config, kept), tokenizer, notes


def _adapter(file: Path, weights: Checkpoint, source: Source) -> LoraAdapter | None:
    """The adapter beside the model, which was trained on its pruned sizes."""
    directory = file.parent
    if not (directory / ADAPTER_CONFIG).is_file():
        return None
    if (directory / WEIGHTS_FILE).exists() and (directory / ADAPTER_FILE).exists():
        raise InputError(
            f"{directory} holds both {WEIGHTS_FILE} and {ADAPTER_FILE}; move away the one that is not meant"
        )
    return LoraAdapter.read(directory, weights, source.dense.with_layers(source.layers), reads_pickles=True)


def _models(path: Path) -> dict[Path, str]:
    """The pickled models that INPUT is or holds, with the names of their classes."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.name != ADAPTER_FILE)
    found = {file: model_class(texts_at_start(file)) for file in files if is_torch_file(file)}
    return {file: name for file, name in found.items() if name is not None}


def _find_model(path: Path) -> Path:
    if path.is_file():
        return path
    found = list(_models(path))
    if not found:
        raise InputError(f"{path} holds no pickled model; give the file that torch.save wrote")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise InputError(f"{path} holds several pickled models: {names}; give the one that is meant")
    if has_weight_files(path):
        raise InputError(
            f"{path} holds weights as safetensors as well as the pickled model {found[0].name}, and they may differ; "
            "give that file, or say --from shapes or --from zeros for the others"
        )
    return found[0]
