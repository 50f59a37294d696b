"""The settings of a training in gpt-neox, and the configuration that transformers has for them.

gpt-neox writes the YAML files of a training to `configs/` in each checkpoint; the checkpoints of
Pythia have one beside the weights. Names may have hyphens or underscores. What is not set has
gpt-neox's default (megatron/neox_arguments/neox_args.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growkit.checkpoint.carried import find_outside
from growkit.checkpoint.files import read_regular
from growkit.errors import GrowkitError

# Bytes of a settings file at most; gpt-neox's own have 3 kB.
LIMIT = 1_000_000
# Settings that transformers' GPT-NeoX has one value for, which is also what Pythia has.
FIXED: dict[str, tuple[Any, Any]] = {
    # setting: (the value, gpt-neox's default)
    "norm": ("layernorm", "layernorm"),
    "pos_emb": ("rotary", "learned"),
    "activation": ("gelu", "gelu"),
    "gpt_j_tied": (False, False),
    "use_bias_in_mlp": (True, True),
    "use_bias_in_norms": (True, True),
    "use_qk_layernorm": (False, False),
    "use_mup": (False, False),
    "moe_num_experts": (1, 1),
    "rotary_interleaved": (False, False),
    "sliding_window_width": (None, None),
}
ATTENTIONS = ("global", "flash", "ring")


@dataclass(frozen=True)
class Settings:
    """The settings of one training, by gpt-neox's names with underscores."""

    path: Path
    values: Mapping[str, Any]

    @property
    def layers(self) -> int:
        return self._take_whole("num_layers")

    @property
    def ranks(self) -> int | None:
        """Ranks of tensor parallelism, where they are stated."""
        return self._take_whole("model_parallel_size") if self._has("model_parallel_size") else None

    @property
    def tied(self) -> bool:
        return not self.values.get("no_weight_tying", False)

    @property
    def parallel(self) -> bool:
        return bool(self.values.get("gpt_j_residual", False))

    def _has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def _take_whole(self, name: str) -> int:
        value = self.values.get(name)
        if type(value) is not int or value < 1:
            raise GrowkitError(f"{self.path}: {name} must be a whole number from 1, got {value!r}")
        return value

    def _take_number(self, name: str, default: float) -> float:
        value = self.values.get(name, default)
        try:
            # YAML reads 1e-5 as text, for want of a point.
            return float(value)
        except (TypeError, ValueError):
            raise GrowkitError(f"{self.path}: {name} must be a number, got {value!r}") from None

    def check(self) -> None:
        """Raise GrowkitError for a model that transformers' GPT-NeoX does not compute."""
        for name, (wanted, default) in FIXED.items():
            value = self.values.get(name, default)
            if value != wanted:
                raise GrowkitError(
                    f"{self.path}: {name} is {value!r}, and transformers' GPT-NeoX has {wanted!r}"
                )
        heads = self._take_whole("num_attention_heads")
        if self._has("num_kv_heads") and self.values["num_kv_heads"] != heads:
            raise GrowkitError(f"{self.path}: num_kv_heads must be num_attention_heads, {heads}")
        if self.values.get("pipe_parallel_size", 1) != 1:
            raise GrowkitError(
                f"{self.path}: pipe_parallel_size is {self.values['pipe_parallel_size']!r}, and "
                "growkit reads checkpoints of 1"
            )
        other = set(_list_texts(self.values.get("attention_config"))) - set(ATTENTIONS)
        if other:
            raise GrowkitError(
                f"{self.path}: attention_config has {min(other)!r}, and transformers' GPT-NeoX "
                "attends to all earlier tokens in every layer"
            )

    def make_config(self, vocab: int, mlp: int) -> dict[str, Any]:
        """The content of config.json. vocab, mlp: sizes of the parameters, padding included."""
        return {
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            "vocab_size": vocab,
            "hidden_size": self._take_whole("hidden_size"),
            "num_hidden_layers": self.layers,
            "num_attention_heads": self._take_whole("num_attention_heads"),
            "intermediate_size": mlp,
            "max_position_embeddings": self._take_whole("max_position_embeddings"),
            "rotary_pct": self._take_number("rotary_pct", 1.0),
            "rotary_emb_base": self._take_number("rotary_emb_base", 10000),
            "use_parallel_residual": self.parallel,
            "tie_word_embeddings": self.tied,
            "layer_norm_eps": self._take_number("layernorm_epsilon", 1e-5),
            "initializer_range": self._take_number("init_method_std", 0.02),
            "hidden_act": "gelu",
            "attention_bias": bool(self.values.get("use_bias_in_attn_linear", True)),
            "bos_token_id": 0,
            "eos_token_id": 0,
        }


def read_settings(path: Path) -> Settings:
    """The settings of a checkpoint. Raises GrowkitError if there are none, or they do not fit."""
    files = sorted(
        file
        for directory in (path / "configs", path)
        for file in (directory.iterdir() if directory.is_dir() else ())
        if file.suffix in (".yml", ".yaml") and not find_outside(path, file)
    )
    values: dict[str, Any] = {}
    for file in files:
        for name, value in _read_yaml(file).items():
            key = str(name).replace("-", "_")
            if key in values and values[key] != value:
                raise GrowkitError(f"{path}: two settings files state {key}, and not the same")
            values[key] = value
    if "num_layers" not in values:
        raise GrowkitError(
            f"{path} has no settings of gpt-neox (configs/*.yml or *.yml with num_layers); put the "
            "file that the model was trained with there"
        )
    settings = Settings(path, values)
    settings.check()
    return settings


def _read_yaml(path: Path) -> Mapping[Any, Any]:
    import yaml

    try:
        found = yaml.safe_load(read_regular(path, LIMIT))
    except (yaml.YAMLError, UnicodeError, RecursionError, ValueError):
        raise GrowkitError(f"{path} is no YAML that can be read") from None
    return found if isinstance(found, Mapping) else {}


def _list_texts(value: Any) -> Iterator[str]:
    """The texts in nested lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _list_texts(each)
