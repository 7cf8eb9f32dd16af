"""Where text goes: a terminal, a file, a pipe, or nowhere. No run of days ends because nobody
listens: what cannot be written is dropped, what a terminal cannot show is escaped."""

import contextlib
import io
import os
import sys
from collections.abc import Sequence


class _Patient(io.FileIO):
    """A file whose writes never fail: closed pipes and full disks swallow them."""

    def write(self, data) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def open_streams() -> None:
    """Make stdout and stderr of a command such that no write to them fails, whatever they are."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would get its number, and our words
            os.open(os.devnull, os.O_RDWR)
        if name == "stdin" or stream not in (None, getattr(sys, f"__{name}__")):
            continue  # a notebook has its own streams
        # Python found it closed at its start: if it is open now, it is somebody's file.
        raw = _Patient(os.devnull if stream is None else number, "w", closefd=stream is None)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        setattr(sys, name, io.TextIOWrapper(raw, encoding, "backslashreplace", write_through=True))


def say(text: str, file=None) -> None:
    """Print a line where somebody may read it; on stdout only rank 0 of several processes does."""
    if file is None and os.environ.get("RANK", "0") != "0":
        return
    with contextlib.suppress(OSError, ValueError):
        print(text, file=file or sys.stdout, flush=True)


def warn(text: str) -> None:
    """Say on stderr what is not as it should be, though it ends nothing."""
    say(f"warning: {text}", sys.stderr)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's markdown: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(columns), line(rules), *map(line, rows)])
