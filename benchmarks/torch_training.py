"""PyTorch's side of the training benchmarks: transformers' own class with PyTorch's AdamW.

The model, its training step, and its parameters as the trainer's tree; the scripts do the timing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from growkit.models.architecture import Architecture
from growkit.models.notation import Row
from trainer.config.sections import Dropout, Optimizer


def make_network(model: Architecture, dropout: Dropout, seed: int = 0, device: str = "cpu") -> Any:
    """A new model in float32 with PyTorch's own attention (scaled_dot_product_attention)."""
    torch.manual_seed(seed)
    dropouts = {"hidden_dropout": dropout.hidden, "attention_dropout": dropout.attention}
    fields = {name: value for name, value in model.config().items() if name != "model_type"}
    config = transformers.AutoConfig.for_model(model.kind, **fields, **dropouts, use_cache=False)
    network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return network.to(device).train()


def convert_parameters(network: Any, model: Architecture) -> dict[str, Any]:
    """Its parameters as the trainer's tree."""
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}

    def leaf(row: Row) -> np.ndarray:
        if not row.stacked:
            return tensors[row.name]
        return np.stack([tensors[row.name_at((layer,))] for layer in range(model.layer)])

    return model.table.tree(leaf)


def make_step(
    network: Any, settings: Optimizer, compiled: bool, compute: str
) -> Callable[[Any], Any]:
    """tokens [B, T+1] -> loss: forward, backward, clip by global norm, one fused AdamW update."""
    parameters = list(network.parameters())
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(groups, settings.learning_rate, betas, settings.eps, fused=True)
    dtype = getattr(torch, compute)
    device = parameters[0].device.type

    def loss_of(tokens: Any) -> Any:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = network(input_ids=tokens[:, :-1]).logits
            return torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), tokens[:, 1:].flatten()
            )

    compute_loss = torch.compile(loss_of) if compiled else loss_of

    def step(tokens: Any) -> Any:
        loss = compute_loss(tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        return loss.detach()

    return step
