"""Models and tokenizers as directories of files."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spqr_jax.models.hf import hf_config, hf_tensors


def write_hf(directory, model, shards=1, config=None, tensors=None):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config or hf_config(model.config)))
    tensors = hf_tensors(model) if tensors is None else tensors
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[shard::shards]}, directory / file)
        index |= dict.fromkeys(names[shard::shards], file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return directory


def byte_tokenizer():
    """Each byte a token: 256 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    return fast


def write_model_and_ids(folder, model, *, eos_token=None):
    """Fills `folder`: the model as ``model`` with a byte tokenizer (`eos_token` ends a text), ``ids.npy``."""
    write_hf(folder / "model", model)
    tokenizer = byte_tokenizer()
    if eos_token is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos_token)
    tokenizer.save_pretrained(folder / "model")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 256, 2000))
    return folder
