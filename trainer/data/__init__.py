"""How text becomes the batches that a run trains on.

In the order of the data: `listing.py` says which files are read, `text.py` reads documents from
them, `plain.py` cuts plain text into documents, and `cleaning.py` says what is done with bytes that
are not text. `tokenizer.py` turns a document into token ids, with `special.py` for the token that
ends a text and `panics.py` for a library that fails; `processes.py` spreads that over processor
cores, `tokenize.py` puts these together, and `tokens.py` is the format of the result on disk. Then
`checked.py` compares token files with their manifests, `windows.py` cuts them into sequences,
`stream.py` mixes and shuffles those into batches, and `corpus.py` opens what a configuration names.
"""
