"""Files under docs/ that are written from the code, and held to it."""

import os
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
REGENERATE = "GOVERNOR_REGENERATE"


def check_generated(path: str, content: str) -> None:
    """Hold a file to what the code says now; with GOVERNOR_REGENERATE=1, write it.

    Args:
        path: below the repository's root.
        content: what it has to be.
    """
    file = ROOT / path
    if os.environ.get(REGENERATE) == "1":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, "utf-8")
    stored = file.read_text("utf-8") if file.exists() else None
    assert stored == content, f"{path} is stale: run {REGENERATE}=1 .venv/bin/pytest tests, and look at the difference"


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in lines)
