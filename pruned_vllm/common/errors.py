"""The one exception that every part raises for bad input. Pure Python."""

from collections.abc import Sequence

LONGEST = 10_000  # characters of a sentence: it may quote a file that says anything


class InputError(ValueError):
    """What the user gave cannot be used; every problem found is in the message.

    Commands turn it into a message on stderr and exit code 2. Raise it before anything is written.

    Args:
        what: one sentence: what was refused, and where it is.
        problems: each names the place (layer, tensor, key), the numbers and the fix.
    """

    def __init__(self, what: str, problems: Sequence[str] = ()):
        self.problems = tuple(map(_shortened, problems))
        super().__init__("\n  - ".join((_shortened(what), *self.problems)))


def _shortened(sentence: str) -> str:
    """Its beginning and its end."""
    if len(sentence) <= LONGEST:
        return sentence
    left_out = len(sentence) - LONGEST
    return f"{sentence[: LONGEST // 2]} [... {left_out:,} characters ...] {sentence[-LONGEST // 2 :]}"
