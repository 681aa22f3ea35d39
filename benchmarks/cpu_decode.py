#!/usr/bin/env python3
"""Tokens a second of a quantized model on this CPU, against other programs.

    spqr quantize demo --out small --calib pydoc --nsamples 16 --seqlen 1024
    python benchmarks/cpu_decode.py small --dense demo --bfloat16 --torch --gguf SmolLM2-135M-Instruct.Q4_1.gguf

What `spqr bench` measures, in the same way, and beside it PyTorch (transformers' own
model of the same shape with random weights, which take the same time) and llama.cpp
(`pip install llama-cpp-python` compiles it for this processor). All are in one process
and take turns; every one uses all processors.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spqr_jax.cli.bench import candidates, show, summary
from spqr_jax.cli.display import console, progress_bar, say, write_json
from spqr_jax.cli.stream import describe_products
from spqr_jax.generate import Generator
from spqr_jax.models.config import DecoderConfig
from spqr_jax.speed import Rival, generating, read_bandwidth, take_turns


def torch_rival(config: DecoderConfig, threads: int) -> Rival:
    """transformers' Llama in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_positions,
            tie_word_embeddings=config.tied_head,
        )
    ).eval()

    def run(prompt: Sequence[int], new_tokens: int) -> tuple[float, float]:
        with torch.no_grad():
            begun = time.perf_counter()
            out = model(torch.tensor([list(prompt)]), use_cache=True, logits_to_keep=1)
            prefill = time.perf_counter() - begun
            for _ in range(new_tokens - 1):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return prefill, time.perf_counter() - begun - prefill

    return run


def llama_rival(path: Path, context: int, threads: int) -> Rival:
    """llama.cpp with a GGUF file."""
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)

    def likeliest() -> int:
        scores = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.argmax(np.ctypeslib.as_array(scores, (model.n_vocab(),))))

    def run(prompt: Sequence[int], new_tokens: int) -> tuple[float, float]:
        model.reset()
        begun = time.perf_counter()
        model.eval(list(prompt))
        token = likeliest()
        prefill = time.perf_counter() - begun
        for _ in range(new_tokens - 1):
            model.eval([token])
            token = likeliest()
        return prefill, time.perf_counter() - begun - prefill

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory that spqr wrote")
    parser.add_argument("--dense", default="demo", help="the model it was made from")
    parser.add_argument("--bfloat16", action="store_true", help="the dense model in bfloat16 as well (slow)")
    parser.add_argument("--torch", action="store_true", help="PyTorch, float32")
    parser.add_argument("--gguf", type=Path, action="append", default=[], help="a file for llama.cpp; repeatable")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    threads = os.cpu_count() or 1
    models = candidates(given.model, given.dense, given.bfloat16)
    config = models["dense float32"].config
    rivals = {name: generating(Generator(params)) for name, params in models.items()}
    wanted = {"PyTorch float32": lambda: torch_rival(config, threads)} if given.torch else {}
    for path in given.gguf:
        name = f"llama.cpp {path.stem.rpartition('.')[2]}"
        wanted[name] = lambda path=path: llama_rival(path, 2 * (given.prompt_tokens + given.new_tokens), threads)
    for name, make in wanted.items():
        try:
            rivals[name] = make()
        except ImportError as error:
            say(f"{name} is left out: {error}")
    console.print(f"{threads} processors, load {os.getloadavg()[0]:.1f}; {describe_products()}", markup=False)
    bandwidth = read_bandwidth()
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, given.prompt_tokens).tolist()
    with progress_bar("generating", (given.turns + 1) * len(rivals)) as advance:
        speeds = take_turns(rivals, prompt, given.new_tokens, given.turns, advance)
    results = {name: summary(speed, models.get(name)) for name, speed in speeds.items()}
    show(f"{given.model}; {bandwidth:.1f} GB/s of memory", results)
    write_json(given.json, {"read_bandwidth_gb_s": bandwidth, "results": results})


if __name__ == "__main__":
    main()
