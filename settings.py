"""What a constant says about itself where it is defined: its range, and what a resumed run may do.

    @dataclass(frozen=True)
    class Config:
        seed: int = fixed(0, least=0)             # of everything random
        learning_rate: float = steered(2e-4, above=0)  # of AdamW, at its highest
        save_every: int = free(5000, least=1)     # steps between two checkpoints
        ema_warmup: bool = fixed(True, before=False)  # older checkpoints lack it: False there

The trailing comment is the flag's --help text and its line in docs/constants.md.
"""

import inspect
import math
import re
from dataclasses import Field, field, fields, replace
from typing import Any, Literal, get_args, get_origin

from errors import UsageError

# The bounds of a range, in words; their order is that of the sentence.
BOUNDS = {
    "least": ("from", lambda number, bound: number >= bound),
    "above": ("above", lambda number, bound: number > bound),
    "below": ("to below", lambda number, bound: number < bound),
    "most": ("to", lambda number, bound: number <= bound),
}


# Whole numbers stay below it, as torch and numpy hold them in 64 bits.
LARGEST = 2**63

# What the table says of a constant that is ... when a run is resumed.
KEPT = {"fixed": "stays", "free": "may change", "steered": "may change, with a note"}


def constant(default: Any, **about: Any) -> Any:
    """A field of a dataclass of flags.

    about: its range by `least`, `most` (allowed themselves), `above` and `below` (not allowed); for
    a tuple that of each element."""
    return field(default=default, metadata=about)


def free(default: Any, **about: Any) -> Any:
    """A constant that a resumed run may change: it says how a run goes on, not what it computes.

    about, here and below: its range, as for `constant`; and `before`, what it is for a run that
    began when the constant did not exist or had another default, where that is not the default of
    today. The networks' constructors must have it as their default."""
    return constant(default, resume="free", **about)


def steered(default: Any, **about: Any) -> Any:
    """A constant by which a run may be steered when it is resumed: after it has diverged, say. From
    that step on it is another run than it was, which a note says."""
    return constant(default, resume="steered", **about)


def fixed(default: Any, **about: Any) -> Any:
    """A constant that a resumed run keeps: another value would make it another run."""
    return constant(default, resume="fixed", **about)


def before(about: Field) -> Any:
    """What a checkpoint that lacks this constant means."""
    return about.metadata.get("before", about.default)


# Ranges ------------------------------------------------------------------------------------------


def check_ranges(config: Any) -> None:
    """Raise UsageError, naming the flag, for a constant out of its range or not of its choices."""
    for about in fields(config):
        value = getattr(config, about.name)
        if get_origin(about.type) is Literal:
            choices = get_args(about.type)
            allowed, good = "one of " + ", ".join(choices), value in choices
        else:
            numbers = value if isinstance(value, tuple | list) else [value]
            allowed, good = _range(about), all(_inside(about, number) for number in numbers)
            if any(isinstance(text, str) and "\0" in text for text in numbers):
                allowed, good = "a text without NUL", False
            if any(isinstance(number, int) and number >= LARGEST for number in numbers):
                allowed += " to below 2**63"
        if not good:
            shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:60]}..."
            raise UsageError(f"--{about.name}", f"is {shown}", f"give {allowed}")


def _bounds(about: Field) -> dict[str, float]:
    return {name: about.metadata[name] for name in BOUNDS if name in about.metadata}


def _inside(about: Field, value: Any) -> bool:
    if not isinstance(value, int | float):
        return True
    if isinstance(value, int) and abs(value) >= LARGEST:
        return False
    holds = (BOUNDS[name][1](value, bound) for name, bound in _bounds(about).items())
    return math.isfinite(value) and all(holds)


def _range(about: Field) -> str:
    """The range of a constant in words: "a whole number from 1"."""
    number = "whole number" if about.type in (int, tuple[int, ...]) else "number"
    text = f"{number}s" if get_origin(about.type) is tuple else f"a {number}"
    return " ".join([text, *(f"{BOUNDS[name][0]} {b}" for name, b in _bounds(about).items())])


# Resuming ----------------------------------------------------------------------------------------


def fill(config: Any, saved: dict) -> tuple[Any, dict[str, Any]]:
    """The config with which a checkpoint's run goes on, where the run is older than some of the
    constants or their defaults: each of those that is left at its default stays what it was.

    saved: the checkpoint's settings. Returns the config, and what was filled in."""
    filled = {}
    for about in fields(config):
        untouched = getattr(config, about.name) == about.default
        was = saved.get(about.name, before(about))
        if untouched and was == before(about) != about.default:
            filled[about.name] = was
    return replace(config, **filled), filled


def changes(config: Any, saved: dict) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """The constants that differ from a checkpoint's settings: those that may, those that may not.

    Returns two dictionaries of name: (was, is)."""
    allowed, refused = {}, {}
    for about in fields(config):
        pair = saved.get(about.name, before(about)), getattr(config, about.name)
        if pair[0] != pair[1]:
            (refused if _is_fixed(about) else allowed)[about.name] = pair
    return allowed, refused


def is_steered(config: Any, name: str) -> bool:
    """Whether the run goes another way where this constant changes."""
    return type(config).__dataclass_fields__[name].metadata.get("resume") == "steered"


def _is_fixed(about: Field) -> bool:
    return about.metadata.get("resume") == "fixed"


# The table in docs/constants.md -------------------------------------------------------------------


def markdown(cls: type) -> str:
    """The constants as a table in GitHub's markdown, for docs/constants.md.

    python -c "import settings, train; print(settings.markdown(train.Config))"
    """
    rows = ["| flag | default | with `--resume` | meaning |", "| --- | --- | --- | --- |"]
    meanings = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
    for about in fields(cls):
        value = about.default
        text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        default = f"`{text}`" if text else ""
        kept = KEPT[about.metadata["resume"]]
        rows.append(f"| `--{about.name}` | {default} | {kept} | {meanings[about.name]} |")
    return "\n".join(rows)
