"""What a user reads when something goes wrong: one line, and an exit code a script can test.

Modules raise these exceptions; only `main()` of a script turns them into the line and the code:

    0 done   2 usage   3 data   4 checkpoint   5 resources   6 diverged   130, 143 interrupted
"""

import errno


class UserError(Exception):
    """A mistake or a misfortune that the user can mend.

    where: the path or the flag; what: what is wrong with it; fix: what to do."""

    exit_code = 2

    def __init__(self, where: object, what: str, fix: str):
        super().__init__(f"{where}: {what}. Fix: {fix}")
        self.what, self.fix = what, fix


class UsageError(UserError):
    """A flag or a constant that cannot be."""


class DataError(UserError):
    """Images or attributes that are missing or damaged."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another network."""

    exit_code = 4


class FormatError(CheckpointError):
    """A good checkpoint that another version of this program can read."""


class ResourceError(UserError):
    """No disk, no memory."""

    exit_code = 5


class DivergedError(UserError):
    """The training has left the finite numbers."""

    exit_code = 6


# What torch says where memory does not suffice, on a CPU or a GPU, or could on no machine.
OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "std::bad_alloc")
OUT_OF_MEMORY += ("could not create a primitive", "can't start new thread")  # oneDNN, Python
OUT_OF_MEMORY += ("calculation overflowed", "multiplication overflow", "Invalid buffer size")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, numpy or torch says that memory does not suffice."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    return said or isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM


class Interrupted(BaseException):
    """A signal stopped the run, after it had saved. Not an Exception, as KeyboardInterrupt is not:
    code that catches any failure, to try something else, must not catch this."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by signal {signal_number}")
        self.exit_code = 128 + signal_number


class OtherFailed(BaseException):
    """Another process of the run prints the error; this one exits without a message."""

    exit_code = 5
