"""A model as EleutherAI's LM Evaluation Harness (the `eval` extra) sees it.

Importing this module imports the harness.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from spqr_jax.errors import DataError, SpQRError
from spqr_jax.evaluate.continuations import ContinuationScore, continuation_scores
from spqr_jax.events import Events, Steps, ignore
from spqr_jax.generate import Generator
from spqr_jax.integrations.answers import Answers, key_of
from spqr_jax.models.decoder import Decoder
from spqr_jax.models.products import Linear, plain_linear
from spqr_jax.models.tokenizer import render_chat, token_ids
from spqr_jax.sampling import Sampling

BATCH_TOKENS = {"cpu": 1024, "gpu": 4096, "tpu": 4096}
"""Tokens to read at a time. More take longer each on a CPU, whose caches then hold less of them."""


class HarnessModel(TemplateLM):
    """A model as the harness sees it.

    Args:
      params: dense or quantized.
      tokenizer: its tokenizer, a transformers one.
      batch_tokens: about how many tokens to read at a time; None for `BATCH_TOKENS`.
      events: told of phases "scoring" and "generating".
      answers: scores that are known, and where new ones are kept.
      linear: what multiplies by the blocks' matrices where continuations are scored; generating is not affected.
    """

    backend = "causal"

    def __init__(
        self,
        params: Decoder,
        tokenizer: Any,
        *,
        batch_tokens: int | None = None,
        events: Events = ignore,
        answers: Answers | None = None,
        linear: Linear = plain_linear,
    ) -> None:
        super().__init__()
        self.tokenizer, self.answers = tokenizer, Answers() if answers is None else answers
        self._batch_tokens = batch_tokens or BATCH_TOKENS.get(jax.default_backend(), 4096)
        self._params, self._events, self._linear = params, events, linear
        self._generator: Generator | None = None
        self._keys: dict[tuple[str, str], str] = {}  # of texts that were tokenized

    def answered(self, texts: tuple[str, str]) -> bool:
        """Whether the score of a context and its continuation is known."""
        return texts in self._keys and self.answers.get(self._keys[texts]) is not None

    # ---- what the harness asks of a model ---------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        stops = self._params.config.eos_token_ids
        token = self.tokenizer.eos_token_id
        if token is None and not stops:
            raise SpQRError("this model has no end-of-text token, which the harness needs to start and end texts")
        return stops[0] if token is None else token

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is conditioned on."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def max_length(self) -> int:
        """The model's context."""
        return self._params.config.max_positions

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where a task does not say: the harness's own default."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """Part of the name under which the harness keeps prepared requests."""
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__") or "spqr-jax"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model was trained to see."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise SpQRError("this model's tokenizer has no chat template: leave out --apply-chat-template")
        return render_chat(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer has them, but no second BOS where the text begins with one."""
        begin = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (begin and string.startswith(begin))
        return token_ids(self.tokenizer, string, add_special_tokens=add_special_tokens)

    # ---- the three kinds of request ----------------------------------------------------

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # our own display shows more

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = {key_of(context, continuation): (context, continuation) for _, context, continuation in requests}
        keys = [key_of(context, continuation) for _, context, continuation in requests]
        for (texts, _, _), key in zip(requests, keys, strict=True):
            if texts is not None:
                self._keys[texts] = key
        self._answer({key: pair for key, pair in pairs.items() if self.answers.get(key) is None})
        results = []
        for (texts, _, _), key in zip(requests, keys, strict=True):
            score = self.answers.get(key)
            assert score is not None
            results.append((score.log_probability, score.greedy))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, results[-1])
        return results

    def _answer(self, pairs: dict[str, tuple[list[int], list[int]]]) -> None:
        """Scores (context, continuation) by key and keeps each group's scores as soon as they are known."""
        keys = list(pairs)

        def keep(scores: dict[int, ContinuationScore]) -> None:
            self.answers.add({keys[index]: score for index, score in scores.items()})

        if keys:
            self._scores(list(pairs.values()), scored=keep)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Whole texts, each token once, in windows as long as the model's context."""
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(
                token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append((context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._scores(pairs), strict=True):
            totals[owner] += score.log_probability
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Texts up to a phrase, requests with the same settings and similar lengths together."""
        answers: dict[int, str] = {}
        encoded = [self.tok_encode(request.args[0]) for request in requests]
        by_settings: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_settings.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        steps = Steps("generating", len(requests), self._events)
        for members in by_settings.values():
            members.sort(key=lambda index: -len(encoded[index]))
            for index, text in self._generate(members, encoded, requests[members[0]].args[1]):
                answers[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
                steps.advance()
        return [answers[index] for index in range(len(requests))]

    # ---- how ----------------------------------------------------------------------------

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]], **options: Any) -> list[ContinuationScore]:
        options |= {"batch_tokens": self._batch_tokens, "events": self._events, "linear": self._linear}
        return continuation_scores(self._params, pairs, **options)

    def _generate(self, members: list[int], encoded: list[list[int]], settings: dict[str, Any]) -> Any:
        """(index, text) of requests that share their settings, the longest first."""
        if self._generator is None:
            self._generator = Generator(self._params)
        options = normalize_gen_kwargs(settings, self.max_gen_toks)
        new_tokens = options["max_gen_toks"]
        room = self.max_length - new_tokens
        if room < 1:
            raise DataError(
                f"a task asks for {new_tokens} new tokens, which leaves no room for a prompt in the model's context of "
                f"{self.max_length}: set fewer with --gen-kwargs max_gen_toks=N"
            )
        until = handle_stop_sequences(options.get("until"), eos=self.tokenizer.decode([self.eot_token_id]))

        def at_phrase(tokens: list[int]) -> bool:
            text = self.tokenizer.decode(tokens, skip_special_tokens=False)
            return any(phrase and phrase in text for phrase in until)

        while members:
            longest = min(len(encoded[members[0]]), room) + new_tokens
            batch = members[: max(1, self._batch_tokens // longest)]
            members = members[len(batch) :]
            generated = self._generator(
                [encoded[index][-room:] for index in batch],
                max_new_tokens=new_tokens,
                sampling=_sampling(options),
                stop_when=at_phrase,
            )
            for index, tokens in zip(batch, generated.tokens, strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                yield index, postprocess_generated_text(text, until, None)


def _sampling(options: Any) -> Sampling:
    if not options.get("do_sample") or not options.get("temperature"):
        return Sampling()
    return Sampling(options["temperature"], options.get("top_k", 0), options.get("top_p", 1.0))
