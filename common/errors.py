"""Errors that a user can act on, and how a script ends with them."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(Exception):
    """What the user gave cannot be used; the message names it and says what to do."""


@contextmanager
def cli_errors(goes_on: str = "") -> Iterator[None]:
    """Ends the program as a user expects: one paragraph; exit code 2 for bad input, 130 for Ctrl-C.

    goes_on: how what was stopped half-way is gone on with.
    """
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:  # a diverged run
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\nStopped by Ctrl-C. What had been saved stays. {goes_on}".rstrip(), file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            reason = f"no space left on the disk while writing {error.filename or 'a file'}. Free some. {goes_on}"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            reason = f"{error.filename}: {error.strerror}. Choose a place that you may read and write."
        else:
            raise
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)


def why_unreadable(error: OSError) -> str:
    """What hinders reading a file, in a few words."""
    reasons = {
        errno.ENOENT: f"there is no such file (seen from {Path.cwd()}); check the path",
        errno.EISDIR: "this is a folder; name a file in it",
    }
    return reasons.get(error.errno) or f"the file cannot be read ({error.strerror})"
