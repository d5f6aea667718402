"""What the terminal says of itself: help, man page, completion."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from governor.cli import main
from governor.manual import Command, Group
from governor.settings import TABLE
from tests.conftest import missing
from tests.generated import ROOT, check_generated
from tests.test_manuals import problem

PAGE = "deploy/man/governor.1"
COMPLETION = "deploy/completions/governor.bash"
FILES = (
    ("/etc/quantum/governor.env", "settings of an installation"),
    ("/etc/quantum/governor.credentials/", "its secrets, one file each"),
    ("/var/lib/quantum-governor/journal/", "the daemon's own copy of every event"),
    ("/var/lib/quantum-governor/archive/", "events that were archived"),
)


def commands() -> Iterator[tuple[str, click.Command]]:
    yield from sorted(main.commands.items())


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=[name for name, _ in commands()])
def test_every_command_says_what_for_how_with_which_exit_codes_and_where_to_read_on(
    name: str, command: click.Command
) -> None:
    assert isinstance(command, Command | Group)
    assert re.match(r"[A-Z][^.]+\.( |$)", inspect.cleandoc(command.help or "").replace("\n", " "))
    assert command.examples
    assert {0, 2} <= command.exits.keys() or name == "check"
    assert command.see
    for typed, purpose in command.examples:
        assert purpose
        if "governor " in typed and typed.startswith(("governor", "sudo governor")):
            after = re.sub(r"--env-file \S+ ", "", typed)
            assert problem(re.split(r" [|>]", after)[0]) is None, typed
    for place in command.see:
        assert problem(place) is None if place.startswith("governor ") else (ROOT / place).exists(), place


def test_an_example_is_never_broken_in_two() -> None:
    for name, command in commands():
        assert isinstance(command, Command | Group)
        for width in ("60", "80", "200"):
            told = CliRunner().invoke(main, [name, "--help"], env={"COLUMNS": width}, terminal_width=int(width)).output
            assert all(typed in told for typed, _ in command.examples)


# -- the man page ------------------------------------------------------------------------------------------------------


def roff(text: str) -> str:
    """Text as troff prints it: nothing in it is a request or an escape."""
    escaped = (
        textwrap.fill(text, 72, break_on_hyphens=False, break_long_words=False)
        .replace("\\", r"\e")
        .replace("-", r"\-")
        .replace("…", r"\&...")
    )
    return "\n".join(rf"\&{line}" if line.startswith((".", "'")) else line for line in escaped.splitlines())


def paragraphs(text: str | None) -> list[str]:
    return [roff(" ".join(part.split())) for part in inspect.cleandoc(text or "").split("\n\n")]


def options(command: click.Command) -> list[str]:
    context = click.Context(command, info_name=command.name, max_content_width=10_000)
    lines = []
    for param in command.params:
        record = param.get_help_record(context)
        if record is not None:
            lines += [".TP", rf"\fB{roff(record[0])}\fR".replace("\n", " "), roff(" ".join(record[1].split()))]
    return lines


def below(command: click.Command) -> list[str]:
    """Examples and exit codes."""
    assert isinstance(command, Command | Group)
    lines = [".PP", "Examples:"]
    for typed, purpose in command.examples:
        lines += [".RS 4", ".EX", roff(typed).replace("\n", " "), ".EE", ".RS 4", roff(purpose), ".RE", ".RE"]
    lines += [".PP", "Exit codes:", ".RS 4", ".PD 0"]
    for code, meaning in command.exits.items():
        lines += [".TP 5", str(code), roff(meaning)]
    return [*lines, ".PD", ".RE", ".PP", roff(f"See also: {', '.join(command.see)}.")]


def arguments(command: click.Command) -> str:
    return " ".join(["[OPTIONS]", *(param.make_metavar(click.Context(command)) for param in command.params
                                    if isinstance(param, click.Argument))])  # fmt: skip


def man_page() -> str:
    lines = [
        '.\\" Written from the commands by tests/test_manual.py.',
        '.TH GOVERNOR 1 "" "quantum-governor" "User Commands"',
        ".SH NAME",
        r"governor \- the last gate before a trading bot's orders",
        ".SH SYNOPSIS",
        r"\fBgovernor\fR [\fB\-\-env\-file\fR \fIPATH\fR] \fICOMMAND\fR [\fIOPTIONS\fR]",
        ".SH DESCRIPTION",
        "\n.PP\n".join(paragraphs(main.help)),
        *below(main),
        ".SH OPTIONS",
        *options(main),
        ".SH COMMANDS",
    ]
    for name, command in commands():
        lines += [f".SS governor {roff(f'{name} {arguments(command)}')}".replace("\n", " ")]
        lines += ["\n.PP\n".join(paragraphs(command.help)), *options(command), *below(command)]
    lines += [".SH ENVIRONMENT", "All of them are explained in docs/settings.md."]
    for row in TABLE:
        default = f" (default {row.default})" if row.default else ""
        lines += [".TP", rf"\fB{roff(row.name)}\fR", roff(f"{row.help.rstrip('.')}{default}.")]
    lines += [".TP", r"\fBNO_COLOR\fR", "When set: no colours."]
    lines += [".SH FILES"]
    for path, what in FILES:
        lines += [".TP", rf"\fI{roff(path)}\fR", roff(what)]
    lines += [".SH SEE ALSO", r"\fBredis\-cli\fR(1), \fBsystemctl\fR(1), \fBjournalctl\fR(1)"]
    return "\n".join(lines) + "\n"


def test_the_man_page_is_what_the_commands_say() -> None:
    check_generated(PAGE, man_page())


def test_the_man_page_is_printed_without_a_warning() -> None:
    if shutil.which("man") is None or shutil.which("groff") is None:
        missing("man and groff are not there: apt-get install man-db groff-base")
    for width in ("60", "80", "132"):
        done = subprocess.run(
            ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", ROOT / PAGE],
            env={"PATH": os.environ["PATH"], "MANWIDTH": width, "LC_ALL": "C.UTF-8", "MANPAGER": "cat"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        said = re.sub(r".\x08|\x1b\[[\d;]*m", "", done.stdout)
        assert all(f"governor {name}" in said for name in main.commands)
        assert "rearm --reason" in said.replace("\N{HYPHEN}", "?"), "what is to be typed has real minus signs"


# -- completion --------------------------------------------------------------------------------------------------------

ASK = r"""
{load}
COMP_WORDS=({words}) COMP_CWORD={at} COMPREPLY=()
compopt() {{ :; }}
_governor_completion governor
printf '%s\n' "${{COMPREPLY[@]}}"
"""


def completed(*words: str, load: str) -> set[str]:
    """What a real bash offers for the last word."""
    if shutil.which("bash") is None:
        missing("bash is not there")
    bin_directory = Path(sys.executable).parent
    script = ASK.format(load=load, words=" ".join(f"'{word}'" for word in words), at=len(words) - 1)
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={"PATH": f"{bin_directory}:{os.environ['PATH']}", "REDIS_PORT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("governor", "re"), {"replay", "rebuild", "rearm"}),
        (("governor", "status", "--w"), {"--watch"}),
        (("governor", "events", "--name", "DISARM_"), {"DISARM_STARTED", "DISARM_FAILED"}),
        (("governor", "events", "--name", "rea"), {"REARMED"}),
        (("governor", "events", "--level", ""), {"info", "warning", "critical"}),
        (("governor", "events", "--verdict", "B"), {"BLOCK"}),
        (("governor", "replay", "--what-if", "GOV_MAX_EXEC"), {"GOV_MAX_EXEC_PER_HOUR=", "GOV_MAX_EXEC_PER_5MIN="}),
        (("governor", "completion", ""), {"bash", "zsh", "fish"}),
        (("governor", "explain", ""), set()),
    ],
)
def test_bash_offers_commands_options_and_names(words: tuple[str, ...], offered: set[str]) -> None:
    assert completed(*words, load=(ROOT / COMPLETION).read_text()) == offered


def test_bash_takes_it_from_the_command_as_well() -> None:
    assert completed("governor", "chec", load="source <(governor completion bash)") == {"check", "checkpoint"}


def test_the_installed_completion_is_what_the_command_prints() -> None:
    check_generated(COMPLETION, CliRunner().invoke(main, ["completion", "bash"]).output)


@pytest.mark.parametrize(("shell", "word"), [("zsh", "#compdef governor"), ("fish", "complete --no-files")])
def test_other_shells_get_theirs(shell: str, word: str) -> None:
    told = CliRunner().invoke(main, ["completion", shell])
    assert told.exit_code == 0
    assert word in told.output
    assert "_GOVERNOR_COMPLETE" in told.output


def test_an_unknown_shell_is_a_usage_error() -> None:
    assert CliRunner().invoke(main, ["completion", "tcsh"]).exit_code == 2
