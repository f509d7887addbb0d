"""Being asked to stop: a signal is an exception, at once or as soon as the state is whole."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """Somebody asked us to stop, by a signal; its code is 128 + the signal."""


class Stops:
    """A signal handler that work can hold off.

    Attributes:
        number: of the last signal that came; None: none did.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._held = 0

    def __call__(self, number: int, _frame: object) -> None:
        """Take a signal.

        Raises:
            Stopped: nothing holds it off.
        """
        self.number = number
        name = signal.Signals(number).name
        if self._held:
            log.info("%s: stopping as soon as the state is whole", name)
            return
        log.info("stopped by %s", name)
        raise Stopped(128 + number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait until the context ends.

        Raises:
            Stopped: one came meanwhile, and the work is done.
        """
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self.number is not None and not self._held:
            raise Stopped(128 + self.number)
