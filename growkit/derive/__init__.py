"""Tables derived from transformers' own classes, and proved before they are believed.

Read `sizes` (which size each dimension follows, by doubling one at a time), `rows` (names and
shapes as rows of a table), `stream` (what only a computation tells: which rows write the stream),
`variant` (one configuration, read by the three), `proof` (growth computed by transformers in
float64, against the source), `workings` (cuts tried until they are exact, else frozen), `options`
(rows that depend on the configuration) and `derive`, which runs them all. `network` is
transformers' side, `tiny` the sizes of tiny models, `assemble` the family as data, `docs` the
table of docs/models.md. Nothing here is needed to grow: tables are text, see
`growkit.models.table_file`.
"""
