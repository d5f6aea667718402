import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from governor.notify import Notifier

PID = str(os.getpid())


@contextmanager
def systemd(address: str) -> Iterator[socket.socket]:
    """The socket systemd listens on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(address)
        listening.settimeout(5)
        yield listening


def test_a_message_is_one_datagram_of_assignments(tmp_path: Path) -> None:
    with systemd(str(tmp_path / "notify")) as listening:
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        notifier.send(READY="1")
        notifier.send(WATCHDOG="1", STATUS="ARMED epoch=1 ü")
        assert listening.recv(4096) == b"READY=1"
        assert listening.recv(4096) == "WATCHDOG=1\nSTATUS=ARMED epoch=1 ü".encode()


def test_an_address_may_be_abstract() -> None:
    name = f"governor-test-{PID}"
    with systemd(f"\0{name}") as listening:
        Notifier({"NOTIFY_SOCKET": f"@{name}"}).send(STOPPING="1")
        assert listening.recv(4096) == b"STOPPING=1"


def test_a_line_break_in_a_value_begins_no_assignment_of_its_own(tmp_path: Path) -> None:
    with systemd(str(tmp_path / "notify")) as listening:
        Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")}).send(STATUS="DISARMED reason=news\nMAINPID=1\r\n")
        assert listening.recv(4096) == b"STATUS=DISARMED reason=news MAINPID=1"


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}])
def test_without_systemd_nothing_is_sent(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    notifier = Notifier(environ)
    monkeypatch.delattr(socket, "socket")
    notifier.send(READY="1")
    assert notifier.watchdog_s is None


@pytest.mark.parametrize(
    "address", ["/nowhere/notify", "@nobody-listens-here", "vsock:2:1", "x" * 500, "@" + "x" * 500]
)
def test_a_socket_that_cannot_be_reached_is_no_trouble(address: str) -> None:
    Notifier({"NOTIFY_SOCKET": address}).send(READY="1")


def test_a_socket_nobody_reads_does_not_block(tmp_path: Path) -> None:
    with systemd(str(tmp_path / "notify")) as listening:
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        for number in range(2000):
            notifier.send(STATUS=f"{number} " + "x" * 1000)
        assert listening.recv(4096).startswith(b"STATUS=0 x")


def test_a_socket_that_came_back_is_used_again(tmp_path: Path) -> None:
    path = tmp_path / "notify"
    notifier = Notifier({"NOTIFY_SOCKET": str(path)})
    notifier.send(STATUS="lost")
    for _ in range(2):
        with systemd(str(path)) as listening:
            notifier.send(STATUS="heard")
            assert listening.recv(4096) == b"STATUS=heard"
        path.unlink()


@pytest.mark.parametrize(
    ("environ", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": PID}, 0.5),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": ""}, None),
        ({"WATCHDOG_PID": PID}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": ""}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_counts_only_where_it_is_meant_for_this_process(
    environ: dict[str, str], watchdog_s: float | None
) -> None:
    assert Notifier(environ).watchdog_s == watchdog_s


def test_the_environment_is_that_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    monkeypatch.setenv("WATCHDOG_PID", PID)
    with systemd(str(tmp_path / "notify")) as listening:
        notifier = Notifier()
        notifier.send(READY="1")
        assert listening.recv(4096) == b"READY=1"
    assert notifier.watchdog_s == 1.0
