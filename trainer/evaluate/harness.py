"""The model in JAX as lm-evaluation-harness asks it: text in, log likelihoods out. Imports lm_eval, and not torch.

The harness's own base class splits texts into tokens and decides what is context, as it does for transformers'
models, so that both score the same tokens. Leaves scoring to `trainer.evaluate.likelihood`.
"""

from __future__ import annotations

from typing import Any

import jax
from lm_eval.api.model import TemplateLM

from growkit.checkpoint.tensor import Source
from growkit.evaluation.harness import Request, WindowedModel, join_scores
from growkit.models import require_trained
from trainer.config.sections import Mesh, Precision
from trainer.data.tokenizer import TextTokenizer
from trainer.devices.sharding import Layout, make_mesh
from trainer.evaluate.likelihood import Likelihood
from trainer.model.decoder import GPTNeoX


class JaxModel(WindowedModel, TemplateLM):
    """A model that the harness can ask; texts without a context are scored after end-of-text."""

    def __init__(self, likelihood: Likelihood, tokenizer: TextTokenizer):
        super().__init__()
        self.likelihood, self.tokenizer = likelihood, tokenizer
        self.max_length = likelihood.window

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.end_of_text_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        return self.tokenizer.tokenizer.encode(
            string, add_special_tokens=add_special_tokens is not False
        ).ids

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        """All of each text after end-of-text, in windows that each begin with the token before them."""
        texts = [request.args[0] for request in requests]
        return [
            score
            for score, _ in self._score(
                [(("", text), [self.eot_token_id], self.tok_encode(text)) for text in texts]
            )
        ]

    def _loglikelihood_tokens(
        self, requests: list[Request], **options: Any
    ) -> list[tuple[float, bool]]:
        self.count_cut(requests)
        return self._score(requests)

    def _score(self, requests: list[Request]) -> list[tuple[float, bool]]:
        pieces, owners = self.split_requests(requests)
        self.expect(len(pieces))
        pairs = [(context, continuation) for _, context, continuation in pieces]
        return join_scores(owners, self.likelihood.score(pairs, self.advance))

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        raise NotImplementedError("growkit's tasks score texts and continue none")


def load_jax_model(source: Source, tokenizer: TextTokenizer, window: int, batch: int) -> JaxModel:
    """A model on disk, computed in float32 on all of this machine's devices, a copy on each.

    Raises UsageError for an architecture that the trainer does not compute.
    """
    model = require_trained(source.model, source.path)
    layout = Layout(make_mesh(Mesh(), jax.local_devices()))
    network = GPTNeoX(model, Precision("float32", "float32"), layout=layout)
    params = jax.device_put(source.stack(dtype="float32"), model.table.tree(layout.parameter_sharding))
    return JaxModel(Likelihood(network, params, window, batch), tokenizer)
