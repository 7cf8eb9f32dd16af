"""Arrays on disk, in `prepared/`: each is written once, completely or not at all, then mapped.

An array is a .npy file with a checksum behind its data, which is verified at every start.
"""

import contextlib
import errno
import math
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import filelock
import numpy as np
from tqdm import tqdm

from system.files import disk_error, free_bytes, write_atomically
from system.terminal import say, warn

PREPARED = Path("prepared")  # in the current folder; may be deleted
TRAILER = b"\ncrc32 %08x\n"  # follows the data
PART = 1 << 26  # bytes that are verified at a time


def prepare(
    key: str, shape: tuple[int, ...], images: Iterable[np.ndarray]
) -> tuple[np.ndarray, int]:
    """Map the array of this key, (N, S, S, 3) uint8; return it and its checksum. If it is missing
    or damaged, it is written first.

    images: yields the whole array, (n, S, S, 3) at a time. Raises ResourceError if the disk cannot
    hold it. Processes that ask for the same array wait for the one that writes it."""
    path = PREPARED / f"{key}.npy"
    array = load_array(path, shape)
    if array is None:
        if path.exists():
            warn(f"{path} is damaged or was written by another version; preparing it again")
        save_array(key, shape, np.uint8, _show(images, shape[0], path))
        array = load_array(path, shape)
        assert array is not None, f"{path} does not have the shape {shape}"
    return array, read_checksum(path)


def _show(images: Iterable[np.ndarray], count: int, path: Path) -> Iterator[np.ndarray]:
    """Yield the images with a progress bar."""
    say(f"preparing {count:,} images once, in {path}")
    terminal = bool(sys.stderr and sys.stderr.isatty())
    with tqdm(total=count, unit=" images", desc="preparing", disable=not terminal) as bar:
        for batch in images:
            yield batch
            bar.update(len(batch))
    say(f"prepared {count:,} images")


def load_array(path: Path, shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray | None:
    """Map the array of a file, or return None if the file is not exactly what was written."""
    if not path.is_file():  # opening a pipe would wait for ever
        return None
    try:
        array = np.load(path, mmap_mode="r")
        written = read_checksum(path)
    except Exception:  # numpy raises nearly anything on a damaged header
        return None
    good = (
        isinstance(array, np.memmap)
        and array.flags.c_contiguous
        and (array.shape, array.dtype) == (shape, np.dtype(dtype))
        and written == _checksum(array, path)
    )
    return array if good else None


def read_checksum(path: Path) -> int:
    """Return the checksum that is stored behind an array's data."""
    with open(path, "rb") as file:
        file.seek(-len(TRAILER % 0), os.SEEK_END)
        return int(file.read().removeprefix(TRAILER[:7]), 16)


def _checksum(array: np.ndarray, path: Path) -> int:
    data, checksum = array.reshape(-1).view(np.uint8), 0
    starts = range(0, len(data), PART)
    terminal = bool(sys.stderr and sys.stderr.isatty())
    for start in tqdm(starts, f"checking {path}", delay=3, disable=not terminal):
        checksum = zlib.crc32(data[start : start + PART], checksum)
    return checksum


def save_array(
    name: str, shape: tuple[int, ...], dtype: type, batches: Iterable[np.ndarray]
) -> None:
    """Write an array, batch by batch, unless another process has written it meanwhile.

    Not through a map, for which a full disk is a signal that kills. Raises ResourceError."""
    path = PREPARED.absolute() / f"{name}.npy"
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    size = math.prod(shape) * np.dtype(dtype).itemsize

    def write(temporary: Path) -> None:
        """Write the header, the batches and the checksum of the batches."""
        if free_bytes(PREPARED) < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            checksum = 0
            for batch in batches:
                assert batch.dtype == dtype, f"{name}: a batch of {batch.dtype}"
                batch = np.ascontiguousarray(batch)
                file.write(batch)
                checksum = zlib.crc32(batch, checksum)
            file.write(TRAILER % checksum)

    try:
        PREPARED.mkdir(parents=True, exist_ok=True)
        with _lock(name) as locked:
            if load_array(path, shape, dtype) is None:
                for leftover in PREPARED.glob(f".{path.name[:50]}.*.tmp") if locked else ():
                    leftover.unlink(missing_ok=True)  # from a process that was killed
                write_atomically(path, write, needed=size)
    except OSError as error:
        raise disk_error(path, error, size) from error


@contextlib.contextmanager
def _lock(name: str) -> Iterator[bool]:
    """Let one process at a time write an array. On a disk without locks (then it yields False)
    each process writes its own copy, and the last one is kept."""
    lock = filelock.FileLock(PREPARED / f".{name}.lock")
    with contextlib.suppress(OSError, NotImplementedError):  # writing says what is wrong
        try:
            lock.acquire(timeout=2)
        except filelock.Timeout:
            say(f"another process prepares {name}; waiting for it")
            lock.acquire()
    try:
        yield lock.is_locked
    finally:
        with contextlib.suppress(OSError):  # Windows keeps files that are open
            os.unlink(lock.lock_file)
        lock.release()
