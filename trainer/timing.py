"""Which phase of the loop is under way, and where a step's time goes."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer import hbm


@dataclass
class Phases:
    """Where a step's time goes, and which phase is under way.

    Attributes:
        run_dir: where samples of HBM go.
        alive: is told whenever something has gone on (trainer/hang.py).
        holds: what the loop has on the devices, by owner, for trainer/blackbox.py.
    """

    run_dir: Path
    alive: Callable[[], None] = lambda: None
    step: int = -1
    phase: str = "load"
    seconds: dict[str, float] = field(default_factory=dict)
    holds: Callable[[], Mapping[str, Any]] = dict

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a phase, with HBM sampled before it begins."""
        self.phase = phase
        self.alive()
        hbm.sample(self.run_dir, step=self.step, phase=phase)
        began = time.monotonic()
        yield
        self.alive()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - began
