"""`spqr generate`: text from a model."""

from __future__ import annotations

import sys
from typing import Annotated, Any

from spqr_jax.cli.display import number, say, write_json
from spqr_jax.cli.help import COMPUTATION, flag, option
from spqr_jax.cli.options import Dtype, Json, Model
from spqr_jax.cli.stream import TextStream, converse, encode_prompts, read_prompts
from spqr_jax.errors import SpQRError
from spqr_jax.generate import Generation
from spqr_jax.models.tokenizer import pick_template
from spqr_jax.resolve import open_model
from spqr_jax.sampling import Sampling
from spqr_jax.terminal.models import load_generator

PROMPT, GENERATION = "Prompt", "Generation"


def generate(
    model: Model,
    prompt: Annotated[
        list[str] | None, option(PROMPT, "TEXT", "Text to continue. Repeatable.", show_default="read from stdin")
    ] = None,
    chat: Annotated[
        bool,
        flag(
            PROMPT,
            "--chat",
            "Send the prompt as a user's message, in the model's chat template. Without a prompt, at a terminal: start "
            "a conversation.",
        ),
    ] = False,
    chat_template: Annotated[
        str | None,
        option(PROMPT, "NAME", "With --chat: one of the model's chat templates by name, or a Jinja file."),
    ] = None,
    max_new_tokens: Annotated[int, option(GENERATION, "N", "Stop after this many new tokens.", min=1)] = 128,
    temperature: Annotated[
        float,
        option(GENERATION, "T", "Randomness. 0: always take the most likely token; 1: the model's probabilities."),
    ] = 0.0,
    top_k: Annotated[int, option(GENERATION, "K", "Draw from the K most likely tokens only. 0: from all.")] = 0,
    top_p: Annotated[
        float, option(GENERATION, "P", "Draw from the most likely tokens that together have probability P only.")
    ] = 1.0,
    seed: Annotated[int, option(GENERATION, "N", "Seed for the random choice of tokens.")] = 0,
    int8_activations: Annotated[
        bool,
        flag(
            COMPUTATION,
            "--int8-activations",
            "On a CPU: round activations to 8 bits. Faster, with an error of about 0.5% per matrix product.",
        ),
    ] = False,
    mesh: Annotated[
        str | None,
        option(
            COMPUTATION,
            "model=N",
            "Let N devices share the model. It must have been quantized with --input-shards N (or a multiple), or with "
            "--order identity.",
            show_default="one device",
        ),
    ] = None,
    dtype: Dtype = None,
    json: Json = None,
) -> None:
    """Continue a text, or chat with a model."""
    sampling = Sampling(temperature, top_k, top_p)
    if chat_template is not None and not chat:
        raise SpQRError("--chat-template needs --chat: add --chat, or leave --chat-template out")
    opened = open_model(model, dtype, say)
    tokenizer = opened.tokenizer()
    template = pick_template(tokenizer, chat_template) if chat else None

    def answer(ids: list[list[int]], stream: TextStream) -> Generation:
        return generator(
            ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            on_token=lambda row, token: stream.put(token),
        )

    context = opened.source.config.max_positions
    if chat and not prompt and sys.stdin is not None and sys.stdin.isatty():
        generator = load_generator(opened.source, int8_activations, mesh)
        converse(
            tokenizer,
            lambda ids, stream: answer([ids], stream),
            template,
            lambda result: describe_ends(result, max_new_tokens, context),
        )
        return
    prompts = read_prompts(prompt)
    ids = encode_prompts(tokenizer, prompts, chat, template)
    generator = load_generator(opened.source, int8_activations, mesh)
    stream = TextStream(tokenizer, live=len(prompts) == 1)
    result = answer(ids, stream)
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in result.tokens]
    stream.finish(prompts, texts)
    say(describe_ends(result, max_new_tokens, context))
    say(
        f"{sum(map(len, result.tokens))} tokens at {number(result.decode_tokens_per_second, 1)} tokens/s; "
        f"prompt of {max(result.prompt_tokens)} tokens read in {result.prefill_seconds:.2f} s; "
        f"{result.compile_seconds:.1f} s to compile"
    )
    write_json(json, _as_json(result, texts))


def describe_ends(result: Generation, asked: int, context: int) -> str:
    """Why each text ended, in words.

    Args:
      result: what was generated.
      asked: tokens that were asked for.
      context: tokens that the model's context holds.
    """
    words = []
    for tokens, why in zip(result.tokens, result.ended, strict=True):
        if why == "stop":
            words.append("the model ended its text")
        elif why == "length":
            words.append(f"stopped after {asked} tokens (--max-new-tokens)")
        else:
            words.append(
                f"stopped after {len(tokens)} of {asked} tokens: the model's context of {context} tokens is full"
            )
    if len(words) == 1:
        return words[0]
    return "; ".join(f"prompt {row}: {word}" for row, word in enumerate(words))


def _as_json(result: Generation, texts: list[str]) -> dict[str, Any]:
    """Values of each prompt in lists, or plain ones if there is only one."""
    by_prompt: dict[str, list[Any]] = {
        "text": texts,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": [len(tokens) for tokens in result.tokens],
        "ended": result.ended,
    }
    return {
        **{name: values if len(texts) > 1 else values[0] for name, values in by_prompt.items()},
        "prefill_seconds": result.prefill_seconds,
        "decode_tokens_per_second": result.decode_tokens_per_second,
        "first_token_seconds": result.first_token_seconds,
        "compile_seconds": result.compile_seconds,
    }
