"""Errors that are for people."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user can mend: what was found, where, what was expected, what to do.

    The command prints its text alone, in one line, without a traceback."""


class TrainingDiverged(UserError):
    """A loss or a gradient stopped being a finite number; training must not go on from here."""


class Waiting(UserError):
    """A person has to do something before the work can go on; the message says what."""


class Interrupted(UserError):
    """The user pressed Ctrl-C, and what was reached is on disk."""


def users_mistake(error: BaseException | None) -> UserError | None:
    """The ``UserError`` that an exception is or came from: Hydra wraps what a constructor raises."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error
