"""Files that are whole or not there, and the lock on a run's folder."""

import contextlib
import errno
import functools
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import filelock

from system.errors import ResourceError, UsageError
from system.terminal import warn

# What a disk answers that lacks a call (some network and FUSE disks), rather than failing at it.
LACKING = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOTTY}


def write_atomically(path: Path, write: Callable[[Path], None], needed: int = 0) -> None:
    """Let `write` fill a temporary file beside `path`, then give it that name: readers see all or
    nothing of it.

    needed: bytes, for the error. Raises ResourceError where the disk refuses."""
    # A random name, not the process's number: two containers that share a disk share numbers.
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            sync(file.fileno(), path.parent)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(path, error, needed) from error
    finally:
        with contextlib.suppress(OSError):  # the error above says more
            temporary.unlink(missing_ok=True)


def sync(handle: int, folder: Path) -> None:
    """Make what was written to an open file, or renamed in an open folder, outlive a power cut.
    Where the disk of `folder` has no such thing a line says so. Raises OSError where it fails."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in LACKING:
            raise
        _say_weaker(folder.absolute(), "be synced: a power cut may cost the newest files")


def sync_folder(folder: Path) -> None:
    """Make a renaming in the folder outlive a power cut, where the system opens folders for that:
    Windows does not."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        sync(handle, folder)
    finally:
        os.close(handle)


@functools.cache
def _say_weaker(folder: Path, what: str) -> None:
    warn(f"{folder}: its disk cannot {what}")


def disk_error(path: Path, error: OSError, needed: int = 0) -> ResourceError:
    """The line for a disk that refuses a write of `needed` bytes."""
    size = f" ({needed:,} bytes needed)" if needed else ""
    reason = error.strerror or str(error)
    return ResourceError(path, f"cannot be written{size}: {reason}", "free or choose another disk")


def check_writable(path: Path, flag: str) -> None:
    """Find out now whether `write_atomically` could write there. Raises UsageError, which names the
    flag, or ResourceError."""
    try:
        above = next(folder for folder in path.absolute().parents if folder.exists())
        wrong = path if path.is_dir() else None if above.is_dir() else above
        if wrong:
            what = f"{wrong} is {'a folder' if wrong is path else 'no folder'}"
            raise UsageError(flag, what, "choose another name")
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # fails where the name is too long
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = path.parent / f".{secrets.token_hex(4)}.tmp"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise disk_error(path, error) from error


def save_json(path: Path, values: dict) -> None:
    """Write a dictionary as indented JSON."""
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def free_bytes(folder: Path) -> int:
    """What the folder's disk can still take."""
    return shutil.disk_usage(folder).free


class FolderLock:
    """One run per folder. The system drops the lock with the process, so a crash leaves none.

    `lock.pid` tells whose it is; it stays open, so that no other file can pass for it. Raises
    UsageError, with the pid of the run that holds the folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> "FolderLock":
        self._take()
        return self

    def __exit__(self, *_) -> None:
        mine = self._is_mine()
        self.pid.close()
        if mine:
            with contextlib.suppress(OSError):  # what ended the run says more
                Path(self.pid.name).unlink(missing_ok=True)
        self.lock.release()

    def check(self) -> None:
        """Before each save: a folder that was removed under the run is made again. Raises
        UsageError where another run has taken its place."""
        if not Path(self.pid.name).exists():
            warn(f"{self.folder} was removed or renamed; it is made again for the run to go on")
            self.__exit__()
            self._take()
        elif not self._is_mine():
            what = f"{self.folder} was removed, and is now the folder of another run"
            raise UsageError("--experiment_name", what, "choose another name")

    def _is_mine(self) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(self.pid.name), os.fstat(self.pid.fileno()))
        return False

    def _take(self) -> None:
        refused, notes = functools.partial(UsageError, "--experiment_name"), []
        pid, self.lock = self.folder / "lock.pid", filelock.FileLock(self.folder / "lock", 0)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with warnings.catch_warnings(record=True, action="always") as notes:  # of a soft lock
                self.lock.acquire()
        except FileExistsError as error:
            raise refused(f"{self.folder} is a file", "choose another name") from error
        except filelock.Timeout as error:
            holder = "not known"
            with contextlib.suppress(OSError):
                holder = pid.read_text(encoding="utf-8", errors="replace").strip()
            what = f"{self.folder} is in use by the run with pid {holder}"
            raise refused(what, "choose another, or stop that run") from error
        except (OSError, NotImplementedError) as error:
            if getattr(error, "errno", errno.ENOSYS) not in LACKING:
                raise disk_error(self.folder / "lock", error) from error
        if notes or isinstance(self.lock, filelock.SoftFileLock) or not self.lock.is_locked:
            _say_weaker(self.folder.absolute(), "lock files: let no second run use the folder")
        try:
            self.pid = open(pid, "w", encoding="utf-8")
            self.pid.write(f"{os.getpid()}\n")
            self.pid.flush()
        except OSError as error:
            raise disk_error(pid, error) from error
