"""A JAX/Flax trainer for GPT-NeoX models, grown or new."""
