"""A golden record: what growth, conversion and training give today, to compare a rebuild with.

Nothing here imports the code under test but its command line, so files may move and be renamed.

    inputs.py    the models that the cases start from, made of whole numbers
    words.py     a text, and a tokenizer for it
    cases.py     the command of every case of growth and conversion
    outputs.py   a written model as digests
    growths.py   runs the cases
    trainings.py tokenizes the text and trains two small models, which grow
    compare.py   two records, and in what they differ
    record.py    the script: make a record, store it, compare with one
"""
