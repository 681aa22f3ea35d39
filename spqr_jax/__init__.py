"""Running large language models small, in JAX.

SpQR quantization (arXiv 2306.03078) as pure functions: `quantize` takes a model
and calibration text and returns the model with `SpQRArray`s for weights.
Importing this package needs jax and numpy only; everything else is imported
where it is used.
"""

from spqr_jax.array import SpQRArray
from spqr_jax.checkpoint import load, save
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import CheckpointError, DataError, ModelError, NotFiniteError, SpQRError
from spqr_jax.evaluate.perplexity import Perplexity, perplexity
from spqr_jax.events import Event
from spqr_jax.generate import Generation, Generator, generate
from spqr_jax.job.quantize import quantize
from spqr_jax.methods import quantize_weight
from spqr_jax.methods.report import LayerReport
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Block, Decoder, forward
from spqr_jax.parallel import ShardedDecoder, shard
from spqr_jax.products import linear, prepare
from spqr_jax.quantized import is_quantized
from spqr_jax.resolve import load_model
from spqr_jax.rules import LayerRule
from spqr_jax.sampling import Sampling
from spqr_jax.solver import Hessian, accumulate_hessian, empty_hessian
from spqr_jax.stream.windows import batched
from spqr_jax.tune.config import TuneConfig

__version__ = "0.2.0.dev0"  # the only place; pyproject.toml reads it, so it stays a literal

__all__ = [
    "Block",
    "CheckpointError",
    "DataError",
    "Decoder",
    "DecoderConfig",
    "Event",
    "Generation",
    "Generator",
    "Hessian",
    "LayerReport",
    "LayerRule",
    "ModelError",
    "NotFiniteError",
    "Perplexity",
    "Sampling",
    "ShardedDecoder",
    "SpQRArray",
    "SpQRConfig",
    "SpQRError",
    "TuneConfig",
    "accumulate_hessian",
    "batched",
    "empty_hessian",
    "forward",
    "generate",
    "is_quantized",
    "linear",
    "load",
    "load_model",
    "perplexity",
    "prepare",
    "quantize",
    "quantize_weight",
    "save",
    "shard",
]
