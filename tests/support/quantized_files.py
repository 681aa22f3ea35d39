"""Weights as other programs quantize and pack them, written from their documents, a code at a time.

Each packer takes a weight [out, in] and gives the tensors of its module and the dense
weight that they stand for. Nothing here is shared with what reads them.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np


def words_of(codes, bits):
    """Codes one after the other, the first in the lowest bits, cut into words of 32."""
    stream = sum(int(code) << (place * bits) for place, code in enumerate(codes))
    count = math.ceil(len(codes) * bits / 32)
    return np.array([(stream >> (32 * word)) & 0xFFFFFFFF for word in range(count)], np.uint32).view(np.int32)


def round_to_groups(weight, bits, order, groups):
    """Codes [out, in], scales and zeros [out, groups] (float16 numbers, whole numbers), and the dense weight."""
    most = 2**bits - 1
    codes, dense = np.zeros(weight.shape, int), np.zeros(weight.shape, np.float32)
    scales = np.ones((len(weight), groups), np.float16)
    zeros = np.zeros((len(weight), groups), int)
    for group in range(groups):
        inputs = np.flatnonzero(order == group)
        part = weight[:, inputs]
        low, high = np.minimum(part.min(1), -1e-3), np.maximum(part.max(1), 1e-3)
        scale = ((high - low) / most).astype(np.float16)
        step = scale.astype(np.float32)[:, None]
        zero = np.clip(np.round(-low[:, None] / step), 1, most).astype(int)
        code = np.clip(np.round(part / step) + zero, 0, most).astype(int)
        codes[:, inputs], scales[:, group], zeros[:, group] = code, scale, zero[:, 0]
        dense[:, inputs] = (code - zero).astype(np.float32) * step
    return codes, scales, zeros, dense


def neighbours(inputs, size):
    return np.arange(inputs) // size


def gptq(weight, bits=4, size=16, order=None, less_one=True):
    """As AutoGPTQ's qlinear_cuda.py, and GPTQModel's v2 where `less_one` is False."""
    order = neighbours(weight.shape[1], size) if order is None else order
    groups = int(order.max()) + 1
    codes, scales, zeros, dense = round_to_groups(weight, bits, order, groups)
    tensors = {
        "qweight": np.stack([words_of(row, bits) for row in codes], axis=1),
        "qzeros": np.stack([words_of(zeros[:, group] - less_one, bits) for group in range(groups)]),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": order.astype(np.int32),
    }
    return tensors, dense


def awq(weight, size=16):
    """As AutoAWQ's modules/linear/gemm.py."""
    order = neighbours(weight.shape[1], size)
    codes, scales, zeros, dense = round_to_groups(weight, 4, order, int(order.max()) + 1)

    def words(outputs):
        eights = [outputs[first : first + 8] for first in range(0, len(outputs), 8)]
        return np.concatenate([words_of([eight[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)], 4) for eight in eights])

    tensors = {
        "qweight": np.stack([words(codes[:, column]) for column in range(weight.shape[1])]),
        "qzeros": np.stack([words(zeros[:, group]) for group in range(zeros.shape[1])]),
        "scales": np.ascontiguousarray(scales.T),
    }
    return tensors, dense


def compressed(weight, bits=4, size=16, symmetric=False, order=None):
    """As compressed-tensors' pack_quantized: signed codes, stored plus half their range."""
    given, order = order, neighbours(weight.shape[1], size) if order is None else order
    codes, scales, zeros, dense = round_to_groups(weight, bits, order, int(order.max()) + 1)
    tensors = {
        "weight_packed": np.stack([words_of(row, bits) for row in codes]),
        "weight_scale": scales,
        "weight_shape": np.array(weight.shape, np.int64),
    }
    if symmetric:  # a coarser scale, around zero
        scales = np.float16(2) * scales
        half, columns = 2 ** (bits - 1), scales.astype(np.float32)[:, order]
        codes = np.clip(np.round(weight / columns), -half, half - 1).astype(int)
        dense = codes.astype(np.float32) * columns
        tensors |= {"weight_packed": np.stack([words_of(row + half, bits) for row in codes]), "weight_scale": scales}
    else:
        tensors["weight_zero_point"] = np.stack([words_of(column, bits) for column in zeros.T], axis=1)
    if given is not None:
        tensors["weight_g_idx"] = order.astype(np.int32)
    return tensors, dense


def float8(weight, block=(32, 32), scale="weight_scale_inv", kind=ml_dtypes.float8_e4m3fn):
    """A float8 weight with a scale for each block; the last blocks may be smaller."""
    rows, columns = (math.ceil(weight.shape[axis] / block[axis]) for axis in (0, 1))
    codes, dense = np.zeros(weight.shape, kind), np.zeros(weight.shape, np.float32)
    scales = np.zeros((rows, columns), np.float32)
    for row in range(rows):
        for column in range(columns):
            part = np.s_[row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]]
            scales[row, column] = np.abs(weight[part]).max() / 448
            codes[part] = (weight[part] / scales[row, column]).astype(kind)
            dense[part] = codes[part].astype(np.float32) * scales[row, column]
    return {"weight": codes, scale: scales}, dense


def int8(weight):
    """One scale a row, as compressed-tensors' int-quantized."""
    scales = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float32)
    codes = np.round(weight / scales).astype(np.int8)
    return {"weight": codes, "weight_scale": scales}, codes.astype(np.float32) * scales


def quantized_tensors(tensors, pack, skip=()):
    """A model's tensors with every matrix but the embedding packed, and the dense ones that they stand for."""
    packed, dense = {}, {}
    for name, value in tensors.items():
        module = name.removesuffix(".weight")
        if value.ndim != 2 or module.endswith(("embed_tokens", *skip)):
            packed[name] = dense[name] = value
            continue
        parts, dense[name] = pack(np.asarray(value, np.float32))
        packed |= {f"{module}.{part}": np.ascontiguousarray(tensor) for part, tensor in parts.items()}
    return packed, dense
