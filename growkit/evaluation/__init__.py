"""Benchmarks of language models, by lm-evaluation-harness, for whatever model is given to it.

Knows the tasks, their files, how they are run and how their figures are shown; leaves the models to
`trainer.evaluate.harness` (in JAX) and `convert.harness` (in transformers). Imports lm_eval only when something is run.
"""
