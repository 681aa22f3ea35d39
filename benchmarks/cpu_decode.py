#!/usr/bin/env python3
"""Compares tokens per second of a quantized model on this CPU with the dense model, PyTorch and llama.cpp.

    spqr quantize demo --out small --calib pydoc --nsamples 16 --seqlen 1024
    python benchmarks/cpu_decode.py small --dense demo --bfloat16 --torch --gguf SmolLM2-135M-Instruct.Q4_1.gguf

The packed and dense models are measured as by `spqr bench`. PyTorch runs transformers' model of the same shape with
random weights; their values do not change the time. `pip install llama-cpp-python` compiles llama.cpp for this
processor. All rivals run in one process, take turns and use all processors.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from timings import GenerationRow, add_csv_options, check_csv, save

from spqr_jax.generate import Generator
from spqr_jax.models.config import DecoderConfig
from spqr_jax.speed import Rival, Speed, generating, read_bandwidth, take_turns
from spqr_jax.terminal.display import console, say, write_json
from spqr_jax.terminal.models import candidates, describe_products, show, summary
from spqr_jax.terminal.progress import progress_bar


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


def row_of(
    rival: str, speeds: dict[str, Speed], result: dict[str, Any], bandwidth: float, given: argparse.Namespace
) -> dict[str, Any]:
    """The columns of `GenerationRow` for one rival."""
    decode, prefill = (float(np.median(values)) for values in (speeds[rival].decode, speeds[rival].prefill))
    dense, llama = speeds["dense float32"], speeds.get("llama.cpp Q4_1")
    return {
        "memory_gb_per_s": bandwidth,
        "model": Path(given.model).name,
        "rival": rival,
        "turns": given.turns,
        "prompt_tokens": given.prompt_tokens,
        "new_tokens": given.new_tokens,
        "tokens_per_s": decode,
        "least_tokens_per_s": float(speeds[rival].decode.min()),
        "most_tokens_per_s": float(speeds[rival].decode.max()),
        "ratio_to_dense_f32": decode / float(np.median(dense.decode)),
        "ratio_to_llama_q4_1": None if llama is None else decode / float(np.median(llama.decode)),
        "prefill_tokens_per_s": prefill,
        "prefill_ratio_to_dense_f32": prefill / float(np.median(dense.prefill)),
        "weights_mb": result["bytes"] / 1e6 if "bytes" in result else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory that spqr wrote")
    parser.add_argument("--dense", default="demo", help="the dense model that it was quantized from")
    parser.add_argument("--bfloat16", action="store_true", help="also measure the dense model in bfloat16 (slow)")
    parser.add_argument("--torch", action="store_true", help="also measure PyTorch in float32")
    parser.add_argument(
        "--gguf", type=Path, action="append", default=[], help="also measure llama.cpp with this file; repeatable"
    )
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this JSON file")
    add_csv_options(parser, "generation.csv")
    given = parser.parse_args()
    check_csv(parser, given.csv, GenerationRow)
    threads = os.cpu_count() or 1
    models = candidates(given.model, given.dense, given.bfloat16)
    config = models["dense float32"].config
    rivals = {name: generating(Generator(params)) for name, params in models.items()}
    others = {"PyTorch float32": lambda: torch_rival(config, threads)} if given.torch else {}
    for path in given.gguf:
        name = f"llama.cpp {path.stem.rpartition('.')[2]}"
        others[name] = lambda path=path: llama_rival(path, 2 * (given.prompt_tokens + given.new_tokens), threads)
    for name, make in others.items():
        try:
            rivals[name] = make()
        except ImportError as error:
            say(f"{name} is not measured: {error}")
    console.print(f"{threads} processors, load {os.getloadavg()[0]:.1f}; {describe_products()}", markup=False)
    bandwidth = read_bandwidth()
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, given.prompt_tokens).tolist()
    with progress_bar("generating", (given.turns + 1) * len(rivals)) as advance:
        speeds = take_turns(rivals, prompt, given.new_tokens, given.turns, advance)
    results = {name: summary(speed, models.get(name)) for name, speed in speeds.items()}
    show(f"{given.model}; {bandwidth:.1f} GB/s of memory", results)
    write_json(given.json, {"read_bandwidth_gb_s": bandwidth, "results": results})
    rows = [row_of(name, speeds, results[name], bandwidth, given) for name in speeds]
    save(given.csv, GenerationRow, given, rows)


if __name__ == "__main__":
    main()
