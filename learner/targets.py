"""What a learning run is asked for: how much may go, or how large or fast the model shall be. Pure Python.

Target("speedup", 1.5).name    # "1.5x": of the directory, where a run has several
number_of_bytes("9GB")         # 9_000_000_000, as the type of a command line argument
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_CASE = "decode:8:1024:256"
COUNTS = {"T": 10**12, "B": 10**9, "M": 10**6, "K": 10**3}
BYTES = {"TiB": 1 << 40, "GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10} | {
    "TB": 10**12,
    "GB": 10**9,
    "MB": 10**6,
    "KB": 10**3,
    "B": 1,
}


@dataclass(frozen=True)
class Target:
    """One budget that a run is to meet.

    Attributes:
        measure: "sparsity" (the share of the units of each kind that goes), or what the model as a whole must come down
            to: "parameters", "bytes" of its weights, or "speedup", the ideal one of a case.
        value: in this measure.
    """

    measure: str
    value: float

    @property
    def name(self) -> str:
        """One word that tells it from others of its measure: 20 for a sparsity of 0.2, 5B, 9GB, 1.5x."""
        if self.measure == "sparsity":
            return f"{100 * self.value:g}"
        if self.measure == "speedup":
            return f"{self.value:g}x"
        suffixes = {"K": 10**3, "M": 10**6, "B": 10**9, "": 1}
        if self.measure == "bytes":
            suffixes = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
        texts = [f"{self.value / size:.12g}{suffix}" for suffix, size in suffixes.items()]
        return min((text for text in texts if "e" not in text), key=len, default=f"{self.value:g}")

    @property
    def removal(self) -> float:
        """Grows with what the target removes."""
        return self.value if self.measure in ("sparsity", "speedup") else -self.value


def number_of_parameters(text: str) -> float:
    """Type of a command line argument: 5B, 750M, 123456."""
    return _argument(text, COUNTS, "5B, 750M or 123456")


def number_of_bytes(text: str) -> float:
    """Type of a command line argument: 9GB, 700MiB, 123456."""
    return _argument(text, BYTES, "9GB, 700MiB or 123456")


def speedup(text: str) -> float:
    """Type of a command line argument: above 1."""
    value = _argument(text, {}, "1.5")
    if value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no speedup; it must be above 1")
    return value


def _argument(text: str, suffixes: Mapping[str, int], example: str) -> float:
    value = _number(text, suffixes)
    if value is None or not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0 like {example}")
    return value


def _number(text: str, suffixes: Mapping[str, int]) -> float | None:
    suffix = next((suffix for suffix in suffixes if suffix and text.endswith(suffix)), "")
    try:
        return float(text.removesuffix(suffix)) * suffixes.get(suffix, 1)
    except ValueError:
        return None
