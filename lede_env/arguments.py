"""What callers hand in: checks by type, and how a program ends where one fails."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

from lede_env.errors import LedeError


def whole_number(name: str, value: Any) -> int:
    """The value as an int, numpy's as well; a LedeError if it is none. True and False are none."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise LedeError(f"{name}={value!r} must be a whole number")


def number(name: str, value: Any) -> float:
    """The value as a float, numpy's as well; a LedeError if it is no real number. True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise LedeError(f"{name}={value!r} must be a number")
    return float(value)


def check_text(text: str, what: str) -> None:
    """Refuse what has no UTF-8 form: half a surrogate pair, which Python makes of arguments that are not UTF-8 and
    JSON of escapes like \\ud83d. No tokenizer takes it.

    Raises:
        LedeError: names `what` and the place.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LedeError(
            f"{what} is not Unicode text: {text[error.start]!r} at character {error.start}; write it in UTF-8"
        ) from error


@contextmanager
def clear_errors() -> Iterator[None]:
    """Bad input ends the program with one clear line and exit status 2."""
    try:
        for argument in sys.argv[1:]:
            check_text(argument, f"the argument {argument!r}")
        yield
    except LedeError as error:
        _complain(" ".join(str(error).split()))  # one line
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that is not there: the message names the path
        _complain(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _complain(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble(("error:", "bold red"), " ", message)  # a Text: no part of it is taken for markup
    Console(stderr=True).print(line, highlight=False, soft_wrap=True)
