"""Load a model, dense or quantized, and print its answer token by token.

Usage:
    python examples/load_and_generate.py                # the demo model, dense
    python examples/load_and_generate.py small          # the folder that quantize_and_save.py wrote
"""

import argparse

import spqr_jax

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="demo")
parser.add_argument("--question", default="Why is the sky blue?")
parser.add_argument("--max-new-tokens", type=int, default=80)
options = parser.parse_args()
params, tokenizer = spqr_jax.load_model(options.model)
generator = spqr_jax.Generator(params)  # prepares the weights once; call it as often as you like

messages = [{"role": "user", "content": options.question}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
prompt_tokens = tokenizer.encode(prompt, add_special_tokens=False)  # the template wrote the special tokens
tokens = []


def show(row, token):
    """Print the text that one more token adds. A character can need several tokens: it is held back until then."""
    before = tokenizer.decode(tokens).rstrip("\ufffd")
    tokens.append(token)
    print(tokenizer.decode(tokens).rstrip("\ufffd")[len(before) :], end="", flush=True)


sampling = spqr_jax.Sampling(temperature=0.7, top_p=0.9)  # leave it out for the most likely token each time
result = generator([prompt_tokens], max_new_tokens=options.max_new_tokens, sampling=sampling, seed=0, on_token=show)
print(f"\n{len(result.tokens[0])} tokens, {result.decode_tokens_per_second:.1f} tokens per second")
