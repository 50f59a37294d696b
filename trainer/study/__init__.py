"""What does growth save: on your own data by a study, and according to published laws?

A study trains one model from scratch and grows the same model in several ways. Read `design` (what
is compared, and how long each run is), then `course` (the runs, one after another), `progress`
(what the user sees meanwhile), `outcome` (the arithmetic over finished runs) and `report` (tables
and the picture). `advice` has the published laws, and `evidence` reads the results of a finished
study for `growkit advise`.
"""
