"""How do models get from Hugging Face directories into trainer checkpoints, and back?

Read in this order: `directory` (the contents of each side), `card` (the model card), `reference`
(transformers' own forward pass, to compare with), `harness` (a directory as lm-evaluation-harness
asks it), `cli` (the verbs import and export).
"""
