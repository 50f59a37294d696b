"""Which layers should a deeper model repeat?

Read `maps` first (the maps of layers that are tried, as `growkit depth --map` takes them), then
`views` (the loss of a map, computed without making the model) and `search`, which tries one map
after another.
"""
