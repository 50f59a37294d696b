"""The model: from tokens to logits.

Read `decoder` first: it is the whole forward pass, of every family. It scans `block` over the
layers; `parameters` are its projections and norms, `kinds` says in what layers differ, `rotary` how
positions turn heads, and `view` takes other layers than all in their order. It is made of
`attention` (with `kernels`, which picks a TPU or GPU kernel where one fits), `matmul`, `activation`
and `dropout`, each with a backward pass of its own. `precision` says what is computed in at least
float32.
"""
