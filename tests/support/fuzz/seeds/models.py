"""Models as others write them: Hugging Face directories, GGUF files, tokenizers, chat templates."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.families import FAMILIES
from support.fuzz import mutate_gguf
from support.fuzz.seeds.small import new_folder, small_config, small_model, write_json


def hf_configs(folder: Path) -> None:
    """config.json of every family, as transformers writes it and as we do."""
    import transformers

    from support.family_files import VARIANTS, torch_config

    transformers.logging.set_verbosity_error()
    from spqr_jax.models.hf import hf_config

    for number, variant in enumerate(VARIANTS):
        values = torch_config(variant).to_dict() | {"architectures": [f"{VARIANTS[variant][0]}ForCausalLM"]}
        values = {name: value for name, value in values.items() if not name.startswith("_")}
        write_json(folder / f"{number:02d}", "config.json", values)
    for family in FAMILIES:
        write_json(folder / family, "config.json", hf_config(small_config(family)))


def hf_directories(folder: Path) -> None:
    """Whole models; one in several files, one with a tokenizer."""
    from support.model_files import byte_tokenizer, write_hf

    for family in FAMILIES:
        write_hf(new_folder(folder / family), small_model(small_config(family)), shards=2 if family == "qwen2" else 1)
    write_json(folder / "llama", "generation_config.json", {"eos_token_id": [2, 3], "temperature": 0.6, "top_p": 0.9})
    byte_tokenizer().save_pretrained(folder / "llama")


def safetensors_files(folder: Path) -> None:
    from safetensors.numpy import save_file

    types: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "int32": np.int32, "uint8": np.uint8}
    tensors = {name: np.arange(24).reshape(2, 3, 4).astype(kind) for name, kind in types.items()}
    save_file(
        tensors | {"scalar": np.zeros((), np.float32)},
        new_folder(folder / "one") / "model.safetensors",
        {"format": "pt"},
    )
    shards = {f"model-0000{n}-of-00002.safetensors": {f"t{n}": np.ones((n, 2), np.float32)} for n in (1, 2)}
    for name, held in shards.items():
        save_file(held, new_folder(folder / "two") / name)
    where = {tensor: name for name, held in shards.items() for tensor in held}
    write_json(folder / "two", "model.safetensors.index.json", {"metadata": {"total_size": 24}, "weight_map": where})


def quantized_directories(folder: Path) -> None:
    """A weight in each layout in which others quantize."""
    from safetensors.numpy import save_file

    from support.quantized_layouts import LAYOUTS, WEIGHT, module

    for name, (pack, quantization) in LAYOUTS.items():
        tensors = {key: np.ascontiguousarray(tensor) for key, tensor in module(pack(WEIGHT)[0]).items()}
        save_file(tensors, new_folder(folder / name) / "model.safetensors")
        write_json(folder / name, "config.json", {"model_type": "llama", "quantization_config": quantization})


def tokenizers(folder: Path) -> None:
    from support.model_files import byte_tokenizer

    byte_tokenizer().save_pretrained(new_folder(folder / "alone"))
    special = byte_tokenizer()
    special.add_special_tokens(
        {"eos_token": "<end>", "pad_token": "<pad>", "additional_special_tokens": ["<a>", "<b>"]}
    )
    special.save_pretrained(new_folder(folder / "special"))
    write_json(folder / "special", "config.json", {"model_type": "llama", "vocab_size": 260})


CHAT_TEMPLATES = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>",
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message.role == 'assistant' %}{{ message.content | trim + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    "{%- if tools %}{{ tools | tojson }}{%- endif %}{%- set ns = namespace(n=0) %}{%- for m in messages[::-1] %}"
    "{%- set ns.n = ns.n + 1 %}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}{{ strftime_now('%d') }}",
)


def chat_templates(folder: Path) -> None:
    from support.model_files import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    for number, template in enumerate(CHAT_TEMPLATES):
        tokenizer.save_pretrained(new_folder(folder / str(number)))
        (folder / str(number) / "chat_template.jinja").write_text(template)


# ---- GGUF -----------------------------------------------------------------------------------------


def gguf_files(folder: Path) -> None:
    """Every family that has them, in float32 and quantized, with both kinds of tokenizer."""
    import gguf

    from support.family_files import write_gguf

    kinds = (None, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0)
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(name for name, family in FAMILIES.items() if family.gguf and name != "mistral"):
            model = small_model(small_config(name))
            path = write_gguf(Path(scratch) / "m.gguf", model, kinds[number % 3], _gguf_keys(model.config))
            fields = mutate_gguf.parse(Path(path).read_bytes())
            fields.entries += _byte_level_entries() if number % 2 else _sentencepiece_entries()
            fields.count()
            (new_folder(folder / name) / "model.gguf").write_bytes(fields.to_bytes())
            if name == "llama":
                _write_split(new_folder(folder / "llama in two parts"), fields)


def _write_split(folder: Path, fields: mutate_gguf.GGUFFields) -> None:
    """The same model as llama.cpp's gguf-split cuts it: half of the tensors in each of two files."""
    half, begin = len(fields.tensors) // 2, 0
    for number, tensors in enumerate((fields.tensors[:half], fields.tensors[half:])):
        places = [int.from_bytes(tensor[-1].data, "little") for tensor in tensors]
        end = len(fields.rest) if number else int.from_bytes(fields.tensors[half][-1].data, "little")
        moved = [
            [*tensor[:-1], mutate_gguf.place_field(at - begin)] for tensor, at in zip(tensors, places, strict=True)
        ]
        split = {"split.no": number, "split.count": 2, "split.tensors.count": len(fields.tensors)}
        entries = [mutate_gguf.entry_fields(key, 4, value) for key, value in split.items()]
        part = dataclasses.replace(fields, tensors=moved, rest=fields.rest[begin:end])
        part.entries = entries + (fields.entries if number == 0 else [])
        part.begin = list(fields.begin)
        part.count()
        (folder / f"model-0000{number + 1}-of-00002.gguf").write_bytes(part.to_bytes())
        begin = end


def _gguf_keys(config: DecoderConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if config.sliding_window is not None:
        keys["attention.sliding_window"] = config.sliding_window
    if config.attention_softcap is not None:
        keys |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if config.num_experts:
        keys |= {"expert_count": config.num_experts, "expert_used_count": config.experts_per_token,
                 "expert_feed_forward_length": config.expert_size}  # fmt: skip
    return keys


def _byte_level_entries() -> list[mutate_gguf.Group]:
    tokens = ["<s>", "</s>", "Ġ", *"abcdefghijklmnopqrstuvwxyz", "th", "the"]
    entries = [("model", 8, "gpt2"), ("pre", 8, "qwen2"), ("tokens", 9, (8, tokens)),
               ("merges", 9, (8, ["t h", "th e"])),
               ("token_type", 9, (5, [3, 3, *[1] * (len(tokens) - 2)])), ("add_bos_token", 7, False),
               ("chat_template", 8, CHAT_TEMPLATES[0])]  # fmt: skip
    return _tokenizer_entries(entries)


def _sentencepiece_entries() -> list[mutate_gguf.Group]:
    tokens = ["<unk>", "<s>", "</s>", "<0x41>", "▁", "t", "h", "e", "th", "the", "▁the"]
    entries = [("model", 8, "llama"), ("tokens", 9, (8, tokens)), ("scores", 9, (6, [-float(i) for i in range(11)])),
               ("token_type", 9, (5, [2, 3, 3, 6, *[1] * 7])), ("unknown_token_id", 4, 0),
               ("add_space_prefix", 7, True)]  # fmt: skip
    return _tokenizer_entries(entries)


def _tokenizer_entries(entries: list[tuple[str, int, Any]]) -> list[mutate_gguf.Group]:
    made = [mutate_gguf.entry_fields(f"tokenizer.{'ggml.' * (name != 'chat_template')}{name}", kind, value)
            for name, kind, value in entries]  # fmt: skip
    return [*made, mutate_gguf.entry_fields("general.name", 8, "a tiny model")]
