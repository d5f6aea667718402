"""Commands whose help says what for, how, with which exit codes, and where to read on.

The man page is written from the same (deploy/man/governor.1, by its test).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

Examples = Sequence[tuple[str, str]]
"""What to type, and what it is for."""
COMMON = {1: "failed", 2: "usage", 4: "Redis is not reachable", 78: "a setting is wrong"}
"""What these exit codes mean for every command that can have them."""


def codes(done: str = "done", *, differs: str | None = None, redis: bool = True, **others: str) -> dict[int, str]:
    """Exit codes and what they mean.

    Args:
        done: what 0 means.
        differs: what 3 means, where there is one.
        redis: whether the command needs Redis.
        others: what others mean, as `exit_130="…"`; they win over the usual meaning.
    """
    found = {0: done, **COMMON, **({} if differs is None else {3: differs})}
    if not redis:
        del found[4]
    found |= {int(name.removeprefix("exit_")): meaning for name, meaning in others.items()}
    return dict(sorted(found.items()))


class _Manual:
    """What stands below the options."""

    examples: Examples
    exits: Mapping[int, str]
    see: Sequence[str]

    def _take(self, options: dict[str, Any]) -> dict[str, Any]:
        self.examples = options.pop("examples", ())
        self.exits = options.pop("exits", {})
        self.see = options.pop("see", ())
        return options

    def _below(self, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"):
                _write(formatter, self.examples)
        if self.exits:
            with formatter.section("Exit codes"):
                formatter.write_dl([(str(code), meaning) for code, meaning in self.exits.items()])
        if self.see:
            with formatter.section("See also"):
                formatter.write_text(", ".join(self.see))


def _write(formatter: click.HelpFormatter, examples: Examples) -> None:
    """Side by side where that fits, else what each is for below it: an example is never broken in two."""
    width = max(len(typed) for typed, _ in examples)
    if all(width + 4 + len(purpose) <= formatter.width - 2 for _, purpose in examples):
        formatter.write_dl(list(examples), col_max=formatter.width)
        return
    indent = " " * formatter.current_indent
    for typed, purpose in examples:
        formatter.write(f"{indent}{typed}\n{indent}    {purpose}\n")


class Command(_Manual, click.Command):
    """A command with examples, exit codes and what to see also."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **self._take(options))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        self._below(formatter)


class Group(_Manual, click.Group):
    """The same for all of them together."""

    command_class = Command

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **self._take(options))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        self._below(formatter)
