"""What fuzzing found, kept as files: tests/fuzz/regressions/SURFACE/SEED-DIGEST is the content of the seed's file."""

import hashlib
from pathlib import Path

DIRECTORY = Path(__file__).parent / "regressions"


def save(surface: str, seed: str, content: bytes) -> Path:
    """Keeps a finding; returns its file."""
    path = DIRECTORY / surface / f"{seed}-{hashlib.sha256(content).hexdigest()[:10]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def saved() -> list[tuple[str, str, Path]]:
    """Surface, seed and file of every finding."""
    return [(path.parent.name, path.name.rpartition("-")[0], path) for path in sorted(DIRECTORY.glob("*/*-*"))]
