"""SpQR in float64 NumPy, from the paper's algorithm 1, one column at a time. Slow, short, obvious."""

from __future__ import annotations

import numpy as np


def half(x):
    return np.asarray(x, np.float16).astype(np.float64)


def affine(low, high, maxq):
    """Scale and zero point of a min-max range; a constant is one step from the zero point."""
    if high == low:
        return abs(high), 1.0 if high < 0 else 0.0
    scale = (high - low) / maxq
    return scale, -low / scale


def rounded(w, scale, zero, maxq):
    return np.clip(np.round((w / scale if scale else 0 * w) + zero), 0, maxq)


def tile_fit(values, bits):
    """Second level over one tile: values = step * (code - origin)."""
    top, low, high = 2**bits - 1, values.min(), values.max()
    if high - low <= 2.0**-11 * max(abs(low), abs(high)):
        return half(high) * np.ones_like(values), np.zeros_like(values)
    step = half((high - low) / top)
    origin = half(-low / step)
    codes = np.clip(np.round(values / step + origin), 0, top)
    return step * (codes - origin), codes


def loo_gain(w, weight, maxq):
    """Fall of the group's weighted error when each weight is left out: g fits, no shortcut."""

    def errors(values, fit_on):
        scale, zero = affine(fit_on.min(), fit_on.max(), maxq)
        return (values - scale * (rounded(values, scale, zero, maxq) - zero)) ** 2

    total = np.sum(weight * errors(w, w))
    gains = []
    for i in range(len(w)):
        rest = np.delete(w, i)
        gains.append(total - np.sum(np.delete(weight, i) * errors(rest, rest)))
    return np.array(gains)


def spqr(w, h, *, bits, group, stats_bits, tile, tau, damping, order="activation"):
    """Returns codes [out, in], dense part [out, in], residual [out, in] (permuted columns) and perm."""
    w, h = np.array(w, np.float64), np.array(h, np.float64)
    out, inner = w.shape
    maxq = 2**bits - 1
    perm = np.argsort(-np.diag(h), kind="stable") if order == "activation" else np.arange(inner)
    w, h = w[:, perm], h[np.ix_(perm, perm)]
    h = h + np.diag(damping * np.mean(np.diag(h)) + (np.diag(h) == 0))
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    threshold = tau * np.mean(np.var(w, axis=0, ddof=1) / np.diag(u) ** 2)
    codes, dense, residual = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    for first in range(0, inner, group):
        cols = slice(first, first + group)
        weight = 1 / np.diag(u)[cols] ** 2
        low, high = np.empty(out), np.empty(out)
        for i in range(out):
            keep = loo_gain(w[i, cols], weight, maxq) <= threshold
            kept = w[i, cols][keep if 2 * keep.sum() >= len(keep) else slice(None)]
            low[i], high[i] = kept.min(), kept.max()
        scale, zero = np.array([affine(a, b, maxq) for a, b in zip(low, high, strict=True)]).T
        for t in range(0, out, tile):
            scale[t : t + tile] = tile_fit(scale[t : t + tile], stats_bits)[0]
        zero = maxq / 2 - (low + high) / 2 / scale
        for t in range(0, out, tile):
            zero[t : t + tile] = tile_fit(zero[t : t + tile], stats_bits)[0]
        for j in range(first, first + group):
            codes[:, j] = [rounded(w[i, j], scale[i], zero[i], maxq) for i in range(out)]
            dense[:, j] = scale * (codes[:, j] - zero)
            miss = w[:, j] - dense[:, j]
            residual[:, j] = np.where((miss / u[j, j]) ** 2 > threshold, half(miss), 0)
            error = (miss - residual[:, j]) / u[j, j]
            w[:, j + 1 :] -= np.outer(error, u[j, j + 1 :])
    return codes, dense, residual, perm
