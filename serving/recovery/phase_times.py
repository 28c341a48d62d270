"""The milliseconds that each phase of a recovery took."""

import contextlib
from collections.abc import Iterator

from serving.protocol import clock


class PhaseTimes(dict[str, float]):
    """Milliseconds by phase. A phase that is entered several times adds up."""

    @contextlib.contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the time of a block to a phase."""
        began = clock.now()
        try:
            yield
        finally:
            self[phase] = self.get(phase, 0.0) + 1e3 * (clock.now() - began)
