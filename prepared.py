"""Arrays on the disk, in `prepared/`: written once, whole or not at all, and mapped ever after."""

import contextlib
import errno
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import filelock
import numpy as np
from tqdm import tqdm

from files import disk_error, free_bytes, write_atomically

PREPARED = Path("prepared")  # in the current folder; may be deleted


def prepare(key: str, shape: tuple[int, ...], images: Iterable[np.ndarray]) -> np.ndarray:
    """Map the array of this key, (N, S, S, 3) uint8; where it is not there, write it first.

    images: yields all of it, (n, S, S, 3) at a time. Raises ResourceError where the disk cannot
    hold it. Processes that ask for the same array wait for the one that writes it."""
    path = PREPARED / f"{key}.npy"
    if (array := load_array(path, shape)) is not None:
        return array

    def batches() -> Iterator[np.ndarray]:
        print(f"preparing {shape[0]:,} faces once, for {path}", file=sys.stderr)
        terminal = sys.stderr.isatty()
        with tqdm(total=shape[0], unit=" faces", desc="preparing", disable=not terminal) as bar:
            for batch in images:
                yield batch
                bar.update(len(batch))
        print(f"prepared {shape[0]:,} faces", file=sys.stderr)

    save_array(key, shape, np.uint8, batches())
    array = load_array(path, shape)
    assert array is not None, f"{path} is not of the shape {shape}"
    return array


def load_array(path: Path, shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray | None:
    """Map the array of a file, or return None where that is not just what was once written."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    whole = path.stat().st_size == array.offset + array.nbytes
    return array if whole and array.shape == shape and array.dtype == dtype else None


def save_array(
    name: str, shape: tuple[int, ...], dtype: type, batches: Iterable[np.ndarray]
) -> None:
    """Write an array, batch by batch, unless another process has written it meanwhile.

    Not through a map: there a full disk is a signal that kills. Raises ResourceError."""
    path = PREPARED.absolute() / f"{name}.npy"
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    size = math.prod(shape) * np.dtype(dtype).itemsize

    def write(temporary: Path) -> None:
        if free_bytes(PREPARED) < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for batch in batches:
                file.write(batch)

    try:
        PREPARED.mkdir(parents=True, exist_ok=True)
        lock = PREPARED / f".{name}.lock"
        with filelock.FileLock(lock):
            for leftover in PREPARED.glob(f".{path.name}.*.tmp"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
            try:
                if load_array(path, shape, dtype) is None:
                    write_atomically(path, write, needed=size)
            finally:
                with contextlib.suppress(OSError):  # some systems keep what is open
                    lock.unlink()
    except OSError as error:
        raise disk_error(path, error, size) from error
