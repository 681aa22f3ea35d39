"""How text is cut into words before the merges of a byte-level BPE: what ``tokenizer.ggml.pre`` stands for.

The rules, their names, and what each name decides beside them are those of
llama.cpp's src/llama-vocab.cpp. A rule is a list of regular expressions that are
applied one after another; what one finds, and what lies between, are cut by the
next on their own. Where llama.cpp writes down the original expression of a model
beside one that its own engine can run, the original stands here.

Left out are names whose rules are code, not expressions (kimi-k2, afmoe), and
those of vocabularies that are not byte-level (gemma4, sarvam-moe, whitespace).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Words:
    """What a name of ``tokenizer.ggml.pre`` stands for.

    Attributes:
      regexes: applied one after another.
      ignore_merges: a word that is a token stays whole, whatever the merges say.
      add_bos: a text begins with BOS where the file has no ``add_bos_token``.
    """

    regexes: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_SHORT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"  # 's, 't, 're, ... in either case
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_SHORT}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_SHORT}|{_LETTERS}|\p{{N}}|{_REST}"


def _cased(numbers: str, ending: str = "") -> str:
    """Words that are cut where a capital follows small letters; `ending` may close one."""
    before = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{before}{_UPPER}*{_LOWER}+{ending}|{before}{_UPPER}+{_LOWER}*{ending}"
    return rf"{words}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_GPT4O = _cased(r"\p{N}{1,3}", rf"{_SHORT}?")

_ASCII_MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_CHINESE_JAPANESE = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3_WORDS = _ASCII_MARKS + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"

# DeepSeek LLM lists letters that have a case; first and last of each range.
_LETTERS_WITH_CASE = (
    "A-Z a-z \u00b5 \u00c0-\u00d6 \u00d8-\u00f6 \u00f8-\u01ba \u01bc-\u01bf \u01c4-\u0293 \u0295-\u02af \u0370-\u0373 "
    "\u0376 \u0377 \u037b-\u037d \u037f \u0386 \u0388-\u038a \u038c \u038e-\u03a1 \u03a3-\u03f5 \u03f7-\u0481 "
    "\u048a-\u052f \u0531-\u0556 \u10a0-\u10c5 \u13a0-\u13f5 \u13f8-\u13fd \u1c90-\u1cba \u1cbd-\u1cbf \u1d00-\u1d2b "
    "\u1d6b-\u1d77 \u1d79-\u1d9a \u1e00-\u1f15 \u1f18-\u1f1d \u1f20-\u1f45 \u1f48-\u1f4d \u1f50-\u1f57 \u1f59 \u1f5b "
    "\u1f5d \u1f5f-\u1f7d \u1f80-\u1fb4 \u1fb6-\u1fbc \u1fbe \u1fc2-\u1fc4 \u1fc6-\u1fcc \u1fd0-\u1fd3 \u1fd6-\u1fdb "
    "\u1fe0-\u1fec \u1ff2-\u1ff4 \u1ff6-\u1ffc \u2102 \u2107 \u210a-\u2113 \u2115 \u2119-\u211d \u2124 \u2126 \u2128 "
    "\u212a-\u212d \u212f-\u2134 \u2139 \u213c-\u213f \u2145-\u2149 \u214e \u2183 \u2184 \u2c00-\u2c7b \u2c7e-\u2ce4 "
    "\u2ceb-\u2cee \u2cf2 \u2cf3 \ua640-\ua66d \ua680-\ua69b \ua722-\ua76f \ua771-\ua787 \ua78b-\ua78e \uab70-\uabbf "
    "\ufb00-\ufb06 \ufb13-\ufb17 \uff21-\uff3a \uff41-\uff5a \U00010400-\U0001044f \U000104b0-\U000104d3 "
    "\U000104d8-\U000104fb \U00010c80-\U00010cb2 \U00010cc0-\U00010cf2 \U000118a0-\U000118df \U0001e900-\U0001e943"
).replace(" ", "")
_DEEPSEEK_IDEOGRAPHS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_MARKS_END_WORDS = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

_RULES: tuple[tuple[str, Words], ...] = (
    ("default", Words((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    (
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code "
        "roberta-bpe exaone4 mpt olmo jais trillion granite-docling",
        Words((_GPT2,)),
    ),
    ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", Words((r"\p{N}", _GPT2))),
    (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        Words((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe glm4 chatglm-bpe", Words((_LLAMA3,))),
    (
        "jais-2",
        Words(
            (
                rf"{_SHORT}|{_LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
                + "|".join(
                    rf"\s{{{count}}}(?!\S)" for count in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")
                )
                + r"|\s{1}",
            )
        ),
    ),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2", Words((_QWEN2,))),
    ("ufakzeka", Words((rf"{_LETTERS}|\p{{N}}|{_REST}",))),
    (
        "qwen35",
        Words(
            (
                rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|"
                + _SPACES,
            )
        ),
    ),
    ("minicpm5", Words((r"\p{N}{1,3}", rf"{_SHORT}|{_LETTERS}|\p{{N}}+|{_REST}"), ignore_merges=True)),
    ("laguna", Words((r"[^\n]+|[\n]+", _QWEN2))),
    (
        "seed-coder",
        Words((rf"{_SHORT}|{_LETTERS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)),
    ),
    (
        "bailingmoe bailingmoe2 llada-moe",
        Words((rf"{_SHORT}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",)),
    ),
    (
        "exaone-moe",
        Words(
            (
                rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    ("tekken", Words((_cased(r"\p{N}"),), ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", Words((_GPT4O,))),
    ("granite-embed-multi-97m", Words((_GPT4O,), ignore_merges=True)),
    ("tiny_aya cohere2moe", Words((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))),
    (
        "youtu",
        Words(
            (
                "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
                f"\ufe30-\ufe4f]+|[\u3105-\u312f]+|{_CHINESE_JAPANESE}",
                _cased(r"\p{N}", rf"{_SHORT}?"),
            ),
            ignore_merges=True,
        ),
    ),
    ("falcon", Words((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    (
        "deepseek-llm",
        Words(
            (
                "[\r\n]",
                rf"\s?[{_LETTERS_WITH_CASE}]+",
                "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
                r"\s+$",
                _DEEPSEEK_IDEOGRAPHS,
                r"\p{N}+",
            )
        ),
    ),
    ("deepseek-coder", Words(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_IDEOGRAPHS, r"\p{N}"))),
    (
        "deepseek-v3 hunyuan-dense hy_v4 joyai-llm",
        Words((r"\p{N}{1,3}", _CHINESE_JAPANESE, rf"{_DEEPSEEK3_WORDS}[\r\n]*|{_SPACES}")),
    ),
    (
        "spark2_5",
        Words(
            (r"\p{N}{1,3}", _CHINESE_JAPANESE, rf"{_DEEPSEEK3_WORDS}|[\r\n]|\s+(?!\S)|\s+", r"\p{N}"),
        ),
    ),
    ("poro-chat bloom gpt3-finnish", Words((_MARKS_END_WORDS,))),
    ("viking", Words((_MARKS_END_WORDS, r"\p{N}"))),
    (
        "chameleon",
        Words(
            (
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            add_bos=True,
        ),
    ),
    ("superbpe", Words((r"\p{N}+", r"(?=(\d{3})+(?!\d))"))),
)

PRE_TOKENIZERS = {name: words for names, words in _RULES for name in names.split()}
"""By the names that ``tokenizer.ggml.pre`` may have."""
