#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "matrix.h"

namespace spqr {

namespace {

constexpr int64_t kWorthAThread = 1 << 16;  // multiplications; fewer take less time than waking one

// Rotary embedding, halves paired as Hugging Face pairs them: to = scale (a cos - b sin, b cos + a sin).
void rotate(const float* from, const float* cos, const float* sin, int64_t dim, float scale, float* to) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = from[i], b = from[half + i];
    to[i] = scale * (a * cos[i] - b * sin[i]);
    to[half + i] = scale * (b * cos[i] + a * sin[i]);
  }
}

// Queries as they are multiplied, and what each span makes of them.
struct Scratch {
  int64_t share, dim, per_span;
  std::unique_ptr<float[]> q, spans;

  Scratch(const Attention& a, int64_t units)
      : share(a.share), dim(a.dim), per_span(a.share * (a.dim + 2)),
        q(new float[static_cast<size_t>(a.batch * a.kv_heads * a.share * a.dim)]),
        spans(new float[static_cast<size_t>(units * per_span)]) {}

  SpanResult result(int64_t unit) const {
    float* out = spans.get() + unit * per_span;
    return {out + share * dim, out + share * (dim + 1), out};
  }
};

// out = Σ exp(top - highest) out / Σ exp(top - highest) total, over the spans of a head from `unit` on.
void join(const Scratch& scratch, int64_t unit, int64_t spans, float* out) {
  for (int64_t s = 0; s < scratch.share; s++, out += scratch.dim) {
    float highest = -INFINITY, total = 0;
    for (int64_t i = 0; i < spans; i++) highest = std::max(highest, scratch.result(unit + i).top[s]);
    std::fill(out, out + scratch.dim, 0.0f);
    for (int64_t i = 0; i < spans; i++) {
      const SpanResult span = scratch.result(unit + i);
      const float weight = std::exp(span.top[s] - highest), *from = span.out + s * scratch.dim;
      total += weight * span.total[s];
      for (int64_t d = 0; d < scratch.dim; d++) out[d] += weight * from[d];
    }
    const float inverse = 1.0f / total;
    for (int64_t d = 0; d < scratch.dim; d++) out[d] *= inverse;
  }
}

}  // namespace

void attend(const Kernels& kernels, const Attention& a, const Threads& threads) {
  if (a.length < 1) return;
  const int64_t position = std::clamp<int64_t>(a.position, 0, a.length - 1), heads = a.batch * a.kv_heads;
  const int64_t spans = position / kSpan + 1;
  const Scratch scratch(a, heads * spans);
  const float scale = 1.0f / std::sqrt(static_cast<float>(a.dim));
  for (int64_t head = 0; head < heads; head++) {
    const float *cos = a.cos + head / a.kv_heads * (a.dim / 2), *sin = a.sin + head / a.kv_heads * (a.dim / 2);
    const int64_t slot = (head * a.length + position) * a.dim;
    rotate(a.k + head * a.dim, cos, sin, a.dim, 1.0f, a.keys + slot);
    std::memcpy(a.values + slot, a.v + head * a.dim, sizeof(float) * static_cast<size_t>(a.dim));
    for (int64_t s = head * a.share; s < (head + 1) * a.share; s++)
      rotate(a.q + s * a.dim, cos, sin, a.dim, scale, scratch.q.get() + s * a.dim);
  }
  const Threads alone;
  const bool worth = 2 * heads * a.share * a.dim * (position + 1) >= kWorthAThread;
  parallel_for(worth ? threads : alone, heads * spans, 1, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; unit++) {
      const int64_t head = unit / spans, begin = unit % spans * kSpan;
      const int64_t padding = std::clamp<int64_t>(a.padding[head / a.kv_heads], 0, position);
      const int64_t from = std::max(begin, padding), to = std::min(begin + kSpan, position + 1);
      const int64_t at = (head * a.length + from) * a.dim;
      kernels.attend(scratch.q.get() + head * a.share * a.dim, a.share, a.dim, a.keys + at, a.values + at,
                     std::max<int64_t>(0, to - from), scratch.result(unit));
    }
  });
  for (int64_t head = 0; head < heads; head++) join(scratch, head * spans, spans, a.out + head * a.share * a.dim);
}

}  // namespace spqr
