"""The command line the scripts share: flags from a dataclass, mistakes in one line, exit codes."""

import contextlib
import io
import itertools
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Sequence

import tyro

from errors import Interrupted, OtherFailed, UsageError, UserError, is_out_of_memory
from terminal import open_streams, say


def parse(cls: type, args: Sequence[str], description: str, default: object = None):
    """The dataclass filled from flags; each field's trailing comment is its --help text.

    default: values other than the class's own. Raises UsageError for a flag that cannot be."""
    box = io.StringIO()
    options = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                cls, args=args, description=description, use_underscores=True, **options
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    # tyro's answer is a title and a box of lines; its first paragraph says what is wrong.
    lines = [line.strip("│ ").strip() for line in box.getvalue().split("\n")[1:]]
    lines = itertools.dropwhile(_is_ruler, lines)  # drawn beneath the title where all is ASCII
    what = " ".join(itertools.takewhile(lambda line: not _is_ruler(line), lines))
    flag = re.search(r"--[\w-]+", what)
    raise UsageError(
        flag.group().replace("-", "_").replace("__", "--", 1) if flag else "command line",
        what[:1].lower() + what[1:].rstrip("."),
        "see --help for the flags and their values",
    )


def _is_ruler(line: str) -> bool:
    return set(line) <= set("─╰╯-_")


def run(
    main: Callable[[], object], fix: str = "end other programs, or take a larger machine"
) -> None:
    """Call a script's main and exit: 0, or the code of its error after one line on stderr.

    fix: what to do where memory does not suffice."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # imported: back to KeyboardInterrupt
    open_streams()
    settle_environment()
    try:
        check_current_folder()
        main()
        code = 0
    except UserError as error:
        code = fail(str(error), error.exit_code)
    except (Interrupted, OtherFailed) as stop:
        code = stop.exit_code
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if is_out_of_memory(error):
            reason = " ".join(str(error).split())[:200]
            code = fail(f"memory: does not suffice ({reason}). Fix: {fix}", 5)
        elif isinstance(error, OSError):  # where nothing more can be said of it
            where, reason = str(error.filename or "the system")[:200], error.strerror or error
            code = fail(f"{where}: {reason}. Fix: check the path, its rights and `ulimit -a`", 5)
        else:
            raise
    if code:
        sys.exit(code)


def fail(text: str, code: int) -> int:
    """Print the one line of an error; returns the exit code."""
    rank = f"rank {os.environ.get('RANK')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    say(f"error: {rank}{' '.join(text.split())}", sys.stderr)
    return code


def check_current_folder() -> None:
    """Raise UsageError where it is gone: all that a command writes lies in it."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UsageError("the current folder", "was removed", "change into another one") from error


def settle_environment() -> None:
    """Take away the variables that change what the flags say, or fail long after the start."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_DYNAMO_", "ACCELERATE_GRADIENT_ACCUMULATION_")):
            del os.environ[name]
    if "MASTER_ADDR" not in os.environ:  # RANK and the like are left over: nobody launched this
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    os.environ["MPLBACKEND"] = "agg"  # plots go into files
    if shutil.get_terminal_size().columns < 60:  # tyro seeks a way to wrap words, for ever
        os.environ["COLUMNS"] = "60"
