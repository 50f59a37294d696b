"""A profile of some steps by JAX's profiler, in RUN/profile, for TensorBoard, XProf or Perfetto."""

from __future__ import annotations

import re
from typing import Any

import jax
from etils import epath

from growkit.errors import UsageError

PROFILE = "profile"


def parse_window(text: str) -> tuple[int, int] | None:
    """The steps after which a trace begins and ends, from FIRST:LAST; None for an empty text.

    Raises UsageError for any other text, and where LAST is not after FIRST.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise UsageError(
            f"log.profile must be FIRST:LAST, such as 100:110 for the ten steps after step 100; "
            f"got {text!r}"
        )
    return int(found[1]), int(found[2])


class Trace:
    """Traces the steps of a window FIRST:LAST, once. Raises UsageError for any other text."""

    def __init__(self, text: str, run: epath.Path):
        self.window = parse_window(text)
        self.directory = run / PROFILE
        self.running = False

    def update(self, step: int, state: Any) -> None:
        """Begin or end the trace where that is due. state: the result of the first `step` steps."""
        if self.window is None or step not in self.window:
            return
        # Wait, so that the steps dispatched before do not run inside the trace.
        jax.block_until_ready(state)
        if step == self.window[0]:
            jax.profiler.start_trace(str(self.directory))
            self.running = True
        else:
            self.close()

    def close(self) -> None:
        """End a trace that is running, as when a run ends within the window."""
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
