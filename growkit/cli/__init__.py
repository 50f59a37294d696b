"""How is growkit run from the command line?

This is the only folder that knows growkit, trainer and convert together; it knows the verbs of the
other two as names of modules, imported when a verb is called. Read in this order: `verbs` (the
table of verbs), `entry` (how a command ends: exit codes and errors), `growing` with `description`
(depth, width, grow), `checking` (what --check does), `comparing` (inspect, diff, verify); then
`averaging`, `evaluating` and `quickstart`. `terminal` holds what verbs show alike, `output` how
they print it (--json, --quiet), `signals` how long calls are ended.
"""

from growkit.cli.entry import main, run
from growkit.cli.signals import INTERRUPTED, TERMINATED

__all__ = ["INTERRUPTED", "TERMINATED", "main", "run"]
