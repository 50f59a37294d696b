"""transformers' side: build a type's model, name its parameters as files do, compute its logits in
float64.

Nothing here runs code from a model directory: classes come from the installed transformers alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.models.auto.configuration_auto import CONFIG_MAPPING as CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

transformers.logging.set_verbosity(50)
transformers.utils.logging.disable_progress_bar()
State = dict[str, torch.Tensor]
VERSION = str(transformers.__version__)


class UnprovableError(ValueError):
    """What a type lacks for a table of it to be proved, in growkit's words."""


class KeepWide(TorchFunctionMode):  # type: ignore[misc]
    """Compute in float64 what a model asks to be computed in float32.

    Norms, softmaxes and rotary positions of transformers are float32 whatever the model's dtype; a
    proof needs them as wide as the rest.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = tuple(torch.float64 if each is torch.float32 else each for each in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)


@contextmanager
def wide() -> Iterator[None]:
    """float64 by default, no gradients, no warnings."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with KeepWide(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


def model_types() -> list[str]:
    """Every model type that transformers has a causal language model for."""
    return [kind for kind in CONFIG_MAPPING if CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING]


def class_of(config: Any) -> Any:
    """The class of a configuration's causal language model."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def make_config(kind: str, fields: Mapping[str, Any]) -> Any:
    """A configuration of a type. Attention and experts are computed the plain way."""
    config = CONFIG_MAPPING[kind](**fields)
    return set_plain(config)


def set_plain(config: Any) -> Any:
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def build(config: Any, meta: bool = False) -> Any:
    """A new model: on the meta device, or with random float64 parameters."""
    with torch.device("meta") if meta else wide():
        network = class_of(config)(config)
    # Not every class ties its head when it is made.
    network.tie_weights()
    return network.eval()


def file_state(network: Any) -> State:
    """A model's parameters and saved buffers as its files hold them: names, shapes, no tied ones
    twice.
    """
    state = dict(network.state_dict())
    for name in network._keys_to_ignore_on_save or ():
        state.pop(name, None)
    untied = remove_tied_weights_from_state_dict(state, network)
    return name_as_files(network, untied)


def name_as_files(network: Any, state: Mapping[str, torch.Tensor]) -> State:
    """Tensors of a model's parameters, or of what is as large, as files name and cut them."""
    held: State = revert_weight_conversion(network, dict(state))
    return held


def memory_names(network: Any) -> dict[str, str]:
    """The name in memory of each parameter that files hold: found by giving every parameter its
    number.

    A tensor of files that is made of several gets the name of the first.
    """
    with wide():
        # A tied parameter has one number, that of its first name.
        named = {
            tensor.data_ptr(): (name, tensor)
            for name, tensor in reversed(network.state_dict().items())
        }
        state = dict(reversed(named.values()))
        kept = {name: tensor.clone() for name, tensor in state.items()}
        numbered = list(dict.fromkeys(state))
        for number, name in enumerate(numbered):
            state[name].fill_(number)
        found = {
            name: numbered[int(tensor.flatten()[0])] if tensor.numel() else name
            for name, tensor in file_state(network).items()
        }
        for name, tensor in kept.items():
            state[name].copy_(tensor)
    return found


def load(config: Any, state: Mapping[str, torch.Tensor]) -> Any:
    """The model whose files hold these tensors.

    Raises UnprovableError where names or shapes differ.
    """
    # A loaded model may share memory with what it was given, and change it.
    given = {name: tensor.clone() for name, tensor in state.items()}
    with wide():
        network, report = class_of(config).from_pretrained(
            None, config=config, state_dict=given, output_loading_info=True, dtype=torch.float64
        )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            names = ", ".join(sorted(map(str, report[what]))[:4])
            raise UnprovableError(
                f"transformers does not load what it saves: {what.replace('_', ' ')} {names}"
            )
    return network.eval()


def run(network: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits in float64, [batch, position, vocab]."""
    with wide():
        return network(tokens, use_cache=False).logits


def runs(config: Any) -> Exception | None:
    """None where a model of this configuration computes, else why not."""
    tokens = torch.arange(3, 15)[None]
    try:
        if sum(each.numel() for each in build(config, meta=True).parameters()) > 3_000_000:
            return UnprovableError("its smallest model is too large to prove anything with")
        run(build(config), tokens)
    except Exception as problem:
        return problem
    return None
