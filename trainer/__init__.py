"""A JAX/Flax trainer for GPT-Architecture models, grown or new."""
