"""How a command ends that cannot go on: with one line, whatever happened."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException

from lit_rlhf.errors import UserError, scrubbed, users_mistake
from lit_rlhf.processes import NoNumber, is_main_process, this_process

DEBUG = "LIT_RLHF_DEBUG"  # set in the environment to 1, it has the traceback printed
MISTAKE, UNEXPECTED, STOPPED_BY_HAND = 2, 1, 130  # exit codes; for a signal's see lit_rlhf.errors.STOPPED


FIRST_SAID = ".first-said"  # in the run's folder
PARENT = os.getppid()


def parent_gone() -> bool:
    """Whether the process that has started this one has ended."""
    return os.getppid() != PARENT


def fail(said: Any, code: int = MISTAKE) -> NoReturn:
    """One line for the user, no traceback; of several processes the first one says it, or where that has been killed,
    which had started the others, the second. Before they have met, the first one of each node says it."""
    who = ""
    with suppress(NoNumber):  # of what the environment says of this process, which is what is said then
        here = this_process()
        if here.rank > 0 and not (here.rank == 1 and parent_gone()):
            time.sleep(3)  # a launcher ends the first process when it sees another one end
            if here.local_rank > 0 if not _met else not (here.rank == 1 and _first_is_gone()):
                sys.exit(code)
            who = "" if _met else f"process {here.rank}: "
    print(f"lit-rlhf: {who}{one_line(said)}", file=sys.stderr, flush=True)
    sys.exit(code)


def first_will_say() -> None:
    """Let the others know that this process, the first one, says why they end."""
    for said, _ in _met:
        with suppress(OSError):
            said.touch()


# Once this process has met the others: the file by which the first one says that it will tell why they end, and whether
# that one listens
_met: list[tuple[Path, Callable[[], bool]]] = []


def _first_is_gone() -> bool:
    """Whether the first process is there no more, and has not said why."""
    return any(not said.exists() and not listens() for said, listens in _met)


def others_met(run: Path, first_listens: Callable[[], bool]) -> None:
    """Leave it to the first process to say why this one ends, as long as it is there; the second one sees by
    ``first_listens`` and the ``run``'s folder whether it went without a word."""
    said = run / FIRST_SAID
    if is_main_process():
        with suppress(OSError):
            said.unlink(missing_ok=True)
    _met[:] = [(said, first_listens)]


def fail_for(error: BaseException, run: Path | None = None) -> NoReturn:
    """End the command for what was raised; ``run``: the folder whose ``error.log`` takes the traceback of what nobody
    expected."""
    if os.environ.get(DEBUG) == "1":
        print(scrubbed("".join(traceback.format_exception(error))), file=sys.stderr)
    if isinstance(error, BrokenPipeError):  # `lit-rlhf --help | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the interpreter complains when it flushes
    said = reason(error)
    how = "" if re.search("hydra[./]sweep", said) else going_on()  # what is to be done about the sweep is said
    fail(f"{said}{kept_traceback(error, run)}{how}", code_of(error))


_sweeps: list[str] = []  # folders of those that this process has begun


def sweep_begins(folder: str) -> None:
    """Let what ends this command say how to go on with its sweep."""
    _sweeps.append(folder)


def going_on(sweep: str | None = None) -> str:
    """How to go on with a sweep, the one that this process has begun; nothing where there is none."""
    folder = sweep or next(iter(_sweeps), None)
    return f"; to go on, add hydra.sweep.dir={folder} to the same command" if folder else ""


def stopped_line(sweep: str | None = None) -> str:
    """Last line of a command that was stopped; ``sweep``: the folder of the one that it is a job of."""
    kept = "stopped; what was finished is kept. Run the same command again to go on"
    return f"sweep ended{how}" if (how := going_on(sweep)) else kept


def code_of(error: BaseException) -> int:
    """Exit code: whether the user can do something about it."""
    theirs = users_mistake(error) or isinstance(error, OSError | HydraException | OmegaConfBaseException)
    return MISTAKE if theirs else UNEXPECTED


@contextmanager
def of_stage(name: str) -> Iterator[None]:
    """Within it a mistake that speaks of settings of ``<stage>`` gets the stage's name."""
    try:
        yield
    except UserError as error:
        error.args = tuple(str(said).replace("<stage>", name) for said in error.args)
        raise


def _out_of_memory(error: BaseException | None) -> BaseException | None:
    """``error``, or what it came from, where that is memory that ran out: files are read into memory, too."""
    while error is not None:
        known = re.search("can(?:'|no)t allocate memory|out of memory", str(error), re.IGNORECASE)
        if isinstance(error, MemoryError) or (known and not isinstance(error, UserError)):
            return error
        error = error.__cause__
    return None


def reason(error: BaseException) -> str:
    """An exception as one line."""
    if (memory := _out_of_memory(error)) is not None:
        said = f" ({shortened(memory, 200)})" if str(memory) else ""
        return f"memory ran out{said}; stage=plan says what a stage takes, and docs/memory.md what needs less"
    if mistake := users_mistake(error):
        return one_line(mistake)
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, OSError):
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        files = " and ".join(shortened(name, 120) for name in (error.filename, error.filename2) if name is not None)
        return f"{_too_long(error)}{files}: {error.strerror}" if files else error.strerror
    if isinstance(error, HydraException | OmegaConfBaseException):
        text = str(error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error)
        where = [f"{line.strip()[9:].strip()}:" for line in str(error).splitlines() if "full_key:" in line][:1]
        kept = [line for line in text.splitlines() if not re.match(r"\s*(full_key:|object_type=|See )", line)]
        return shortened(" ".join([*where, *kept]))
    return f"unexpected {type(error).__name__}: {shortened(error)}"


def _too_long(error: OSError) -> str:
    """The setting that gave a file its name, where that is too long for the file system."""
    if error.errno != errno.ENAMETOOLONG:
        return ""
    part = max(Path(os.fsdecode(error.filename)).parts, key=len)
    return next((f"{asked.partition('=')[0]}: " for asked in sys.argv[1:] if part in asked), "")


def kept_traceback(error: BaseException, run: Path | None) -> str:
    """Write down where an unexpected error came from, and say where that stands; nothing for what says it all."""
    if users_mistake(error):
        return ""
    how = f"{DEBUG}=1 prints where it happened"
    if run is None:
        return f" ({how})"
    file = run / "error.log"
    try:
        run.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as log:
            log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {scrubbed(' '.join(sys.argv))}\n")
            log.write(scrubbed("".join(traceback.format_exception(error))))
    except (OSError, ValueError):  # a full disk may be what happened
        return f" ({how})"
    return f" (where it happened: {file})"


def one_line(said: Any) -> str:
    """A text without line breaks, secrets, and characters that a terminal obeys or cannot show."""
    text = scrubbed(" ".join(str(said).split()))
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shortened(said: Any, length: int = 600) -> str:
    """The beginning of a text, in one line."""
    text = one_line(said)
    return text if len(text) <= length else f"{text[: length - 3]}..."
