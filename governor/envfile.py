r"""What systemd reads from an `EnvironmentFile=`, and how to set one variable in it.

The grammar is that of `parse_env_file_internal` in systemd's `src/basic/env-file.c` (states PRE_KEY, KEY,
PRE_VALUE, VALUE, VALUE_ESCAPE, SINGLE_QUOTE_VALUE, DOUBLE_QUOTE_VALUE, DOUBLE_QUOTE_VALUE_ESCAPE, COMMENT,
COMMENT_ESCAPE), written as one regular expression for each kind of item. Possessive quantifiers make each go
forward only, as the states do. What surprises people:

- The last assignment wins. Indentation and blanks around `=` are fine. `export X=1` sets nothing named `X`.
- A lone `\r` ends a line. There are no comments behind a value: `live # was dry_run` is the whole value.
- A quoted value may go on over many lines, and text may follow the closing quote: `"dry"_run` is `dry_run`.
- A backslash takes the next byte literally, or removes a line end. In `\<CR><LF>` it only removes the `\r`.
- Up to systemd 253 a backslash takes the next byte in comments too, so that a comment line ending in one
  hides the line below; since 254 it does not. One file then has two readings; the machine decides which is right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_BLANKS = re.compile(rb"[ \t\r\n]*+")
_COMMENT_UNTIL_253 = re.compile(rb"[#;](?:[^\\\r\n]|\\.|\\\Z)*+", re.DOTALL)
_COMMENT_SINCE_254 = re.compile(rb"[#;][^\r\n]*+")
_KEY = re.compile(rb"(?P<key>[^\r\n][^=\r\n]*+)(?P<equals>=?)", re.DOTALL)
_VALUE = re.compile(
    rb"""
    (?P<quoted> (?: [ \t] | '[^']*+'?+ | "(?:[^"\\]|\\.)*+(?:"|\\\Z)?+ )*+ )
    (?P<bare>   (?: [^\\\r\n] | \\. | \\\Z )*+ )
    """,
    re.DOTALL | re.VERBOSE,
)
_QUOTED = re.compile(rb"""'([^']*+)'?+|"((?:[^"\\]|\\.)*+)"?+""", re.DOTALL)
_ESCAPED_IN_QUOTES = re.compile(rb'\\(?:(["\\`$])|\n)')
_BARE_TOKEN = re.compile(rb"\\.?|[^\\]", re.DOTALL)
_REMOVED = (b"\\\n", b"\\\r", b"\\")
_LINE_END = re.compile(rb"\r\n|\r|\n|\Z")
# One round is enough unless the two readings differ; then what one adds the other may see twice.
_ROUNDS = 4
_SAFE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SAFE_VALUE = re.compile(r"[A-Za-z0-9_./:@%+,-]*")


class _Assignment(NamedTuple):
    name: bytes
    value: bytes
    start: int
    """Where the line begins on which the name stands."""
    end: int
    """Where the value ends: at a line end, or at the end of the data."""


def effective(data: bytes, name: str, *, since_254: bool = False) -> str | None:
    """Value systemd gives the variable, None when it is unset; bytes that are not UTF-8 become surrogates.

    Args:
        data: the file.
        name: the variable.
        since_254: read comments as systemd 254 and later do.
    """
    found = _named(data, name, since_254=since_254)
    return found[-1].value.decode(errors="surrogateescape") if found else None


def readings(data: bytes, name: str) -> tuple[str | None, str | None]:
    """What systemd up to 253 and what systemd since 254 make of the variable; nearly always the same."""
    return effective(data, name), effective(data, name, since_254=True)


def variables(data: bytes) -> dict[str, str]:
    """Return every variable systemd takes from the file; names it ignores are left out.

    Raises:
        ValueError: systemd would not load the file, or its versions read it differently; the message says what.
    """
    if (why := refusal(data)) is not None:
        raise ValueError(why)
    old, new = (
        {name.decode(): value.decode() for name, value in _pairs(data, since_254=newer)} for newer in (False, True)
    )
    if old != new:
        differing = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        raise ValueError(
            f"systemd before and since 254 read {', '.join(differing)} differently, "
            "expected no comment that ends in a backslash"
        )
    return {name: value for name, value in old.items() if _SAFE_NAME.fullmatch(name)}


def refusal(data: bytes) -> str | None:
    """Say why systemd would not load the file at all; None when it does."""
    if b"\0" in data:
        return "it holds a NUL byte"
    for since_254 in (False, True):
        for found in _scan(data, since_254=since_254):
            try:
                (found.name + found.value).decode()
            except UnicodeDecodeError:
                return f"{found.name.decode(errors='replace')} is not UTF-8"
    return None


def assign(data: bytes, name: str, value: str) -> bytes:
    """Set a variable: replace its first assignment, drop later ones, add it if there is none, keep the rest.

    Afterwards both readings agree on it. Where they did not, what one takes for a comment may change too.

    Args:
        data: the file.
        name: the variable.
        value: plain enough to need no quotes.

    Raises:
        ValueError: name or value is not plain, or the result would not give the value.
    """
    if not _SAFE_NAME.fullmatch(name) or not _SAFE_VALUE.fullmatch(value):
        raise ValueError(f"{name}={value!r} needs quoting, which assign() does not do")
    result = data
    for _ in range(_ROUNDS):
        result = _correct_where_newer_differs(_place(result, name, value), name, value)
    if readings(result, name) != (value, value):
        raise ValueError(f"{name} would read {readings(result, name)!r} instead of {value!r}")
    return result


def _place(data: bytes, name: str, value: str) -> bytes:
    found = _named(data, name, since_254=False)
    if [each.value for each in found] == [value.encode()]:
        return data
    if not found:
        return _add(data, name, value)
    for later in reversed(found[1:]):
        data = data[: later.start] + data[_match(_LINE_END, data, later.end).end() :]
    return _overwrite(data, found[0], value)


def _correct_where_newer_differs(data: bytes, name: str, value: str) -> bytes:
    if effective(data, name, since_254=True) == value:
        return data
    found = _named(data, name, since_254=True)
    if not found:
        return _add(data, name, value)
    for each in reversed(found):
        if each.value != value.encode():
            data = _overwrite(data, each, value)
    return data


def _overwrite(data: bytes, found: _Assignment, value: str) -> bytes:
    # A value can end between the two bytes of a CRLF, when a backslash stands before it.
    end = found.end - (data[found.end - 1 : found.end + 1] == b"\r\n")
    return data[: found.start] + found.name + b"=" + value.encode() + data[end:]


def _add(data: bytes, name: str, value: str) -> bytes:
    """Append a line, or put it first where the end of the file belongs to an open quote or a backslash."""
    line = f"{name}={value}".encode()
    newline = b"\r\n" if b"\r\n" in data else b"\n"
    appended = data + line + newline if data[-1:] in (b"", b"\r", b"\n") else data + newline + line
    added = [(name.encode(), value.encode())]
    if all(_pairs(appended, since_254=newer) == _pairs(data, since_254=newer) + added for newer in (False, True)):
        return appended
    return line + newline + data


def _pairs(data: bytes, *, since_254: bool) -> list[tuple[bytes, bytes]]:
    return [(found.name, found.value) for found in _scan(data, since_254=since_254)]


def _named(data: bytes, name: str, *, since_254: bool) -> list[_Assignment]:
    return [found for found in _scan(data, since_254=since_254) if found.name == name.encode()]


def _scan(data: bytes, *, since_254: bool) -> Iterator[_Assignment]:
    """Every assignment in order, of whatever name."""
    comment = _COMMENT_SINCE_254 if since_254 else _COMMENT_UNTIL_253
    at = 0
    while (at := _match(_BLANKS, data, at).end()) < len(data):
        if data[at] in b"#;":
            at = _match(comment, data, at).end()
            continue
        key = _match(_KEY, data, at)
        at = key.end()
        if key["equals"]:
            value = _match(_VALUE, data, at)
            at = value.end()
            yield _Assignment(key["key"].rstrip(b" \t"), _unquote(value), _line_start(data, key.start()), at)


def _match(pattern: re.Pattern[bytes], data: bytes, at: int) -> re.Match[bytes]:
    found = pattern.match(data, at)
    assert found is not None, pattern  # each pattern matches wherever the scan uses it
    return found


def _line_start(data: bytes, at: int) -> int:
    return max(data.rfind(b"\n", 0, at), data.rfind(b"\r", 0, at)) + 1


def _unquote(value: re.Match[bytes]) -> bytes:
    parts = []
    for piece in _QUOTED.finditer(value["quoted"]):
        single, double = piece.groups()
        parts.append(single if double is None else _ESCAPED_IN_QUOTES.sub(rb"\1", double))
    tokens = _BARE_TOKEN.findall(value["bare"])
    while tokens and tokens[-1] in (b" ", b"\t"):
        tokens.pop()
    parts += [token[-1:] for token in tokens if token not in _REMOVED]
    return b"".join(parts)
