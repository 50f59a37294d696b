"""Growth on disk: from a source and a plan to an output, and outputs against their sources.

Read `grow` first: it makes a recipe for every tensor. `blocks` cuts large tensors, so that memory
does not depend on their size. `comparison` is behind `diff` and `verify`, `average` behind
`average`.
"""
