"""Hugging Face GPT-Architecture directories in and out of trainer checkpoints."""
