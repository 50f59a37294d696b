"""What growth does to arrays: which old unit each new unit copies, and what happens to its numbers.

Read `axes` (maps of one axis) first, then `shares` and `rule` (the one rule, for values and
moments), `padding` and `noise`. `plan` puts maps together; `depth` and `width` make plans from what
a user types. `multipliers` says what an optimizer must know afterwards, `tree` grows parameters in
memory.
"""
