"""How a command of the terminal ends: what went wrong in a line or two, and an exit code that says what happened."""

import sys
from collections.abc import Callable

from common.errors import HealingError

INTERRUPTED = 130


def run(command: Callable[[], None], *, interrupted: str) -> int:
    """Run a command; what a user can cause ends it without a traceback.

    Args:
        command: does the work.
        interrupted: what Ctrl-C leaves behind, for the user.

    Returns:
        The exit code: 0 done, an error's own, 1 where a file could not be read or written, 130 interrupted.
    """
    try:
        command()
    except HealingError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        return _fail(f"interrupted; {interrupted}", INTERRUPTED)
    return 0


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"\n{message}\n")
    return code
