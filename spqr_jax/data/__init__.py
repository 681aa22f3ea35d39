"""Token streams and windows for calibration and evaluation.

Protocols follow GPTQ's and SpQR's scripts, so that numbers can be compared:
texts are joined as noted for each name, tokenized as one stream without special
tokens, and cut into windows; calibration draws windows at random with a seed,
evaluation takes them side by side from the start. For models that are of no use
without it, each window begins with a BOS token, one token of text less in it.

The documents of a file of records are joined by "\n\n", blank ones left out;
conversations stand one after another, as the model's chat template renders them.
"""

from spqr_jax.data.at_hand import pychat_conversations, pydoc_text, pysource_text
from spqr_jax.data.corpora import CORPORA, Corpus, Split, join_sentences, join_wikitext
from spqr_jax.data.reading import DATA_HELP, Encode, Render, load_tokens, split_weight
from spqr_jax.data.windows import calibration_windows, evaluation_windows, mixed_windows, shares

__all__ = [
    "CORPORA",
    "DATA_HELP",
    "Corpus",
    "Encode",
    "Render",
    "Split",
    "calibration_windows",
    "evaluation_windows",
    "join_sentences",
    "join_wikitext",
    "load_tokens",
    "mixed_windows",
    "pychat_conversations",
    "pydoc_text",
    "pysource_text",
    "shares",
    "split_weight",
]
