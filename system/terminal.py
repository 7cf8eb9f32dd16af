"""Output to a terminal, a file, a pipe, or nowhere. A failed write never ends a run: text that
cannot be written is dropped, and characters that a terminal cannot show are escaped."""

import contextlib
import io
import os
import sys
from collections.abc import Sequence


class _Patient(io.FileIO):
    """A file whose writes never fail, even to a closed pipe or a full disk."""

    def write(self, data) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def open_streams() -> None:
    """Replace stdout and stderr of a command by streams whose writes never fail."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        try:
            os.fstat(number)
        except OSError:  # closed: the next file to be opened would get this number, and our output
            os.open(os.devnull, os.O_RDWR)
        if name == "stdin" or stream not in (None, getattr(sys, f"__{name}__")):
            continue  # a notebook has its own streams
        # None: it was closed when Python started. If the number is open now, it is another file.
        raw = _Patient(os.devnull if stream is None else number, "w", closefd=stream is None)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        setattr(sys, name, io.TextIOWrapper(raw, encoding, "backslashreplace", write_through=True))


def say(text: str, file=None) -> None:
    """Print a line; of several processes, only rank 0 prints to stdout."""
    if file is None and os.environ.get("RANK", "0") != "0":
        return
    with contextlib.suppress(OSError, ValueError):
        print(text, file=file or sys.stdout, flush=True)


def warn(text: str) -> None:
    """Print a warning to stderr."""
    say(f"warning: {text}", sys.stderr)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table: the first column is aligned left, the others right."""
    widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(columns), line(rules), *map(line, rows)])
