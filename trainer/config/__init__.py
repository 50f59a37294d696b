"""What a run is told to do: the sections of a configuration, their defaults, their rules.

Read `values.py` first (a preset or YAML file and `key=value` overrides become nested values), then
`sections.py` (the dataclasses that describe a run), `build.py` (nested values become those
dataclasses) and `rules.py` (a field's range or choices, stated where the field is declared).
`description.py` says what became of sizes. The presets are in `presets/`.
"""
