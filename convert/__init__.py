"""Hugging Face GPT-NeoX directories in and out of trainer checkpoints."""
