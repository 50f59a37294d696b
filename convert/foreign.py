"""A causal language model that transformers loads and growkit does not open, to be evaluated.

Its configuration and tokenizer are read when it is opened, its weights when it is loaded. Imports
transformers; torch and lm_eval only when the weights are loaded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from growkit.errors import GrowkitError, first_line
from growkit.evaluation.harness import silence_libraries

# Tokens of a sequence where a configuration states none; the harness takes as many.
WINDOW = 2048
# What transformers calls the longest text of a tokenizer that states none is above.
UNSTATED = 10**9
# Values of each tensor that are hashed.
SAMPLE = 1024


@dataclass(frozen=True)
class Foreign:
    """A model to be measured, as `growkit.cli.answering` has them.

    name, revision: the directory or Hub id. problem: why growkit does not open it. facts: what a
    record keeps of it, filled in when it is loaded.
    """

    text: str
    label: str | None
    name: str
    revision: str | None
    config: Any
    tokenizer: Any
    problem: Exception
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def window(self) -> int:
        """The tokens that it reads at most, as the harness finds them."""
        text = self.config.get_text_config()
        for key in ("n_positions", "max_position_embeddings", "n_ctx"):
            found = getattr(text, key, None)
            if isinstance(found, int):
                return found
        stated = getattr(self.tokenizer, "model_max_length", None)
        return int(stated) if stated and stated < UNSTATED else WINDOW

    def require_whole(self) -> None:
        """Nothing: there are no hashes on record."""

    def describe(self) -> dict[str, Any]:
        """What a record keeps of it; after it was loaded."""
        return self.facts

    def load(self, window: int, batch: int) -> Any:
        """The model as the harness asks it, in float32.

        Raises GrowkitError where transformers cannot load it, or would make weights up that its
        files do not have.
        """
        from convert.harness import wrap_model

        model = self._load_weights()
        self.facts.update(_describe(model))
        return wrap_model(model, self.tokenizer, window, batch)

    def _load_weights(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        with silence_libraries():
            try:
                model, found = AutoModelForCausalLM.from_pretrained(
                    self.name,
                    revision=self.revision,
                    dtype=torch.float32,
                    output_loading_info=True,
                )
            except Exception as error:  # transformers raises many types
                raise GrowkitError(
                    f"transformers cannot load {self.text} ({first_line(error)}), and growkit does "
                    f"not open it: {self.problem}"
                ) from error
        missing = sorted([*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])])
        if missing:
            raise GrowkitError(
                f"the files of {self.text} lack {missing[0]} and {len(missing) - 1} more of its "
                "weights, which transformers would make up"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return model.eval().to(device)


def open_foreign(text: str, label: str | None, problem: Exception) -> Foreign | None:
    """The model of a directory or a Hub id; None where transformers has no causal model of it.

    Raises GrowkitError for one whose tokenizer cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name, revision = _split_revision(text)
    if not _is_here(name, revision):
        return None
    with silence_libraries():
        try:
            config = AutoConfig.from_pretrained(name, revision=revision)
        except Exception:  # what is no model of transformers; growkit's own words say more
            return None
        if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return None
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        except Exception as error:  # the same
            raise GrowkitError(
                f"transformers cannot load the tokenizer of {text} ({first_line(error)})"
            ) from error
    return Foreign(text, label, name, revision, config, tokenizer, problem)


def _split_revision(text: str) -> tuple[str, str | None]:
    """A directory as it is, a Hub id and its revision."""
    if Path(text).expanduser().is_dir():
        return str(Path(text).expanduser()), None
    name, _, revision = text.rpartition("@")
    return (name, revision) if name else (text, None)


def _is_here(name: str, revision: str | None) -> bool:
    """Whether there is a configuration: in a directory, or of a Hub id that was downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).is_dir():
        return (Path(name) / "config.json").is_file()
    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except HFValidationError:
        return False


def _describe(model: Any) -> dict[str, Any]:
    """Kind, parameters, fingerprint and lineage of a loaded model."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:SAMPLE].cpu().numpy().tobytes())
    return {
        "kind": "transformers",
        "parameters": sum(each.numel() for each in model.parameters()),
        "fingerprint": digest.hexdigest(),
        "lineage": [],
    }
