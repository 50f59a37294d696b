"""How does PyTorch train a grown model on? Parameter groups, frozen layers, callbacks.

    groups = growkit.torch.param_groups(model, "GROWN")     groups of what the directory holds
    growkit.torch.freeze_old(model, "GROWN")                train new layers alone
    growkit.torch.clip_grad_norm_(optimizer, 1.0)           clip as the small model would

`growkit.torch.callbacks` does the last in transformers' Trainer; it also warms new layers up and
keeps the lineage in later checkpoints.
This folder imports torch; nothing else of growkit needs it. docs/pytorch.md has examples.
"""

from growkit.torch.groups import clip_grad_norm_, freeze_old, param_groups

__all__ = ["clip_grad_norm_", "freeze_old", "param_groups"]
