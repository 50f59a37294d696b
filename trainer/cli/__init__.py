"""What can a user ask of the trainer?

The verbs tokenize, train, anneal, generate, plan, study, advise and search.
Each file holds the verbs of one purpose as click commands: they check what was typed, call the room
that does the work, and show what it gives. `growkit.cli` knows them by name and imports a file when
one of its verbs is called. Read `training` first; files that end in `_report` only lay out tables.
"""
