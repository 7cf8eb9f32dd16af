"""Arrays on the disk, in `prepared/`: written once, whole or not at all, and mapped ever after.

Each is a .npy file with a checksum of its data behind them, which is compared at every start.
"""

import contextlib
import errno
import math
import os
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import filelock
import numpy as np
from tqdm import tqdm

from system.errors import DataError
from system.files import disk_error, free_bytes, write_atomically
from system.terminal import say, warn

PREPARED = Path("prepared")  # in the current folder; may be deleted
TRAILER = b"\ncrc32 %08x\n"  # what stands behind the data
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
PART = 1 << 26  # bytes that are compared at a time


def prepare(
    key: str, shape: tuple[int, ...], images: Iterable[np.ndarray]
) -> tuple[np.ndarray, int]:
    """Map the array of this key, (N, S, S, 3) uint8, and return it with its checksum. Where it is
    not there, or damaged, it is written first.

    images: yields all of it, (n, S, S, 3) at a time. Raises ResourceError where the disk cannot
    hold it. Processes that ask for the same array wait for the one that writes it."""
    path = PREPARED / f"{key}.npy"
    array = load_array(path, shape)
    if array is None:
        if path.exists():
            warn(f"{path} is damaged, or of an older version; it is made anew")
        save_array(key, shape, np.uint8, _show(images, shape[0], path))
        array = load_array(path, shape)
        assert array is not None, f"{path} is not of the shape {shape}"
    return array, read_checksum(path)


def _show(images: Iterable[np.ndarray], count: int, path: Path) -> Iterator[np.ndarray]:
    """Yield the images, and say how many are done."""
    say(f"preparing {count:,} faces once, for {path}")
    terminal = bool(sys.stderr and sys.stderr.isatty())
    with tqdm(total=count, unit=" faces", desc="preparing", disable=not terminal) as bar:
        for batch in images:
            yield batch
            bar.update(len(batch))
    say(f"prepared {count:,} faces")


def load_array(path: Path, shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray | None:
    """Map the array of a file, or return None where that is not just what was once written."""
    if not path.is_file():  # a pipe in its place would be waited for
        return None
    try:
        array = np.load(path, mmap_mode="r")
        written, size = read_checksum(path), path.stat().st_size
    except Exception:  # on a damaged header numpy raises nearly anything
        return None
    good = (
        isinstance(array, np.memmap)
        and array.flags.c_contiguous
        and (array.shape, array.dtype) == (shape, np.dtype(dtype))
        and size == array.offset + array.nbytes + len(TRAILER % 0)
        and written == _checksum(array, path)
    )
    return array if good else None


def read_checksum(path: Path) -> int:
    """The checksum behind an array's data, of which it says that they are as they were written."""
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


def check_not_cut(array: np.ndarray) -> None:
    """Raise DataError where the file of a mapped array has become shorter than the array: to read
    beyond its end would be a signal that kills."""
    if isinstance(array, np.memmap) and array.base.size() < array.offset + array.nbytes:
        fix = "start again with --resume, and it is prepared anew"
        raise DataError(array.filename, "was cut while it was in use", fix)


def save_array(
    name: str, shape: tuple[int, ...], dtype: type, batches: Iterable[np.ndarray]
) -> None:
    """Write an array, batch by batch, unless another process has written it meanwhile.

    Not through a map: there a full disk is a signal that kills. Raises ResourceError."""
    path = PREPARED.absolute() / f"{name}.npy"
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    size = math.prod(shape) * np.dtype(dtype).itemsize

    def write(temporary: Path) -> None:
        """The header, the batches, the checksum of them all."""
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
            for leftover in PREPARED.glob(f".{path.name[:50]}.*.tmp") if locked else ():
                leftover.unlink(missing_ok=True)  # of a process that was killed
            if load_array(path, shape, dtype) is None:
                write_atomically(path, write, needed=size)
    except OSError as error:
        raise disk_error(path, error, size) from error


@contextlib.contextmanager
def _lock(name: str) -> Iterator[bool]:
    """One process at a time; where the disk knows no locks, as many as there are. Yields which."""
    path = PREPARED / f".{name}.lock"
    lock = filelock.FileLock(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that another kind of lock is used
            try:
                lock.acquire(timeout=2)
            except filelock.Timeout:
                say(f"another process prepares {name}; waiting for it")
                lock.acquire()
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield lock.is_locked
    finally:
        with contextlib.suppress(OSError):  # some systems keep what is open
            path.unlink()
        lock.release()
