"""Errors, and lines on the terminal."""

from __future__ import annotations

import os
import re
from functools import cache

from lit_rlhf.processes import NoNumber, is_main_process

# user:password@ of an address, or a key in its query.
CREDENTIALS = re.compile(
    r"(?<=://)(?:[^\s/?#@:]*:(?!\d+[/?#])[^\s@]*|[^\s/?#@]+)@"
    r"|(?<=[?&#])[\w.-]*(?:key|token|secret|password|passwd|pwd|auth|sig|signature|credential)=[^\s&#'\"]+",
    re.IGNORECASE,
)
SECRET_NAMES = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)  # of environment variables


def scrubbed(text: str, *secrets: str) -> str:
    """Text without ``secrets``, values of the environment's keys and tokens, and credentials in addresses.

    What is shorter than 8 characters ("EMPTY", for a server that asks for no key) is no secret."""
    named = [value for name, value in os.environ.items() if SECRET_NAMES.search(name)]
    for secret in sorted({*named, *secrets}, key=len, reverse=True):
        text = text.replace(secret, "[secret]") if len(secret) >= 8 else text
    return CREDENTIALS.sub("[secret]", text)


UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls, but tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of what follows
    "\u2028\u2029\ud800-\udfff]"  # separators; halves of a surrogate pair, which UTF-8 does not know
)


def printable(text: str) -> str:
    """Text in which every character can be seen (an escape as ``\\x1b``): none tells a terminal what to do."""
    return UNPRINTABLE.sub(lambda m: ascii(m[0])[1:-1], text)


class UserError(ValueError):
    """Something that the user can fix: what was found, where, what was expected, what to do.

    The command prints its text alone, in one line, without a traceback. It holds no secrets."""

    def __init__(self, message: object) -> None:
        super().__init__(scrubbed(str(message)))


class TrainingDiverged(UserError):
    """A loss or a gradient stopped being a finite number; training must not go on from here."""


class NotFinite(TrainingDiverged):
    """A tensor that holds NaN or infinity: which one. Where a trainer is at work,
    :class:`lit_rlhf.training.StopOnNonFinite` adds at which step, and what is kept."""


class Waiting(UserError):
    """A person has to do something before the work can go on; the message says what."""


class Pruned(UserError):
    """A trial of a study that its pruner ended, for it is behind others; the message says how far."""


class NoFigure(UserError):
    """A figure that is asked for is none of those that the work ends with."""


class Interrupted(UserError):
    """A signal (Ctrl-C is one) ended the work, and what was reached is on disk: the same command goes on."""

    def __init__(self, message: str, signal: int | None = None) -> None:
        super().__init__(message)
        self.signal = signal


STOPPED = 75  # exit code then, as sysexits.h has it for what may be tried again (EX_TEMPFAIL)


def users_mistake(error: BaseException | None) -> UserError | None:
    """The ``UserError`` that an exception is or came from: Hydra wraps what a constructor raises."""
    while error is not None and not isinstance(error, UserError | NoNumber):
        error = error.__cause__ or error.__context__
    return UserError(error) if isinstance(error, NoNumber) else error


def say(line: str) -> None:
    """Print a line that the user should read, once, however many processes there are."""
    if is_main_process():
        print(line, flush=True)


@cache
def say_once(line: str) -> None:
    """Print a line that was not printed before: once per process."""
    say(line)


def say_hub(path: str) -> None:
    """Say, before minutes of attempts, that a path is nothing here and is therefore asked of the Hub."""
    say_once(f"{path}: no such file or folder here; asking the Hugging Face Hub for it")


def first_line(error: Exception) -> str:
    """First line of another library's error, for a message of one line; its name where it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0][:200] if said else type(error).__name__
