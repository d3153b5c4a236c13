"""What other projects write to disk, one module each: reading one more format is one more module here.

A module `x_y` is chosen by `--from x-y`. Its docstring says for users which files it reads and by which rule. It has

    NAME: str                                    # how messages call the project
    def recognise(path: Path) -> str | None      # what in INPUT says that it is this format; None: nothing does
    def read(request: Request) -> Source         # raises InputError
    SETTINGS: tuple[str, ...]                    # optional: what it reads of request.settings

`recognise` looks at names, headers and small files only, and runs nothing. Where a format cannot be told from another
by its files, both recognise it, and the user has to choose.
"""

import ast
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from converter.inexpressible import refuse_inexpressible
from pruned_vllm.common.errors import InputError

if TYPE_CHECKING:  # --help should not wait for torch
    from converter.source import Request, Source

AUTO = "auto"
# Every model directory is one of these. Where files say that another project wrote them, that counts.
GENERAL = ("shapes", "zeros")


def importer_names() -> list[str]:
    """The values of --from, besides "auto"."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def importer_summaries() -> dict[str, str]:
    """The first paragraph of each importer's docstring, by name; nothing is imported."""
    files = {name: Path(__path__[0]) / f"{name.replace('-', '_')}.py" for name in importer_names()}
    docstrings = {name: ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "" for name, file in files.items()}
    return {name: " ".join(text.split("\n\n")[0].split()) for name, text in docstrings.items()}


def importer(name: str) -> ModuleType:
    """The module of a name in `importer_names`."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def recognised(path: Path) -> dict[str, str]:
    """The formats that INPUT may be in, with what says so. Raises InputError where INPUT itself cannot be read."""
    for names in ([name for name in importer_names() if name not in GENERAL], GENERAL):
        found = {name: importer(name).recognise(path) for name in names}
        if said := {name: saw for name, saw in found.items() if saw is not None}:
            return said
    return {}


def read_source(request: "Request", name: str = AUTO) -> "Source":
    """Reads a pruned model in the format `name`, or in the one that it is recognised as.

    Raises:
        InputError: it cannot be read or expressed, or it may be in several formats, or in none.
    """
    if name == AUTO:
        chosen = recognise(request.path)
    else:
        _check_input(request.path)
        chosen = name
    module = importer(chosen)
    for setting, value in request.settings.items():
        if value is not None and setting not in getattr(module, "SETTINGS", ()):
            option = setting.replace("_", "-")
            raise InputError(f"--{option} means nothing for --from {chosen} ({module.NAME}); leave it out")
    return module.read(request)


def recognise(path: Path) -> str:
    """The format that INPUT is in. Raises InputError where it cannot be expressed, or may be in several, or in none."""
    _check_input(path)
    found = recognised(path)
    if len(found) == 1:
        return next(iter(found))
    if found:
        raise InputError(
            f"{path} may be in several formats, whose masks mean different things. Say which with --from:",
            [f"--from {name} ({importer(name).NAME}): {saw}" for name, saw in found.items()],
        )
    kind = "file" if path.is_file() else "directory"
    raise InputError(
        f"{path} is a {kind} in none of the formats that can be read. Say with --from what it is; convert-pruned "
        f"--help says what each needs: {', '.join(importer_names())}"
    )


def _check_input(path: Path) -> None:
    if not path.exists():
        raise InputError(
            f"{path} does not exist; give a directory or a file: a masked checkpoint of learn-masks, or what another "
            "project wrote"
        )
    refuse_inexpressible(path)
