"""`python -m growkit` is the command line."""

from growkit.cli import main

main()
