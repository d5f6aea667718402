"""Whether some files are as they were, asked of the kernel: a microsecond, and a look at each of them takes forty.

For each decision the daemon has to know what is in the Apply Layer's file and whether somebody left a note beside it.
A look at their times instead would miss a second change within one tick of the clock. inotify(7) misses none: whoever
creates, removes, renames, writes, truncates or chmods a file has the kernel queue an event before the system call
returns, so a queue that is empty now tells that no such call has ended since it was last emptied. Mounts are told in
the same way by /proc/self/mountinfo, so one poll(2) of the two descriptors is the whole question.

    watch:  empty the queue ─► watch directories and files, from / to each file ─► the caller looks
    quiet:  anything queued since? then not: watch and look again

A path is followed as the kernel follows it, link by link, and each directory is watched before what it says is
believed. So whatever changes the way to a file (a link set to another place, a directory moved away, one made later)
is an event as well, also if it happens while the watches are set. The file itself is watched because it may be
written through another name of it.

What the kernel does not tell is a write through memory mapped from the file; what is closed afterwards it does tell.
And where files change without this kernel (NFS, SMB, FUSE, 9p) it tells nothing. The former has to be bounded by who
asks, by looking every now and then whatever is said here; where the latter is possible nothing is ever called quiet.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from governor.logs import Logger

log = Logger("governor")

_MODIFY, _ATTRIB, _CLOSE_WRITE, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE, _DELETE_SELF, _MOVE_SELF = (
    0x2, 0x4, 0x8, 0x40, 0x80, 0x100, 0x200, 0x400, 0x800,
)  # fmt: skip
_MASK_ADD = 0x2000_0000
_ITSELF = _ATTRIB | _DELETE_SELF | _MOVE_SELF | _MASK_ADD
_CONTENT = _MODIFY | _CLOSE_WRITE
_ENTRIES = _CREATE | _DELETE | _MOVED_FROM | _MOVED_TO
_EVENT = struct.Struct("iIII")
_OVERFLOWN = -1
_READ_MOST = 65_536
_LINKS_MOST = 40
"""As the kernel."""
_LOCAL = {
    0xEF53,  # ext2, ext3, ext4
    0x58465342,  # xfs
    0x9123683E,  # btrfs
    0xF2F52010,  # f2fs
    0xCA451A4E,  # bcachefs
    0x2FC12FC1,  # zfs
    0x01021994,  # tmpfs
    0x858458F6,  # ramfs
    0x794C7630,  # overlay; writing to its layers while it is mounted is not allowed
}
"""Kinds of file systems (statfs(2)) that nobody changes but through this kernel."""

_libc = ctypes.CDLL(None, use_errno=True)
_statfs = ctypes.c_long * 64
"""Room for `struct statfs`, whose first word is the kind."""


class Lookout:
    """Tells when some files are to be looked at again. Of one thread.

    Args:
        paths: the files, absolute; they and the directories on the way need not exist.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = [os.fsencode(path) for path in paths]
        self._names: dict[int, set[bytes]] = {}
        """Names that count in each watched directory or file, by watch; the empty one is itself."""
        self._quiet = False
        self._descriptors: tuple[int, ...] = ()
        """Of inotify and of the mounts; none: it cannot be told."""
        self._poll: Callable[[int], list[tuple[int, int]]] = lambda _ms: []
        try:
            self._open()
        except (OSError, AttributeError) as error:
            self._give_up(error)

    def quiet(self) -> bool:
        """Whether nothing happened to the files since `watch`, for sure. Once not, not again before the next one."""
        if self._quiet and (told := self._poll(0)):
            self._quiet = not self._concerned(told)
        return self._quiet

    def watch(self) -> None:
        """Begin anew. To be called right before the files are looked at; where it cannot be told, it does nothing."""
        if not self._descriptors:
            return
        for _ in self._queued():
            pass
        before, self._names = self._names, {}
        try:
            for path in self._paths:
                self._follow(path)
        except OSError as error:
            self._give_up(error)
            return
        for watch in before.keys() - self._names.keys():
            _libc.inotify_rm_watch(self._descriptors[0], watch)  # it may have ended by itself
        self._quiet = True

    def close(self) -> None:
        """Give the descriptors back; nothing is quiet from then on."""
        self._quiet = False
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = ()

    def _open(self) -> None:
        self._descriptors = (_done(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)),)
        self._descriptors += (os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC),)
        poll = select.poll()
        for descriptor, event in zip(self._descriptors, (select.POLLIN, select.POLLPRI), strict=True):
            poll.register(descriptor, event)
        self._poll = poll.poll  # not os.read: what that raises where there is nothing takes three times as long

    def _give_up(self, error: Exception) -> None:
        self.close()
        log.info("files are looked at for each plan: the kernel cannot tell when they change", why=str(error))

    def _concerned(self, told: list[tuple[int, int]]) -> bool:
        """Whether one of the files may have been meant: what others do in the same directories does not count."""
        if any(descriptor != self._descriptors[0] for descriptor, _ in told):
            return True
        return any(self._concerns(watch, name) for data in self._queued() for watch, name in _events(data))

    def _concerns(self, watch: int, name: bytes) -> bool:
        return watch == _OVERFLOWN or name in self._names.get(watch, ())

    def _queued(self) -> Iterator[bytes]:
        try:
            while True:
                yield os.read(self._descriptors[0], _READ_MOST)
        except BlockingIOError:
            return

    def _follow(self, path: bytes) -> None:
        """Watch all that decides what a path leads to, as far as it leads.

        Raises:
            OSError: something on the way cannot be watched.
        """
        if not path.startswith(b"/"):
            raise OSError(errno.EINVAL, "not an absolute path", os.fsdecode(path))
        here, ahead, links = b"", _parts(path), 0
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # its coming is told by the directory before
            while ahead and links <= _LINKS_MOST:
                name = ahead.pop()
                if name == b"..":
                    here = here.rpartition(b"/")[0]
                    continue
                self._watch(here or b"/", _ITSELF | _ENTRIES, name)
                there = here + b"/" + name
                kind = os.lstat(there).st_mode
                if stat.S_ISLNK(kind):
                    links += 1
                    target = os.readlink(there)  # noqa: PTH115 - bytes, as events have
                    here = b"" if target.startswith(b"/") else here
                    ahead += _parts(target)
                elif stat.S_ISDIR(kind) and ahead:
                    here = there
                else:
                    self._watch(there, _ITSELF | _CONTENT, b"")
                    return

    def _watch(self, path: bytes, mask: int, name: bytes) -> None:
        watch = _done(_libc.inotify_add_watch(self._descriptors[0], path, mask), path)
        self._names.setdefault(watch, {b""}).add(name)
        found = _statfs()
        _done(_libc.statfs(path, found), path)
        kind = found[0] & 0xFFFF_FFFF
        if kind not in _LOCAL:
            why = f"a file system of kind {kind:#x}, which may change without this kernel"
            raise OSError(errno.EOPNOTSUPP, why, os.fsdecode(path))


def _parts(path: bytes) -> list[bytes]:
    """Names on the way, the first one last."""
    return [name for name in reversed(path.split(b"/")) if name not in {b"", b"."}]


def _events(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Watch and name of each event of a read."""
    at = 0
    while at < len(data):
        watch, _mask, _cookie, length = _EVENT.unpack_from(data, at)
        at += _EVENT.size
        yield watch, data[at : at + length].rstrip(b"\0")
        at += length


def _done(result: int, path: bytes = b"") -> int:
    """What a call of libc returned. Raises OSError where that tells of an error."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), *([os.fsdecode(path)] if path else []))
    return result
