"""A Hugging Face directory as lm-evaluation-harness asks it: the harness's `hf` model in float32.

It adds a count of cut contexts, and progress. Imports lm_eval, torch and transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from growkit.errors import GrowkitError, first_line
from growkit.evaluation.harness import Request, WindowedModel, join_scores, silence_libraries
from growkit.models.vocabulary import check_ids


class HuggingFaceModel(WindowedModel, HFLM):
    """The harness's model of a directory; its bars are off, `expect` and `advance` are called."""

    def tok_encode(self, string: str, *rest: Any, **options: Any) -> list[int]:
        """Encode a text. Raises GrowkitError for a token that the model does not have."""
        ids: list[int] = super().tok_encode(string, *rest, **options)
        vocab = self.model.get_input_embeddings().num_embeddings
        check_ids(ids, vocab, "the model", self.tokenizer.convert_ids_to_tokens)
        return ids

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        # A window reads as many tokens as it scores: the token before the first, not the last.
        self.expect(sum(-(-length // self.max_length) for length in lengths), sum(lengths))
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        pieces, owners = self.split_requests(requests)
        # The harness gives a batch size of its own for the windows of rolling texts, a batch at a
        # time; those are counted above.
        if override_bs is None:
            self.count_cut(requests)
            self.expect(len(pieces), self.count_tokens(pieces))
        scores = super()._loglikelihood_tokens(pieces, disable_tqdm=True, override_bs=override_bs)
        return join_scores(owners, scores)

    def _model_call(self, inps: Any, *rest: Any, **options: Any) -> Any:
        logits = super()._model_call(inps, *rest, **options)
        self.advance(len(inps), inps.numel())
        return logits


def load_hugging_face_model(
    path: Path, prefix: int | None, window: int, batch: int
) -> HuggingFaceModel:
    """The model of a directory, on a GPU if torch sees one.

    prefix: the token before a text without context, None for the tokenizer's own choice. window:
    tokens. batch: texts. Raises GrowkitError if transformers cannot load it.
    """
    with silence_libraries():
        try:
            return HuggingFaceModel(
                pretrained=str(path),
                device="cuda" if torch.cuda.is_available() else "cpu",
                dtype="float32",
                max_length=window,
                batch_size=batch,
                prefix_token_id=prefix,
            )
        except Exception as problem:  # transformers raises many types
            raise GrowkitError(
                f"transformers cannot load {path} ({first_line(problem)})"
            ) from problem


def wrap_model(model: Any, tokenizer: Any, window: int, batch: int) -> HuggingFaceModel:
    """A model of transformers that is loaded, with its tokenizer, as the harness asks it."""
    with silence_libraries():
        return HuggingFaceModel(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            max_length=window,
            batch_size=batch,
        )
