"""A trace of some steps, for TensorBoard's profiler or Perfetto."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from training.left_out import shown


class Profile:
    """Traces the steps from the first to the last, on the first process.

    Args:
        steps: first and last step; None traces nothing.
        directory: the trace goes here.
        say: receives a line when it is written.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: Path, say: Callable[[str], None]):
        first = jax.process_index() == 0
        self._steps, self._directory, self._say = steps if first else None, directory, say
        self._running = False

    def before(self, step: int) -> None:
        """Begins the trace if it is to begin with this step, or the run went on from within the range."""
        if self._steps is not None and self._steps[0] <= step <= self._steps[1] and not self._running:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Ends the trace after the last step, once its results are computed."""
        if self._running and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what was traced, or says that it cannot be: a run goes on without."""
        if self._running:
            self._running, self._steps = False, None
            try:
                jax.profiler.stop_trace()
            except (jax.errors.JaxRuntimeError, OSError) as error:
                self._say(f"The profile could not be written to {self._directory}: {shown(error, 300)}")
            else:
                self._say(f"Profile written to {self._directory}")
