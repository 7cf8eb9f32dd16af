"""Constants as fields of a dataclass, and the commands' command lines made from them.

    @dataclass(frozen=True)
    class Config:
        # Training
        seed: int = fixed(0, least=0)  # for everything random
        learning_rate: float = steered(2e-4, above=0)  # peak learning rate
        save_every: int = free(5000, least=1)  # steps between two checkpoints

The trailing comment is the flag's --help text; the comment above a group of fields is its title.
`fixed`, `steered` and `free` say what a resumed run may do with a constant.
"""

import inspect
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import Field, field, fields, make_dataclass, replace
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from system.errors import Interrupted, OtherFailed, UsageError, UserError, is_out_of_memory
from system.terminal import open_streams, say

# The bounds of a range, in words, in the order in which a sentence names them.
BOUNDS = {
    "least": ("from", lambda number, bound: number >= bound),
    "above": ("above", lambda number, bound: number > bound),
    "below": ("to below", lambda number, bound: number < bound),
    "most": ("to", lambda number, bound: number <= bound),
}
LARGEST = 2**63  # torch and numpy hold whole numbers in 64 bits


# Constants ----------------------------------------------------------------------------------------


def constant(default: Any, **about: Any) -> Any:
    """A field of a dataclass of flags.

    about: its range, as `least` and `most` (inclusive) or `above` and `below` (exclusive). The
    range of a tuple applies to each element."""
    return field(default=default, metadata=about)


def free(default: Any, **about: Any) -> Any:
    """A constant that a resumed run may change, because it does not change what is computed."""
    return constant(default, resume="free", **about)


def steered(default: Any, **about: Any) -> Any:
    """A constant that a resumed run may change with a warning: the results change from there on."""
    return constant(default, resume="steered", **about)


def fixed(default: Any, **about: Any) -> Any:
    """A constant that a resumed run keeps: another value would make it a different run."""
    return constant(default, resume="fixed", **about)


def resume_rule(about: Field) -> str:
    """What a resumed run may do with a constant: "free", "steered" or "fixed"."""
    return about.metadata["resume"]


def check_ranges(config: Any) -> None:
    """Raise UsageError, naming the flag, for a constant of a wrong type or out of its range."""
    for about in fields(config):
        value = getattr(config, about.name)
        values = value if isinstance(value, tuple | list) else [value]
        good = _is_a(about.type, value) and all(_inside(about, each) for each in values)
        if not good:
            shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:60]}..."
            raise UsageError(f"--{about.name}", f"is {shown}", f"give {_allowed(about)}")


def _is_a(kind: Any, value: Any) -> bool:
    """Whether a value has the type of a field; numpy's numbers, for example, do not."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple | list) and all(_is_a(get_args(kind)[0], v) for v in value)
    if isinstance(kind, UnionType):
        return any(_is_a(each, value) for each in get_args(kind))
    return type(value) is kind or kind is float and type(value) is int


def _bounds(about: Field) -> dict[str, float]:
    return {name: about.metadata[name] for name in BOUNDS if name in about.metadata}


def _inside(about: Field, value: Any) -> bool:
    if isinstance(value, str):
        return "\0" not in value
    if not isinstance(value, int | float):
        return True
    holds = (BOUNDS[name][1](value, bound) for name, bound in _bounds(about).items())
    return abs(value) < LARGEST and all(holds)  # false for nan and inf, too


def _allowed(about: Field) -> str:
    """The values of a constant in words: "a whole number from 1"."""
    if get_origin(about.type) is Literal:
        return "one of " + ", ".join(get_args(about.type))
    several = get_origin(about.type) is tuple
    kind = get_args(about.type)[0] if several else about.type
    words = {int: "whole number", float: "number", str: "text", bool: "truth value"}
    word = words.get(kind, "number")
    bounds = [f"{BOUNDS[name][0]} {bound:g}" for name, bound in _bounds(about).items()]
    return " ".join([f"{word}s" if several else f"a {word}", *bounds])


# The command line ---------------------------------------------------------------------------------


def parse(
    cls: type,
    args: Sequence[str],
    description: str,
    presets: dict[str, tuple[str, dict]] | None = None,
) -> Any:
    """Fill the dataclass from flags.

    presets: flags that change several defaults at once, {name: (help text, {constant: value})}.
    Another flag beside a preset wins over it. Exits with code 2 and tyro's message for a flag that
    does not exist or does not parse."""
    import tyro  # slow to import

    presets = presets or {}
    default = cls()
    for name, (_, values) in presets.items():
        if f"--{name}" in args:
            default = replace(default, **values)
    switches = [_flag(name, bool, text, False) for name, (text, _) in presets.items()]
    groups = [
        (title.lower(), make_dataclass(title, flags))
        for title, flags in _groups(default, switches).items()
    ]
    every = make_dataclass(
        "Flags", [(n, group, field(default_factory=group)) for n, group in groups]
    )
    options = dict(use_underscores=True, config=(tyro.conf.OmitArgPrefixes,))
    given = tyro.cli(every, args=args, description=description, **options)
    values = {key: value for name, _ in groups for key, value in vars(getattr(given, name)).items()}
    return cls(**{key: value for key, value in values.items() if key not in presets})


def given(cls: type, args: Sequence[str]) -> frozenset[str]:
    """The fields of the dataclass that flags in `args` set."""
    flags = [arg.split("=")[0] for arg in args if arg.startswith("--")]
    names = {re.sub(r"^--(no[-_])?", "", flag).replace("-", "_") for flag in flags}
    return frozenset(about.name for about in fields(cls) if about.name in names)


def as_flags(values: dict[str, Any]) -> str:
    """Constants as one would type them in a shell."""
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple | list) else [value])]
    return shlex.join(words)


def _groups(default: Any, switches: list) -> dict[str, list]:
    """The fields of a dataclass by the comment above them, with `switches` in front."""
    groups: dict[str, list] = {}
    title, types = "Options", {about.name: about.type for about in fields(default)}
    pattern = r"^    (?:# (\w+)|(\w+): .*?  # (.*))$"
    for heading, name, text in re.findall(pattern, inspect.getsource(type(default)), re.MULTILINE):
        title = heading or title
        if name:
            flag = _flag(name, types[name], text, getattr(default, name))
            groups.setdefault(title, [] if groups else [*switches]).append(flag)
    found = {flag[0] for flags in groups.values() for flag in flags}
    lost = types.keys() - found
    assert not lost, f"{', '.join(lost)}: a field takes one line, with its comment"
    return groups


def _flag(name: str, type_: Any, text: str, value: Any) -> tuple:
    import tyro

    words = " ".join(map(str, value)) if isinstance(value, tuple) else value
    hint = "" if value is False or words in ("", None) else f"(default: {words})"
    about = tyro.conf.arg(help=text, help_behavior_hint=hint)
    return name, Annotated[type_, about], field(default=value)


def run(
    main: Callable[[], object], fix: str = "close other programs, or use a larger machine"
) -> None:
    """Call a script's main and exit: 0, or the code of its error after one line on stderr.

    fix: what to do when memory runs out."""
    open_streams()
    settle_environment()
    threading.excepthook = lambda _: None  # TensorBoard's thread: the log says what failed
    try:
        os.getcwd()  # everything that a command writes goes there
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
            code = fail(f"memory: not enough ({reason}). Fix: {fix}", 5)
        elif isinstance(error, OSError):  # nothing more specific is known
            where, reason = str(error.filename or "the system")[:200], error.strerror or error
            fix = "check the path, its permissions and `ulimit -a`"
            code = fail(f"{where}: {reason}. Fix: {fix}", 5)
        else:
            raise
    if code:
        sys.exit(code)


def fail(text: str, code: int) -> int:
    """Print an error as one line; returns the exit code."""
    rank = f"rank {os.environ.get('RANK')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    say(f"error: {rank}{' '.join(text.split())}", sys.stderr)
    return code


def settle_environment() -> None:
    """Remove environment variables that would override the flags or fail long after the start."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_DYNAMO_", "ACCELERATE_GRADIENT_ACCUMULATION_")):
            del os.environ[name]
    if "MASTER_ADDR" not in os.environ:  # left over from another launcher
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    os.environ["MPLBACKEND"] = "agg"  # plots go into files
