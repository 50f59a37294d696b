"""Asking a model: how likely it finds a text, and how it continues one.

Read `likelihood` first, which scores tokens, then `harness`, which lets lm-evaluation-harness ask
it, then `generate`, which continues a text.
"""
