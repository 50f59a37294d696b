"""growkit grows trained GPT-NeoX models in depth and width, with their optimizer state."""

__version__ = "0.1.0"
