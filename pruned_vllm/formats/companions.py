"""What goes along with the weights of a model directory. Pure Python.

Tokenizers, chat templates, vLLM and sentence-transformers read files beside the weights. They are copied byte for byte,
never written anew, so that a converted model reads and answers text as the dense one did. Three rules:

- Only files that some consumer reads are copied: COMPANIONS, and the module directories that `modules.json` of
  sentence-transformers names (`1_Pooling`, `2_Dense` with its safetensors weights).
- No code and no pickle is copied: what `--trust-remote-code` runs must come from where the user put their trust.
- No symlink is followed out of the directory. Downloads of the hub are the exception: they are symlinks from
  `<cache>/models--ORG--NAME/snapshots/REVISION/` to the repository's `blobs/` or to the cache's shared `blobs/`.
"""

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import is_inside, read_json

# Patterns for files in a model directory, for `glob` as for a download from the hub.
COMPANIONS = (
    # every name that a tokenizer of Transformers gives to one of its files
    "tokenizer*.json",
    "tokenizer.model*",
    "vocab*.json",
    "vocab*.txt",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "bpe.codes",
    "byte_maps.json",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "normalizer.json",
    "prophetnet.tokenizer",
    "target_vocab.json",
    "word_pronunciation.json",
    "word_shape.json",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    # chat templates
    "chat_template.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    # defaults of sampling
    "generation_config.json",
    # sentence-transformers, whose files vLLM reads too
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    # licences
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
MODULE_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")  # in a module directory of sentence-transformers
DOWNLOADED = (*COMPANIONS, *(f"[0-9]*_*/{pattern}" for pattern in MODULE_FILES))  # of the hub; see find_companions

CODE = (".py", ".pyc", ".so", ".sh")
PICKLES = (".bin", ".pt", ".pth", ".pkl")


def find_companions(directory: Path) -> list[str]:
    """The companions in a model directory, as paths relative to it, sorted.

    Raises:
        InputError: with every symlink that leads out of the directory or nowhere, every module of
            sentence-transformers that cannot be copied, and a modules.json that is damaged.
    """
    found = {file for pattern in COMPANIONS for file in directory.glob(pattern)}
    problems = [
        f"{link} is a link to {link.readlink()}, which is missing; download it again"
        for link in sorted(directory.iterdir())  # `glob` does not see all of them
        if link.is_symlink() and not os.path.exists(link) and any(fnmatch(link.name, name) for name in COMPANIONS)
    ]
    for module in _module_directories(directory, problems):
        found |= {file for pattern in MODULE_FILES for file in (directory / module).rglob(pattern)}
        pickles = sorted(file for file in (directory / module).rglob("*") if file.suffix in PICKLES)
        problems += [
            f"{file}: pickled weights are neither read nor copied, and without them the embeddings would be others; "
            "save the model with sentence-transformers as safetensors"
            for file in pickles
            if not any(file.parent.glob("*.safetensors"))
        ]
    files = sorted(file for file in found if file.is_file() and file.suffix not in CODE)
    problems += [
        f"{file} is a symlink to {file.resolve()}, outside of its directory; put a copy of the file in its place"
        for file in files
        if _leads_out(file, directory)
    ]
    if problems:
        raise InputError(f"The files beside the weights in {directory} cannot be copied:", problems)
    return [file.relative_to(directory).as_posix() for file in files]


def copy_companions(source: Path, target: Path) -> None:
    """Copies the companions of a model from directory to directory. Raises InputError, see `find_companions`."""
    for name in find_companions(source):
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, copy)


def tokenizer_code(directory: Path) -> str | None:
    """The class that AutoTokenizer takes from code with `--trust-remote-code`, as tokenizer_config.json names it.

    "tokenization_x.XTokenizer" is in a file of the directory, "ORG/NAME--tokenization_x.XTokenizer" in a repository of
    the hub. None where the tokenizer needs no code.
    """
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return None
    auto_map = read_json(path).get("auto_map")
    classes = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    named = classes if isinstance(classes, list | tuple) else [classes]
    return next((name for name in named if isinstance(name, str)), None)


def has_tokenizer(directory: Path) -> bool:
    """Whether there is any file that a tokenizer can be made of."""
    names = ("tokenizer*.json", "tokenizer.model*", "vocab*", "*.model", "*.spm", "*.tiktoken", "tekken.json")
    return any(any(directory.glob(name)) for name in names)


def has_mistral_tokenizer(directory: Path) -> bool:
    """Whether there are files of mistral-common, with which vLLM reads text for Mistral's own directories."""
    return (directory / "tekken.json").is_file() or any(directory.glob("tokenizer.model.v*"))


def _module_directories(directory: Path, problems: list[str]) -> list[str]:
    """The directories of modules.json; what is wrong with it is added to `problems`."""
    path = directory / "modules.json"
    if not path.is_file():
        return []
    modules = read_json(path, dict | list)
    if isinstance(modules, dict):  # vLLM reads this form too
        modules = modules.get("modules")
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        problems.append(f"{path}: holds no list of modules")
        return []
    directories = []
    for module in modules:
        place, kind = module.get("path", ""), str(module.get("type"))
        if not is_inside(place):
            problems.append(f"{path}: path {place!r} is no directory below it")
        elif not PurePosixPath(place).parts:  # the model directory itself
            continue
        elif kind.endswith(".Transformer"):
            problems.append(f"{path}: the transformer is in {place}/; its files must lie beside modules.json")
        elif (directory / place).is_dir():
            directories.append(place)
        elif not kind.endswith(".Normalize"):  # its directory is empty, so git and the hub do not keep it
            problems.append(f"{directory / place}: missing, but {path.name} names it; download all of the model")
    return directories


def _leads_out(file: Path, directory: Path) -> bool:
    """Whether a file lies elsewhere once all symlinks are followed."""
    root = directory.resolve()
    allowed = [root]
    if root.parent.name == "snapshots" and root.parents[1].name.startswith("models--"):
        allowed += [root.parents[1] / "blobs", root.parents[2] / "blobs"]
    return not any(file.resolve().is_relative_to(place) for place in allowed)
