"""How does growkit learn a model type that has no table by hand?

It builds a tiny random model of transformers' own class and reads the table off it: `tiny` chooses
the sizes, `sizes` finds which configuration field gives each axis, `rows` drafts a row for each
parameter, `lists` and `kinds` find the fields and rules about single layers, `stream` finds what
writes into the residual stream, `variant` puts these together for one configuration. `workings`
then grows the tiny model along each axis and keeps what is exact, `options` and `derive` do so for
all values of the type's options, `proof` measures the difference in float64, and `assemble` writes
the family. `cli` is the verb, `docs` the list of shipped tables.
Everything but `cli` and `docs` needs torch and transformers.
"""
