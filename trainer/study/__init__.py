"""What does growth save: on your own data by a study, and according to published laws?

A study trains one model from scratch and grows the same model in several ways. Read `design` (what
is compared, and how long each run is), then `course` (the runs, one after another), `progress`
(what the user sees meanwhile), `outcome` (the arithmetic over finished runs) and `report` (tables
and the picture). For `growkit advise`, `advice` has G_stack's timing law and published savings,
`laws` what four works say of one growth and where they disagree, `evidence` reads the results of a
finished study, and `verdict` says what they mean.
"""
