"""One machine for all scenarios of a file: installed once, brought back to trading before each of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import missing
from tests.systemd.container import ContainerUnavailableError, container
from tests.systemd.desk import Desk


@pytest.fixture(scope="module")
def installed(request: pytest.FixtureRequest) -> Iterator[Desk]:
    """A machine on which everything that was there before, and then the governor, has been installed."""
    try:
        with container(request.module.__name__.rpartition(".")[2].replace("_", "-")) as machine:
            desk = Desk(machine)
            try:
                desk.measured("machine booted", machine.boot())
                desk.prepare()
                desk.install_and_configure()
            except BaseException:
                print(machine.console(), machine.journal())  # noqa: T201 - pytest shows it with the error
                raise
            yield desk
    except ContainerUnavailableError as reason:
        missing(str(reason))


@pytest.fixture
def desk(installed: Desk, record_property: Callable[[str, object], None]) -> Iterator[Desk]:
    """That machine, trading. What it logged meanwhile is shown where the scenario fails."""
    began = time.time()
    try:
        installed.restore()
        yield installed
    finally:
        machine = installed.machine
        print(machine.console()[-2000:], machine.journal(since=began))  # noqa: T201 - the same
        print(machine.path("/var/log/redis/redis-server.log").read_text()[-3000:])  # noqa: T201 - the same
        for name, seconds in installed.figures:
            record_property(f"seconds: {name}", seconds)
        installed.figures.clear()
