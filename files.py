"""Files that are whole or not there, and the lock on a run's folder."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from errors import ResourceError, UsageError


def write_atomically(path: Path, write: Callable[[Path], None], needed: int = 0) -> None:
    """Let `write` fill a file beside `path`, then give it that name: readers see all of it or none.

    needed: bytes, for the error. Raises ResourceError where the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(path, error, needed) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a renaming in the folder outlive a power cut, where the system opens folders for that:
    Windows does not."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_error(path: Path, error: OSError, needed: int = 0) -> ResourceError:
    """The line for a disk that refuses a write of `needed` bytes."""
    size = f" ({needed:,} bytes needed)" if needed else ""
    reason = error.strerror or str(error)
    return ResourceError(path, f"cannot be written{size}: {reason}", "free or choose another disk")


def save_json(path: Path, values: dict) -> None:
    """Write a dictionary as indented JSON."""
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def free_bytes(folder: Path) -> int:
    """What the folder's disk can still take."""
    return shutil.disk_usage(folder).free


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left half written. Only for the run that holds the folder's lock."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """One run per folder. The system drops the lock with the process, so a crash leaves none
    behind; `lock.pid` is beside it, as nobody but its holder can read a locked file on Windows.

    Raises UsageError, with the pid of the run that holds it."""
    lock, pid = filelock.FileLock(folder / "lock", timeout=0), folder / "lock.pid"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except FileExistsError as error:
        raise UsageError(
            "--experiment_name", f"{folder} is a file", "choose another name"
        ) from error
    except filelock.Timeout as error:
        holder = pid.read_text(encoding="utf-8").strip() if pid.exists() else "that is not known"
        what = f"{folder} is in use by the run with pid {holder}"
        raise UsageError("--experiment_name", what, "choose another, or stop that run") from error
    except OSError as error:
        raise disk_error(folder / "lock", error) from error
    try:
        with contextlib.suppress(OSError):  # only for the line above
            pid.write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        pid.unlink(missing_ok=True)
        lock.release()
