"""Being asked to stop: a signal is an exception, at once or as soon as the state is whole."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
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
        self._stopping = False  # once is enough: a second signal must not cut off the last save

    def __call__(self, number: int, _frame: object) -> None:
        """Take a signal.

        Raises:
            Stopped: nothing holds it off.
        """
        name = signal.Signals(number).name
        if self._stopping:
            log.info("%s: stopping already", name)
            return
        self.number = number
        if self._held:
            log.info("%s: stopping as soon as the state is whole", name)
            return
        log.info("stopped by %s", name)
        self._stopping = True
        raise Stopped(128 + number)

    def notice(self, text: str, note: Callable[[], None]) -> None:
        """Stop as SIGTERM does, from any thread; one that was asked for before stays what it was.

        The signal goes to the main thread itself: it wakes what that waits for, and the handler
        runs there, between two instructions of Python, so that a stop by notice and one by signal
        are the same thing and neither can come in the middle of what is held.

        Args:
            text: the line of the log.
            note: writes down why, before the stop.
        """
        if self.number is not None:
            return
        log.info("%s", text)
        try:
            note()
        except OSError as error:
            log.warning("that could not be written down: %s", error)
        finally:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

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
            self._stopping = True
            raise Stopped(128 + self.number)
