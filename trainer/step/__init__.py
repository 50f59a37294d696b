"""One update: what a batch of tokens does to the parameters.

Read `update` first: the state, the train step and the evaluation step. It is made of `loss`,
`optimizer` and `schedule`. `plateau` finds where the validation loss stopped falling, by which a
run lowers the rate.
"""
