"""What the kernel tells of files is enough to know that they are as they were: real files, real kernel."""

from __future__ import annotations

import contextlib
import mmap
import os
import pwd
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from governor import lookout
from governor.lookout import Lookout
from tests.conftest import missing

QUEUE = Path("/proc/sys/fs/inotify/max_queued_events")
OTHERS = 1_500
"""Pairs of events of other files: more than one read takes."""


class Place:
    """A directory with the file and, perhaps, a note beside it; and directories that something may lead to."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.directory = home / "etc" / "quantum"
        self.directory.mkdir(parents=True)
        self.config = self.directory / "apply-layer.env"
        self.config.write_text("APPLY_MODE=testnet\n")
        self.note = self.directory / "note"
        self.elsewhere = home / "elsewhere"
        self.elsewhere.mkdir()
        self.there = self.elsewhere / "apply-layer.env"
        self.there.write_text("APPLY_MODE=live\n")
        self.deep = home / "var" / "lib" / "governor" / "note"

    def replace(self, path: Path, text: str) -> None:
        new = self.home / "new"
        new.write_text(text)
        new.replace(path)

    def swap(self, link: Path, target: Path | str) -> None:
        """Set a link to another target in one step, as Kubernetes does."""
        new = self.home / "new-link"
        new.symlink_to(target)
        new.replace(link)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@contextlib.contextmanager
def looking(*paths: Path) -> Iterator[Lookout]:
    one = Lookout(paths)
    try:
        one.watch()
        if not one.quiet():
            missing(f"the kernel tells nothing of {paths[0]}: see the log")
        yield one
    finally:
        one.close()


def nothing(_: Place) -> None:
    pass


def linked(place: Place) -> None:
    (place.home / "other-name").hardlink_to(place.config)


def link_to_file(place: Place) -> None:
    place.config.unlink()
    place.config.symlink_to("../../elsewhere/apply-layer.env")


def link_to_directory(place: Place) -> None:
    shutil.rmtree(place.directory)
    place.directory.symlink_to(place.elsewhere)


def mounted_by_kubernetes(place: Place) -> None:
    """A link to a file through a link to a directory, both beside it."""
    place.config.unlink()
    for generation in ("..1", "..2"):
        (place.directory / generation).mkdir()
        (place.directory / generation / "apply-layer.env").write_text(f"APPLY_MODE={generation}\n")
    (place.directory / "..data").symlink_to("..1")
    place.config.symlink_to("..data/apply-layer.env")


def loop(place: Place) -> None:
    place.config.unlink()
    place.config.symlink_to("round")
    (place.directory / "round").symlink_to("apply-layer.env")


def dangling(place: Place) -> None:
    place.config.unlink()
    place.config.symlink_to(place.home / "later" / "file")


def append(place: Place) -> None:
    with place.config.open("a") as file:
        file.write("X=1\n")


def same_length(place: Place) -> None:
    descriptor = os.open(place.config, os.O_WRONLY)
    os.pwrite(descriptor, b"APPLY_MODE=dry_run", 0)
    os.close(descriptor)


def truncate(place: Place) -> None:
    os.truncate(place.config, 3)


def mapped(place: Place) -> None:
    """The write itself is not told, its end is."""
    with place.config.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[:1] = b"#"


def by_another_process(place: Place) -> None:
    subprocess.run(["/bin/sh", "-c", f"echo APPLY_MODE=dry_run > '{place.config}'"], check=True)


def replace_directory(place: Place) -> None:
    place.directory.rename(place.home / "aside")
    place.directory.mkdir()


def move_above(place: Place) -> None:
    (place.home / "etc").rename(place.home / "etc-before")


def make_deep(place: Place) -> None:
    place.deep.parent.mkdir(parents=True)


def remove_all(place: Place) -> None:
    shutil.rmtree(place.home / "etc")


def directory_for_a_file(place: Place) -> None:
    place.config.unlink()
    place.config.mkdir()


CHANGES: dict[str, tuple[Callable[[Place], None], Callable[[Place], object]]] = {
    "written in place": (nothing, lambda place: place.config.write_text("APPLY_MODE=live\n")),
    "written, and as long as it was": (nothing, same_length),
    "appended to": (nothing, append),
    "truncated": (nothing, truncate),
    "written through memory, and closed": (nothing, mapped),
    "written by another process": (nothing, by_another_process),
    "another file renamed over it": (nothing, lambda place: place.replace(place.config, "APPLY_MODE=live\n")),
    "removed": (nothing, lambda place: place.config.unlink()),
    "renamed": (nothing, lambda place: place.config.rename(place.directory / "aside")),
    "made unreadable": (nothing, lambda place: place.config.chmod(0o000)),
    "times set": (nothing, lambda place: os.utime(place.config, (1, 1))),
    "a directory made in its place": (nothing, directory_for_a_file),
    "a note left": (nothing, lambda place: place.note.write_text("{}")),
    "a note moved in": (nothing, lambda place: place.replace(place.note, "{}")),
    "a note that is a link": (nothing, lambda place: place.note.symlink_to("nowhere")),
    "a note that is another name of a file": (nothing, lambda place: place.note.hardlink_to(place.there)),
    "its directory removed": (nothing, lambda place: shutil.rmtree(place.directory)),
    "its directory replaced": (nothing, replace_directory),
    "its directory made unsearchable": (nothing, lambda place: place.directory.chmod(0o600)),
    "a directory above moved away": (nothing, move_above),
    "all removed": (nothing, remove_all),
    "the first missing directory made": (nothing, lambda place: (place.home / "var").mkdir()),
    "all missing directories made": (nothing, make_deep),
    "a file made in a directory": (make_deep, lambda place: place.deep.write_text("{}")),
    "another name of it written": (linked, lambda place: (place.home / "other-name").write_text("APPLY_MODE=live\n")),
    "another name of it made unreadable": (linked, lambda place: (place.home / "other-name").chmod(0o000)),
    "a link to it set anew": (link_to_file, lambda place: place.swap(place.config, "note")),
    "a link to it removed": (link_to_file, lambda place: place.config.unlink()),
    "the link's target written": (link_to_file, lambda place: place.there.write_text("APPLY_MODE=testnet\n")),
    "the link's target replaced": (link_to_file, lambda place: place.replace(place.there, "APPLY_MODE=testnet\n")),
    "the link's target removed": (link_to_file, lambda place: place.there.unlink()),
    "the target's directory moved": (link_to_file, lambda place: place.elsewhere.rename(place.home / "aside")),
    "a link to its directory set anew": (link_to_directory, lambda place: place.swap(place.directory, place.home)),
    "written behind a link to its directory": (link_to_directory, lambda place: place.there.write_text("X=1\n")),
    "a note left behind a link to its directory": (
        link_to_directory,
        lambda place: (place.elsewhere / "note").write_text("{}"),
    ),
    "the next one of Kubernetes": (
        mounted_by_kubernetes,
        lambda place: place.swap(place.directory / "..data", "..2"),
    ),
    "a loop of links opened": (loop, lambda place: place.swap(place.directory / "round", place.there)),
    "what a link leads to made": (dangling, lambda place: (place.home / "later").mkdir()),
}


@pytest.mark.parametrize("how", CHANGES)
def test_each_change_is_known_by_the_next_question(place: Place, how: str) -> None:
    prepare, change = CHANGES[how]
    prepare(place)
    with looking(place.config, place.note, place.deep) as one:
        change(place)
        assert not one.quiet()
        assert not one.quiet(), "until it is looked at"
        one.watch()
        assert one.quiet()


@pytest.mark.parametrize("how", CHANGES)
def test_a_change_is_known_after_another_one_too(place: Place, how: str) -> None:
    with looking(place.config, place.note, place.deep) as one:
        prepare, change = CHANGES[how]
        prepare(place)
        one.watch()
        assert one.quiet()
        change(place)
        assert not one.quiet()


def test_a_change_between_watching_and_looking_is_known(place: Place) -> None:
    with looking(place.config) as one:
        one.watch()
        place.config.write_text("APPLY_MODE=live\n")
        assert not one.quiet()


def test_a_directory_that_becomes_a_link_while_the_watches_are_set_is_known(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.lstat

    def lstat(path: Any) -> os.stat_result:
        found = real(path)
        if path == os.fsencode(place.directory) and not place.directory.is_symlink():
            place.directory.rename(place.home / "aside")
            place.directory.symlink_to(place.elsewhere)
        return found

    with looking(place.config) as one:
        monkeypatch.setattr(os, "lstat", lstat)
        one.watch()
        assert not one.quiet()
        one.watch()
        assert one.quiet()
        place.there.write_text("APPLY_MODE=testnet\n")
        assert not one.quiet()


def test_reading_and_what_others_do_in_the_same_directories_changes_nothing(place: Place) -> None:
    with looking(place.config, place.note, place.deep) as one:
        place.config.read_text()
        place.config.stat()
        list(place.directory.iterdir())
        beside = place.directory / "apply-layer.env.lock"
        beside.write_text("x")
        beside.chmod(0o600)
        beside.rename(place.directory / "apply-layer.env.bak.1")
        (place.directory / "apply-layer.env.bak.1").unlink()
        (place.home / "etc" / "hosts").write_text("x")
        (place.home / "tmp").mkdir()
        assert one.quiet()


def busy(place: Place, pairs: int) -> None:
    """Events of two files beside ours in turn: two alike in a row the kernel keeps as one."""
    opened = [os.open(place.directory / name, os.O_WRONLY | os.O_CREAT, 0o600) for name in ("busy", "busier")]
    for _ in range(pairs):
        for descriptor in opened:
            os.fchmod(descriptor, 0o600)
    for descriptor in opened:
        os.close(descriptor)


def test_a_change_among_many_others_is_known(place: Place) -> None:
    with looking(place.config) as one:
        busy(place, OTHERS)
        assert one.quiet()
        busy(place, OTHERS)
        place.config.write_text("APPLY_MODE=live\n")
        busy(place, OTHERS)
        assert not one.quiet()


def test_more_events_than_the_kernel_keeps_are_a_change(place: Place) -> None:
    most = int(QUEUE.read_text())
    if most > 1_000_000:
        missing(f"{QUEUE} is {most}: it would take too long to fill")
    with looking(place.config) as one:
        busy(place, most // 2 + 1)
        assert not one.quiet()
        one.watch()
        assert one.quiet()


def test_what_is_no_longer_on_the_way_is_no_longer_watched(place: Place) -> None:
    link_to_file(place)
    with looking(place.config) as one:
        before = watched()
        place.swap(place.config, "elsewhere")
        one.watch()
        assert one.quiet()
        place.there.write_text("X=1\n")
        assert one.quiet()
        assert watched() == before - 2, "neither the other directory nor the file in it"


def watched() -> int:
    """How many watches this process has."""
    information = [Path("/proc/self/fdinfo", name) for name in descriptors()]
    return sum(path.read_text().count("inotify wd:") for path in information if path.exists())


def test_a_directory_that_is_asked_for_itself_is_watched_as_one_on_the_way_too(place: Place) -> None:
    with looking(place.note, place.directory) as one:
        place.replace(place.note, "{}")
        assert not one.quiet()


UNDER_A_MOUNT = """
import subprocess, sys
from pathlib import Path
from governor.lookout import Lookout
directory = Path(sys.argv[1])
file = directory / "apply-layer.env"
one = Lookout([file])
def told(change):
    one.watch()
    assert one.quiet()
    change()
    assert not one.quiet()
told(lambda: subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], check=True))
assert not file.exists()
told(lambda: file.write_text("APPLY_MODE=live"))
told(lambda: file.write_text("APPLY_MODE=testnet"))
told(lambda: subprocess.run(["umount", directory], check=True))
told(lambda: file.write_text("APPLY_MODE=live"))
told(lambda: subprocess.run(["mount", "--bind", directory.parent / "other", file], check=True))
told(lambda: (directory.parent / "other").write_text("APPLY_MODE=dry_run"))
told(lambda: subprocess.run(["mount", "--bind", directory.parent / "others", directory], check=True))
told(lambda: (directory.parent / "others").chmod(0o700))
told(lambda: (directory.parent / "others" / file.name).write_text("APPLY_MODE=live"))
"""


def test_a_mount_over_the_directory_or_the_file_is_known(place: Place) -> None:
    (place.directory.parent / "other").write_text("APPLY_MODE=x")
    (place.directory.parent / "others").mkdir()
    apart = ["unshare", "--mount", "--propagation", "private", *(["--map-root-user"] if os.geteuid() else [])]
    try:
        subprocess.run([*apart, "mount", "-t", "tmpfs", "tmpfs", place.elsewhere], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        missing(f"nothing can be mounted here ({error})")
    script = [*apart, sys.executable, "-c", UNDER_A_MOUNT, str(place.directory)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def never_quiet(one: Lookout, change: Callable[[], object] = lambda: None) -> None:
    for _ in range(3):
        assert not one.quiet()
        one.watch()
        assert not one.quiet()
        change()
    one.close()
    assert not one.quiet()


def why(logs: list[MutableMapping[str, Any]]) -> str:
    (line,) = logs
    assert (line["event"], line["log_level"]) == (
        "files are looked at for each plan: the kernel cannot tell when they change",
        "info",
    )
    return str(line["why"])


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_files_that_change_without_this_kernel_are_never_quiet() -> None:
    before = descriptors()
    with capture_logs() as logs:
        never_quiet(Lookout([Path("/proc/self/comm")]))
    assert "kind 0x9fa0, which may change without this kernel: '/proc'" in why(logs)
    assert descriptors() == before


def test_a_path_that_depends_on_the_working_directory_is_never_quiet() -> None:
    with capture_logs() as logs:
        never_quiet(Lookout([Path("apply-layer.env")]))
    assert "not an absolute path: 'apply-layer.env'" in why(logs)


@pytest.mark.parametrize("more", [0, 1])
def test_without_a_descriptor_for_it_nothing_is_quiet(place: Place, more: int) -> None:
    before = descriptors()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    with capture_logs() as logs:
        lookout.log.info("so that nothing is imported where no file can be opened")
        logs.clear()
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, limits[1]))
        try:
            one = Lookout([place.config])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        never_quiet(one, lambda: place.config.write_text("X=1\n"))
    assert "Too many open files" in why(logs)
    assert descriptors() == before


def test_a_directory_that_may_be_searched_and_not_read_is_never_quiet() -> None:
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        place = Place(Path(home))
        child = os.fork()
        if child == 0:
            told = 1
            try:
                if os.geteuid() == 0:
                    place.directory.chmod(0o711)
                    os.setuid(pwd.getpwnam("nobody").pw_uid)
                else:
                    place.directory.chmod(0o311)
                assert "testnet" in place.config.read_text()
                never_quiet(Lookout([place.config]))
                told = 0
            finally:
                os._exit(told)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        place.directory.chmod(0o755)


def test_nothing_is_quiet_before_it_is_watched_and_after_it_is_closed(place: Place) -> None:
    one = Lookout([place.config])
    assert not one.quiet()
    one.watch()
    if not one.quiet():
        missing(f"the kernel tells nothing of {place.config}: see the log")
    one.close()
    never_quiet(one)
