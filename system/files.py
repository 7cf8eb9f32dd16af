"""Files that are written whole or not at all, and the lock on a run's folder."""

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import filelock

from system.errors import ResourceError, UsageError
from system.terminal import warn

# The errors of a disk that lacks locks or syncing (some network and FUSE disks).
LACKING = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOTTY}


def write_atomically(path: Path, write: Callable[[Path], None], needed: int = 0) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: readers see all or nothing.

    needed: bytes, for the error message. Raises ResourceError if the disk refuses."""
    # A random name: two containers that share a disk may have equal process numbers.
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            sync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(path, error, needed) from error
    finally:
        with contextlib.suppress(OSError):  # the error above says more
            temporary.unlink(missing_ok=True)


def sync(handle: int) -> None:
    """Make an open file, or the names in an open folder, survive a power cut, if the disk can.
    Raises OSError if it fails."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in LACKING:
            raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut. Windows does not open folders for that."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY)
        try:
            sync(handle)
        finally:
            os.close(handle)


def disk_error(path: Path, error: OSError, needed: int = 0) -> ResourceError:
    """The error for a disk that refuses to write `needed` bytes."""
    size = f" ({needed:,} bytes needed)" if needed else ""
    reason = error.strerror or str(error)
    fix = "free space, or use another disk"
    return ResourceError(path, f"cannot be written{size}: {reason}", fix)


def check_writable(path: Path, flag: str) -> None:
    """Check that `write_atomically` can write there. Raises UsageError, which names the flag, or
    ResourceError."""
    try:
        above = next(folder for folder in path.absolute().parents if folder.exists())
        wrong = path if path.is_dir() else None if above.is_dir() else above
        if wrong:
            what = f"{wrong} is {'a folder' if wrong is path else 'not a folder'}"
            raise UsageError(flag, what, "choose another name")
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # fails if the name is too long
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
    """Free bytes on the folder's disk."""
    return shutil.disk_usage(folder).free


class FolderLock:
    """One run in a folder at a time, as a context manager. The system drops the lock of a process
    that dies. Raises UsageError if another run has it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock = filelock.FileLock(folder / "lock", timeout=0)

    def __enter__(self) -> "FolderLock":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
        except FileExistsError as error:
            what = f"{self.folder} is a file"
            raise UsageError("--experiment_name", what, "choose another name") from error
        except filelock.Timeout as error:
            what = f"{self.folder} is in use by another run"
            fix = "choose another name, or stop that run"
            raise UsageError("--experiment_name", what, fix) from error
        except (OSError, NotImplementedError) as error:
            if getattr(error, "errno", errno.ENOSYS) not in LACKING:
                raise disk_error(self.folder / "lock", error) from error
            warn(f"{self.folder} is on a disk without locks: let no second run use it")
        self.status = self.folder.stat()
        return self

    def check(self) -> None:
        """Raise UsageError if the folder was removed or replaced since the run began."""
        with contextlib.suppress(OSError):
            if os.path.samestat(self.status, self.folder.stat()):
                return
        what = f"{self.folder} was removed or replaced during the run"
        raise UsageError("--experiment_name", what, "choose another name")

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):
            if os.listdir(self.folder) == ["lock"]:  # the run left nothing else
                os.unlink(self.folder / "lock")
                self.folder.rmdir()
        self.lock.release()
