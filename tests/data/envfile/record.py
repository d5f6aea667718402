"""Record what systemd itself reads from environment files: `python record.py > systemd252.jsonl`.

Loads the parser of the installed systemd, as PID 1 does for `EnvironmentFile=`: `load_env_file`, then the cleaning of
invalid names. Each line is `[file, {name: value} or null when it is refused]`, bytes written as latin-1.
"""

import ctypes
import json
import random
import sys
import tempfile
from pathlib import Path

TOKENS = (
    *(b"A=", b"B", b" ", b"\t", b"=", b"\n", b"\r\n", b"\r", b"\\", b"'", b'"', b"#", b";", b"x", b"$", b"`", b"\x01"),
    *(b"\xc3\xa9", b"export ", b"A=live", b"\\\n", b"A = dry_run \n", b"#\\\n", b"\nA='", b'\nB="'),
)


def load(library: ctypes.CDLL, path: Path) -> dict[str, str] | None:
    strings = ctypes.POINTER(ctypes.c_char_p)()
    if library.load_env_file(None, str(path).encode(), ctypes.byref(strings)) < 0:
        return None
    values: dict[str, str] = {}
    if ctypes.cast(strings, ctypes.c_void_p).value is None:
        return values
    for entry in library.strv_env_clean_with_callback(strings, None, None):
        if entry is None:
            break
        name, _, value = entry.decode("latin-1").partition("=")
        values[name] = value
    return values


def main() -> None:
    library = ctypes.CDLL(str(next(Path("/usr/lib").glob("*/systemd/libsystemd-shared-252.so"))))
    library.strv_env_clean_with_callback.restype = ctypes.POINTER(ctypes.c_char_p)
    chance = random.Random(252)  # noqa: S311 - no secret
    with tempfile.NamedTemporaryFile() as file:
        for number in range(1200):
            data = b"".join(chance.choice(TOKENS) for _ in range(chance.randint(0, 14)))
            if number % 40 == 0:
                data += chance.choice([b"\xe9", b"\0"])
            Path(file.name).write_bytes(data)
            sys.stdout.write(json.dumps([data.decode("latin-1"), load(library, Path(file.name))]) + "\n")


if __name__ == "__main__":
    main()
