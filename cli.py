"""The command line the scripts share: flags from a dataclass, mistakes in one line, exit codes."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Sequence

import torch
import tyro

from errors import Interrupted, UsageError, UserError


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
    # tyro's answer is a box of lines; its first paragraph says what is wrong.
    inside = [line.strip("│ ").strip() for line in box.getvalue().split("\n")[1:]]
    inside = inside[: next((i for i, line in enumerate(inside) if set(line) <= set("─╰╯")), None)]
    what = " ".join(inside)
    flag = re.search(r"--[\w-]+", what)
    raise UsageError(
        flag.group().replace("-", "_").replace("__", "--", 1) if flag else "command line",
        what[:1].lower() + what[1:].rstrip("."),
        "see --help for the flags and their values",
    )


def run(main: Callable[[], object]) -> None:
    """Call a script's main and exit: 0, or the code of its error after one line on stderr."""
    try:
        main()
        code = 0
    except UserError as error:
        code = fail(str(error), error.exit_code)
    except Interrupted as stop:
        code = stop.exit_code
    except KeyboardInterrupt:
        code = 130
    except torch.OutOfMemoryError:
        fix = "halve it and double --gradient_accumulation_steps, or take a smaller --channels"
        code = fail(f"--batch_size: does not fit in the GPU's memory. Fix: {fix}", 5)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if code:
        sys.exit(code)


def fail(text: str, code: int) -> int:
    """Print the one line of an error; returns the exit code."""
    with contextlib.suppress(OSError, ValueError):
        print("error: " + " ".join(text.split()), file=sys.stderr, flush=True)
    return code
