"""How text becomes the batches that a run trains on.

In the order of the data: `text.py` reads documents from files, `tokenizer.py` turns a document into
token ids, `processes.py` spreads that over processor cores, `tokenize.py` puts these together, and
`tokens.py` is the format of the result on disk. Then `windows.py` cuts token files into sequences,
`stream.py` mixes and shuffles them into batches, and `corpus.py` opens what a configuration names.
"""
