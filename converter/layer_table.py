"""The table of a model's layers on the terminal, with sentences below it."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def print_layers(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    sentences: Sequence[str],
    *,
    title: str | None = None,
    caption: str | None = None,
) -> None:
    """Prints them. Without borders the numbers of a 70B model fit into 80 columns."""
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in header:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    print_text("\n".join(sentences))


def print_text(text: str) -> None:
    """Prints text as it is: brackets and numbers mean nothing."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
