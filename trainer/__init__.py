"""A JAX/Flax trainer for language models, grown or new."""
