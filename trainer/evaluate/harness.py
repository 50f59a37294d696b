"""A model in JAX as lm-evaluation-harness asks it: text in, log likelihoods out.

Imports lm_eval, not torch.

The harness's own base class splits texts into tokens and decides what is context, as it does for
transformers' models; so both kinds of model score the same tokens. `trainer.evaluate.likelihood`
computes the scores.
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
from trainer.model.decoder import Decoder


class JaxModel(WindowedModel, TemplateLM):
    """A model that the harness can ask.

    A text without a context is scored after the token `begin`, end-of-text where there is none. The
    names and arguments of the methods are the harness's.
    """

    def __init__(
        self, likelihood: Likelihood, tokenizer: TextTokenizer, vocab: int, begin: int | None = None
    ):
        super().__init__()
        self.begin = begin
        self.likelihood = likelihood
        self.tokenizer = tokenizer
        self.vocab = vocab  # ids that the model has; the tokenizer may have more
        self.max_length = likelihood.window

    @property
    def eot_token_id(self) -> int:
        """The id of the end-of-text token."""
        return self.tokenizer.end_of_text_id

    @property
    def prefix_token_id(self) -> int:
        """The id of the token before a text without context."""
        return self.eot_token_id if self.begin is None else self.begin

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """Encode a text, with the tokenizer's special tokens unless told otherwise.

        Raises GrowkitError for a token that the model does not have.
        """
        special = add_special_tokens is not False
        return self.tokenizer.encode_for_model(string, special, self.vocab, "the model")

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Score continuations after their contexts, without the harness's progress bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Score all of each text after the token that begins one.

        A long text is scored in windows; each begins with the token before it.
        """
        whole = []
        for request in requests:
            text = request.args[0]
            whole.append((("", text), [self.prefix_token_id], self.tok_encode(text)))
        return [score for score, _ in self._score(whole)]

    def _loglikelihood_tokens(
        self, requests: list[Request], **options: Any
    ) -> list[tuple[float, bool]]:
        self.count_cut(requests)
        return self._score(requests)

    def _score(self, requests: list[Request]) -> list[tuple[float, bool]]:
        pieces, owners = self.split_requests(requests)
        self.expect(len(pieces), self.count_tokens(pieces))
        pairs = [(context, continuation) for _, context, continuation in pieces]
        return join_scores(owners, self.likelihood.score(pairs, self.advance))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Refuse: no task of growkit asks for generated text."""
        raise NotImplementedError("growkit's tasks score texts; none asks for generated text")


def load_jax_model(
    source: Source, tokenizer: TextTokenizer, window: int, batch: int, begin: Any = None
) -> JaxModel:
    """Load a model from disk onto all of this machine's devices, a copy on each, in float32.

    window: the longest text, in tokens. batch: texts at once. begin: the id of the token before a
    text without context; end-of-text where it is no number. Raises UsageError for an architecture
    that the trainer does not compute.
    """
    model = require_trained(source.model, source.path)
    layout = Layout(make_mesh(Mesh(), jax.local_devices()))
    network = Decoder(model, Precision("float32", "float32"), layout=layout)
    shardings = model.table.tree(layout.parameter_sharding)
    params = jax.device_put(source.stack(dtype="float32"), shardings)
    likelihood = Likelihood(network, params, window, batch)
    return JaxModel(likelihood, tokenizer, model.vocab, begin if isinstance(begin, int) else None)
