"""Command line arguments that commands share, and types: a string becomes a value, or argparse prints what is wrong.

Pure Python.
"""

import argparse


def positive_int(text: str) -> int:
    """Type of a command line argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def non_negative_int(text: str) -> int:
    """Type of a command line argument."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def seed(text: str) -> int:
    """Type of a command line argument: what all generators of random numbers take."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def positive_float(text: str) -> float:
    """Type of a command line argument."""
    value = _float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def non_negative_float(text: str) -> float:
    """Type of a command line argument."""
    value = _float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def fraction(text: str) -> float:
    """Type of a command line argument."""
    value = _float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0 and below 1")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def add_overwrite_argument(parser: argparse.ArgumentParser, output: str) -> None:
    """Adds --overwrite of a command that writes a directory at once; `output` is what its help calls that."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help=f"replace {output} if this command wrote it; it stays until the new one is complete, and your own files "
        "in it stay for good",
    )
