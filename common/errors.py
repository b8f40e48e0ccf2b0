"""Errors that a user can act on, and how a script ends with them."""

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESUME_HINT = "The same command with `--resume_from_checkpoint latest` continues from the last complete checkpoint."

GRACE = 10.0  # seconds in which a launcher that has seen one of several processes end also stops the others
LOST = re.compile(r"closed by peer|reset by peer|remote process exited")  # gloo and NCCL: another process has ended


class InputError(Exception):
    """Something that the user gave cannot be used; the message names it and says what to do."""


class Terminated(BaseException):
    """SIGTERM came, as from a job scheduler."""


def raise_terminated(*_: Any) -> None:
    """A handler of SIGTERM."""
    raise Terminated


def printable(text: str) -> str:
    """The text with what a terminal would obey as escapes: control characters, reversed writing, half surrogates."""
    commands = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(commands, lambda found: found[0].encode("unicode_escape").decode(), text)


@contextmanager
def cli_errors(how_to_continue: str = "") -> Iterator[None]:
    """Ends the program with one paragraph instead of a traceback, for errors that are not bugs.

    Exit codes: 2 for bad input, a full disk or missing permissions; 1 for a run that diverged; 130 for Ctrl-C, 143 for
    SIGTERM. how_to_continue: a sentence for a user whose run was interrupted.
    Of several processes one speaks: the first, where it fails itself, else the one that does. The others give the
    launcher the time to stop them.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    others_may_speak = several and os.environ.get("RANK", "0") != "0"
    signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    except InputError as error:
        message, code = f"error: {error}", 2
    except FloatingPointError as error:  # a diverged run
        message, code = f"error: {error}", 1
    except (KeyboardInterrupt, Terminated) as error:
        how, code = ("SIGTERM", 143) if isinstance(error, Terminated) else ("Ctrl-C", 130)
        message = f"\nStopped by {how}. Everything saved so far is kept. {how_to_continue}"
    except BrokenPipeError:  # whoever reads the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        code = 2
        if error.errno in (errno.ENAMETOOLONG, errno.EFBIG):
            message = f"error: {error.filename or 'a file'}: {error.strerror}. Choose another place or name."
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = error.filename or "a file"
            message = f"error: no space left on the disk while writing {place}. Free some. {how_to_continue}"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            message = f"error: {error.filename}: {error.strerror}. Choose a place that you may read and write."
        else:
            raise
    except RuntimeError as error:
        if not (several and LOST.search(str(error))):
            raise
        message, code = f"error: another process of this run has ended, and this one with it ({error}).", 1
        others_may_speak = True
    else:
        return
    if others_may_speak and _stopped_by_launcher():
        sys.exit(code)
    print(printable(message.rstrip()), file=sys.stderr)
    sys.exit(code)


def _stopped_by_launcher() -> bool:
    """Whether the launcher stops this process within GRACE, as another one has ended."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, raise_terminated)
        time.sleep(GRACE)
    except Terminated:
        return True
    return False


def why_unreadable(error: OSError) -> str:
    """Why a file cannot be read, in a few words."""
    reasons = {
        errno.ENOENT: f"there is no such file (seen from {Path.cwd()}); check the path",
        errno.EISDIR: "this is a folder; name a file in it",
    }
    return reasons.get(error.errno or 0) or f"the file cannot be read ({error.strerror or error})"
