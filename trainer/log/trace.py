"""A trace of some steps by JAX's profiler, in RUN/profile, for TensorBoard, XProf or Perfetto to show.

Knows the window; leaves what a step is to the loop.
"""

from __future__ import annotations

import re
from typing import Any

import jax
from etils import epath

from growkit.errors import UsageError

PROFILE = "profile"


def parse_window(text: str) -> tuple[int, int] | None:
    """The steps after which a trace begins and ends, written FIRST:LAST; None for empty text. Raises UsageError."""
    if not text:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise UsageError(
            f"log.profile is FIRST:LAST, as 100:110 for the ten steps after step 100; got {text!r}"
        )
    return int(found[1]), int(found[2])


class Trace:
    """Traces the steps of a window, once. Raises UsageError for one that is none."""

    def __init__(self, text: str, run: epath.Path):
        self.window, self.directory = parse_window(text), run / PROFILE
        self.running = False

    def update(self, step: int, state: Any) -> None:
        """Hear that `step` steps are begun, `state` being their result, and begin or end where it is time to."""
        if self.window is None or step not in self.window:
            return
        # What was dispatched before belongs to what is before.
        jax.block_until_ready(state)
        if step == self.window[0]:
            jax.profiler.start_trace(str(self.directory))
            self.running = True
        else:
            self.close()

    def close(self) -> None:
        """End a trace that is running, as where a run ends within the window."""
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
