"""The dashboard's page as files: what is shipped, and what it may not contain."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]
STATIC = ROOT / "governor" / "dashboard" / "static"
FILES = sorted(path for path in STATIC.rglob("*") if path.is_file())
OURS = [path for path in FILES if path.parent == STATIC]
MODULES = [path for path in OURS if path.suffix == ".js"]
PAGE = (STATIC / "index.html").read_text()


@pytest.mark.parametrize("builder", [WheelBuilder, SdistBuilder])
def test_what_is_built_holds_the_page(builder: type[WheelBuilder | SdistBuilder]) -> None:
    built = {each.distribution_path for each in builder(str(ROOT)).recurse_included_files()}
    assert {str(path.relative_to(ROOT)) for path in FILES} <= built


def test_the_page_names_only_files_that_are_there() -> None:
    named = set(re.findall(r'"/static/([^"]+)"', PAGE))
    for module in MODULES:
        named |= {each.removeprefix("./") for each in re.findall(r'from "(\./[^"]+)"', module.read_text())}
    assert named
    assert not {name for name in named if not (STATIC / name).is_file()}


def test_every_file_of_the_page_is_used() -> None:
    text = PAGE + "".join(module.read_text() for module in MODULES)
    state = (STATIC / "state.js").read_text()
    for path in OURS:
        word = path.stem.removeprefix("icon-") if path.stem.startswith("icon-") else path.name
        assert word in (state if path.stem.startswith("icon-") else text + "index.html"), path.name


def test_there_is_no_inline_script_or_style_in_the_page() -> None:
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", PAGE)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_text_never_becomes_markup(path: Path) -> None:
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|Function\(", path.read_text()
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_of_the_page_reaches_outside(path: Path) -> None:
    urls = set(re.findall(r"https?://[^\s\"'<>)]+", path.read_text()))
    assert urls <= {"http://www.w3.org/2000/svg", "https://github.com/leeoniya/uPlot"}


def test_the_chart_library_comes_with_its_licence() -> None:
    assert "MIT License" in (STATIC / "uplot" / "LICENSE").read_text()
    assert re.search(r"v1\.6\.\d+", (STATIC / "uplot" / "uPlot.iife.min.js").read_text()[:200])


def test_every_state_has_an_icon_in_the_page() -> None:
    names = set(re.findall(r'<symbol id="i-([^"]+)"', PAGE))
    used = set(re.findall(r'href="#i-([^"]+)"', PAGE))
    assert {"ARMED", "THROTTLED", "DISARMED", "UNKNOWN"} | used <= names
