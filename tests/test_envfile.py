import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from governor import envfile
from governor.envfile import assign, effective, readings, refusal

RECORDED = [
    json.loads(line) for line in (Path(__file__).parent / "data/envfile/systemd252.jsonl").read_text().splitlines()
]


def test_every_recorded_file_reads_as_it_did_in_systemd_252() -> None:
    for text, values in RECORDED:
        data = text.encode("latin-1")
        if values is None:
            assert refusal(data), data
            continue
        for name in {"A", "B", "x", "xA", "AB", *values}:
            expected = values.get(name)
            value = effective(data, name)
            read = None if value is None else value.encode(errors="surrogateescape").decode("latin-1")
            assert read == expected, (data, name)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"", None),
        (b"M=live", "live"),
        (b"M=live\n", "live"),
        (b"M=a\nM=b\n", "b"),
        (b"M=a\n  M = b \t\n", "b"),
        (b"export M=live\n", None),
        (b"M=a\nexport M=b\n", "a"),
        (b"#M=a\n;M=b\n # M=c\n", None),
        (b"M=live # was dry_run\n", "live # was dry_run"),
        (b"M=a;b\n", "a;b"),
        (b"M=live\r\nX=1\r\n", "live"),
        (b"X=1\rM=live\r", "live"),
        (b"M=li\\\nve\n", "live"),
        (b"M=\\\n  live\n", "  live"),
        (b"M=li\\\r\nve\n", "li"),
        (b"M=live\\", "live"),
        (b"M=live \\", "live "),
        (b"M=a\\ \n", "a "),
        (b"M=a\\nb\n", "anb"),
        (b"M='a b'\n", "a b"),
        (b"M='a\\nb'\n", "a\\nb"),
        (b'M="a\nb"\n', "a\nb"),
        (b'M="a\\\nb"\n', "ab"),
        (b'M="\\"\\$\\`\\\\\\x"\n', '"$`\\\\x'),
        (b'M="dry"_run\n', "dry_run"),
        (b"M='dry' \"_\" run\n", "dry_run"),
        (b"M='open\nM=a\n", "open\nM=a\n"),
        (b'M="open\\', "open"),
        (b"M=\n", ""),
        (b"M\n", None),
        (b"=M=a\n", None),
        (b"M=a\n=\n", "a"),
        (b"X='\nM=hidden\n'\n", None),
        (b"X=1\\\nM=hidden\n", None),
        (b"XM=a\nMX=b\n", None),
        (b"\xef\xbb\xbfM=live\n", None),
        (b"M=\xff\n", "\udcff"),
    ],
)
def test_one_variable_reads_as_systemd_reads_it(data: bytes, value: str | None) -> None:
    assert readings(data, "M") == (value, value)


@pytest.mark.parametrize(
    ("data", "until_253", "since_254"),
    [
        (b"# note \\\nM=live\n", None, "live"),
        (b"# note \\\nM=live\nM=dry\n", "dry", "dry"),
        (b"M=dry\n# note \\\nM=live\n", "dry", "live"),
        (b"# note \\\\\nM=live\n", "live", "live"),
        (b"# note \\", None, None),
        (b"# note \\\r\nM=live\n", "live", "live"),
        (b"#\\\nX='\nM=a\n'\n", "a", None),
    ],
)
def test_a_comment_ending_in_a_backslash_reads_differently_since_systemd_254(
    data: bytes, until_253: str | None, since_254: str | None
) -> None:
    assert readings(data, "M") == (until_253, since_254)
    assert readings(assign(data, "M", "dry"), "M") == ("dry", "dry")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"A=\0\n", "it holds a NUL byte"),
        (b"A=\xe9\n", "A is not UTF-8"),
        (b"\xe9=1\n", "\N{REPLACEMENT CHARACTER} is not UTF-8"),
        (b"# caf\xe9\nA=1\n", None),
        (b"A=\xc3\xa9\n", None),
    ],
)
def test_a_file_that_systemd_would_not_load_is_known(data: bytes, reason: str | None) -> None:
    assert refusal(data) == reason


@pytest.mark.parametrize(
    ("data", "result"),
    [
        (b"", b"M=dry\n"),
        (b"M=live\n", b"M=dry\n"),
        (b"M=live", b"M=dry"),
        (b"M=live\r\nX=1\r\n", b"M=dry\r\nX=1\r\n"),
        (b"A=1\nM=live\nB=2\nM=x\nC=3", b"A=1\nM=dry\nB=2\nC=3"),
        (b"A=1\n\t M = live \nB=2\n", b"A=1\nM=dry\nB=2\n"),
        (b"A=1\n  M = dry \nB=2\n", b"A=1\n  M = dry \nB=2\n"),
        (b"M='dry'\n", b"M='dry'\n"),
        (b"M=dry\nM=dry\n", b"M=dry\n"),
        (b"M=a\r\nM=b\r\nX=1", b"M=dry\r\nX=1"),
        (b"M=a\rM=b\rX=1", b"M=dry\rX=1"),
        (b"X=1\nM=a\\\nb\nY=2\n", b"X=1\nM=dry\nY=2\n"),
        (b"X=1\nM=a\\\r\nY=2\r\n", b"X=1\nM=dry\r\nY=2\r\n"),
        (b"M=\"a\nM=b\n\"\nX='\nM=c\n'\n", b"M=dry\nX='\nM=c\n'\n"),
        (b"X=1\\\nM=live\n", b"X=1\\\nM=live\nM=dry\n"),
        (b"X=1", b"X=1\nM=dry"),
        (b"X=1\r\nY=2", b"X=1\r\nY=2\r\nM=dry"),
        (b"X=1\r\n", b"X=1\r\nM=dry\r\n"),
        (b"#M=live\nexport M=live\n", b"#M=live\nexport M=live\nM=dry\n"),
        (b"# caf\xe9 \xff\nM=live\nX=\xfe\n", b"# caf\xe9 \xff\nM=dry\nX=\xfe\n"),
        (b"X='never closed\n", b"M=dry\nX='never closed\n"),
        (b"X=1\\", b"M=dry\nX=1\\"),
        (b"# note \\", b"M=dry\n# note \\"),
        (b"M='never closed\nX=1\n", b"M=dry"),
        (b"# note \\\nM=live\n", b"# note \\\nM=live\nM=dry\n"),
        (b"M=live\n# note \\\nM=dry\n", b"M=dry\n# note \\\nM=dry\n"),
        (b"junk\nM=live\n=\n", b"junk\nM=dry\n=\n"),
    ],
)
def test_assign_changes_the_assignment_and_not_one_other_byte(data: bytes, result: bytes) -> None:
    assert assign(data, "M", "dry") == result


@pytest.mark.parametrize(
    ("name", "value"), [("M", "a b"), ("M", 'a"'), ("M", "a\n"), ("M X", "a"), ("", "a"), ("M", "é")]
)
def test_assign_refuses_what_would_need_quotes(name: str, value: str) -> None:
    with pytest.raises(ValueError, match="needs quoting"):
        assign(b"", name, value)


def test_assign_fails_loudly_when_the_result_does_not_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envfile, "_overwrite", lambda data, *_: data)
    with pytest.raises(ValueError, match=r"M would read \('live', 'live'\) instead of 'dry'"):
        assign(b"M=live\n", "M", "dry")


TOKENS = st.sampled_from(
    [
        *(b"M=", b"M", b"B=", b" ", b"\t", b"=", b"\n", b"\r\n", b"\r", b"\\", b"'", b'"', b"#", b";", b"x", b"\xe9"),
        *(b"M=live", b"\nM=live", b"\n M = dry \n", b"\\\n", b"#\\\n", b"export M=live\n", b"\nB='", b'\nB="', b"\0"),
    ]
)
FILES = st.lists(TOKENS, max_size=20).map(b"".join) | st.binary(max_size=60)


def others(data: bytes, *, since_254: bool) -> list[tuple[bytes, bytes]]:
    return [pair for pair in envfile._pairs(data, since_254=since_254) if pair[0] != b"M"]


@given(FILES)
@settings(max_examples=600, deadline=None)
def test_assign_holds_for_any_file(data: bytes) -> None:
    result = assign(data, "M", "dry")
    assert readings(result, "M") == ("dry", "dry")
    assert assign(result, "M", "dry") == result
    if envfile._pairs(data, since_254=False) == envfile._pairs(data, since_254=True):
        for since_254 in (False, True):
            assert others(result, since_254=since_254) == others(data, since_254=since_254)


def test_long_files_take_no_quadratic_time() -> None:
    data = b"X='" + b'a\\"$ \n' * 50_000
    started = time.process_time()
    assert effective(data, "X") == data[3:].decode()
    assert readings(b"#\\\n" * 100_000, "X") == (None, None)
    assert time.process_time() - started < 2
