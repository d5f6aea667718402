"""What the documentation tells people to type and to follow is there: commands, options, settings, events, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from events.types import Event
from governor.cli import main
from governor.settings import TABLE

ROOT = Path(__file__).resolve().parent.parent
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
EVENTS = {kind.NAME for kind in Event.__args__}
SETTINGS = {row.name for row in TABLE}


def anchors(page: str) -> set[str]:
    """What a page's headings are called in a link."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands(page: str) -> list[str]:
    """Every `governor …` of a page, in lines of their own and in the text."""
    lines = re.sub(r"\\\n\s*", " ", "\n".join(FENCE.findall(page))).splitlines()
    typed = [re.split(r"\s#|\s{2,}", line.partition("$ ")[2] or line, maxsplit=1)[0] for line in lines]
    said = re.findall(r"`([^`\n]+)`", FENCE.sub("", page))
    parts = [part.strip() for text in (*typed, *said) for part in re.split(r"&&|[;|><]", text)]
    return [part for part in parts if re.match(r"(sudo )?(\w+=\S+ )*governor [a-z]", part)]


def problem(command: str) -> str | None:
    """What of a command does not exist."""
    words = shlex.split(command.replace("…", "X"))
    name, *rest = words[words.index("governor") + 1 :]
    found = main.commands.get(name)
    if found is None:
        return f"no command {name}"
    while isinstance(found, click.Group) and rest and rest[0] in found.commands:
        name, found = f"{name} {rest[0]}", found.commands[rest.pop(0)]
    options = {flag: option for option in found.params for flag in (*option.opts, *option.secondary_opts)}
    for at, word in enumerate(rest):
        if word.startswith("-") and not re.fullmatch(r"-\d+\w", word):
            option = options.get(word.partition("=")[0])
            if option is None:
                return f"{name} has no option {word}"
            if word == "--name" and rest[at + 1] not in EVENTS:
                return f"no event {rest[at + 1]}"
            if word == "--what-if" and at + 1 < len(rest) and rest[at + 1].partition("=")[0] not in {*SETTINGS, "NAME"}:
                return f"no setting {rest[at + 1]}"
        elif at == 0 and not any(isinstance(param, click.Argument) for param in found.params) and word != "X":
            return f"{name} takes no argument"
    return None


def test_the_pages_have_commands_to_look_at() -> None:
    assert sum(len(commands(page)) for page in PAGES.values()) > 80


@pytest.mark.parametrize("name", sorted(PAGES))
def test_every_command_a_page_shows_exists_with_its_options(name: str) -> None:
    assert {command: why for command in commands(PAGES[name]) if (why := problem(command)) is not None} == {}


@pytest.mark.parametrize("name", sorted(PAGES))
def test_every_setting_a_page_names_exists(name: str) -> None:
    named = set(re.findall(r"\b(?:GOV|REDIS|BINANCE|APPLY|METRICS|DASHBOARD)_[A-Z0-9_]*[A-Z0-9]\b", PAGES[name]))
    elsewhere = {"APPLY_MODE", "DASHBOARD_TOKEN", *EVENTS}
    assert {
        setting for setting in named if not any(known.startswith(setting) for known in SETTINGS)
    } - elsewhere == set()


@pytest.mark.parametrize("name", sorted(PAGES))
def test_every_link_of_a_page_leads_to_a_page_and_a_heading(name: str) -> None:
    page = ROOT / name
    broken = []
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)", FENCE.sub("", PAGES[name])):
        leads_to = (page.parent / target) if target else page
        if not leads_to.exists() or (anchor and anchor not in anchors(leads_to.read_text())):
            broken.append(f"{target}#{anchor}")
    assert broken == []
