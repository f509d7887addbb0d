"""A run that hangs ends, and its log tells where: the stacks of all Python threads.

faulthandler's watchdog is a thread in C: it needs neither Python's lock nor a main thread that
listens, so a program that waits for ever inside libtpu, a collective or a socket ends as well. It
writes to stderr, "Timeout (1:00:00)!" and the stacks, and ends the process with status 1; the
runner's table of causes knows it by those words (`trainer_hang`).
"""

import faulthandler
from collections.abc import Callable


def watchdog(limit_s: int) -> Callable[[], None]:
    """A function to call whenever something has gone on: `limit_s` seconds begin anew.

    The first seconds begin with the first call. 0: nothing is watched.
    """
    if not limit_s:
        return lambda: None
    return lambda: faulthandler.dump_traceback_later(limit_s, exit=True)
