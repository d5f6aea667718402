"""What decides and what folds is pure, imports point one way, and `events` is ours."""

import ast
import importlib
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tests.generated import ROOT

PACKAGES = ("events", "projections", "governor")
"""Each may import itself and what stands before it."""
PURE = [
    *(ROOT / "governor" / f"{name}.py"
      for name in ("decider", "gates", "machine", "policy", "plans", "results", "market", "permits")),
    *(ROOT / "governor" / "alerts" / f"{name}.py" for name in ("messages", "conditions", "rules")),
    *sorted((ROOT / "projections").glob("*.py")),
]  # fmt: skip
IMPURE = {
    "aiohttp", "asyncio", "datetime", "freezegun", "httpx", "io", "multiprocessing", "os", "pathlib", "random",
    "redis", "requests", "secrets", "shutil", "signal", "socket", "subprocess", "tempfile", "threading", "time",
    "urllib", "uuid",
}  # fmt: skip
CLOCKS = {"monotonic", "now", "perf_counter", "time", "time_ns", "today", "utcnow", "random", "uuid4", "getenv", "open"}
FILES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


def calls(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            match node.func:
                case ast.Attribute(attr=name) | ast.Name(id=name):
                    yield name
                case _:
                    pass


@pytest.mark.parametrize("file", PURE, ids=name_of)
def test_what_decides_or_folds_imports_no_clock_no_chance_and_no_world(file: Path) -> None:
    assert {module.split(".")[0] for module in imports(file)}.isdisjoint(IMPURE)


@pytest.mark.parametrize("file", PURE, ids=name_of)
def test_what_decides_or_folds_calls_no_clock_no_chance_and_no_world(file: Path) -> None:
    assert set(calls(file)).isdisjoint(CLOCKS)


@pytest.mark.parametrize("file", PURE, ids=name_of)
def test_what_decides_or_folds_never_waits(file: Path) -> None:
    found = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.AsyncFunctionDef | ast.Await)]
    assert found == []


@pytest.mark.parametrize("file", PURE, ids=name_of)
def test_what_decides_or_folds_computes_with_no_floats(file: Path) -> None:
    floats = [n.value for n in ast.walk(ast.parse(file.read_text()))
              if isinstance(n, ast.Constant) and isinstance(n.value, float)]  # fmt: skip
    assert set(floats) <= {1e6}, "only times for readers are floats"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_one_way(file: Path) -> None:
    own = PACKAGES.index(file.relative_to(ROOT).parts[0])
    ours = {module.split(".")[0] for module in imports(file)} & set(PACKAGES)
    assert ours <= set(PACKAGES[: own + 1])


def test_nothing_of_ours_imports_the_tests() -> None:
    assert not [name_of(file) for file in FILES for module in imports(file) if module.split(".")[0] == "tests"]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_installed_packages_are_ours(package: str) -> None:
    found = importlib.import_module(package).__file__
    assert found is not None
    assert Path(found).parent == ROOT / package


def test_no_other_distribution_brings_a_package_named_events() -> None:
    others = [
        distribution.name
        for distribution in distributions()
        if distribution.name != "quantum-governor"
        and any(file.parts[0] in ("events", "events.py") for file in distribution.files or ())
    ]
    assert others == []
