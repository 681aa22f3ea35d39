// One token's attention over a cache of keys and values, float32.
#pragma once

#include <cstdint>

#include "threads.h"

namespace spqr {

struct Kernels;

// `share` query heads read one head of keys and values. Positions outside the cache are clipped to it.
struct Attention {
  int64_t batch = 0, kv_heads = 0, share = 0, dim = 0;  // dim: a multiple of kTile
  int64_t length = 0;                                   // positions that the cache has room for
  int64_t position = 0;                                 // of the token
  const int32_t* padding = nullptr;                     // [batch], positions at the start that are not looked at
  const float* cos = nullptr;                           // [batch][dim / 2], rotary angles of the token
  const float* sin = nullptr;
  const float* q = nullptr;  // [batch][kv_heads][share][dim], not rotated
  const float* k = nullptr;  // [batch][kv_heads][dim], not rotated
  const float* v = nullptr;
  float* keys = nullptr;  // [batch][kv_heads][length][dim]; position's are written
  float* values = nullptr;
  float* out = nullptr;  // as q
};

constexpr int64_t kSpan = 64;  // positions that are looked at together

// What one head's queries make of one span of positions. Softmax over all of them is put together from such.
struct SpanResult {
  float *top, *total;  // [share]: the largest score, and the sum of exp(score - top)
  float* out;          // [share][dim], the sum of exp(score - top) value
};

// Queries [share][dim], scaled, against `count` positions whose keys and values start at the pointers.
using SpanOfPositions = void (*)(const float* q, int64_t share, int64_t dim, const float* keys, const float* values,
                                 int64_t count, const SpanResult& result);

void attend(const Kernels& kernels, const Attention& attention, const Threads& threads);

}  // namespace spqr
