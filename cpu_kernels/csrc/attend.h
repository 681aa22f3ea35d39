// A span of positions in one token's attention. Included after a simd_*.h, inside a namespace of one instruction set.

// e^x for x <= 0 to one unit in the last place or so: e^x = 2^n e^r with |r| <= ln 2 / 2, e^r by its series.
SPQR_INLINE float exp_below_one(float x) {
  constexpr float kRounding = 12582912.0f;             // 1.5 * 2^23: adding it leaves no fraction
  constexpr float kLn2High = 0.693359375f;             // few bits, so that n times it is exact
  constexpr float kLn2Low = -2.12194440054690583e-4f;  // ln 2 less that
  x = x < -87.0f ? -87.0f : x;  // 2^-126: nothing beside 1
  const float n = (x * 1.44269504088896341f + kRounding) - kRounding;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float series = 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return series * power;
}

// scores = q keys, for one query.
SPQR_INLINE void score(const float* q, const float* keys, int64_t count, int64_t dim, float* scores) {
  constexpr int64_t kKeys = 4;
  for (int64_t first = 0; first < count; first += kKeys) {
    F sum[kKeys];
    const float* key[kKeys];
    for (int64_t i = 0; i < kKeys; i++) {
      sum[i] = zero();
      key[i] = keys + (first + i < count ? first + i : first) * dim;
    }
    for (int64_t d = 0; d < dim; d += kLanes) {
      const F of_q = load(q + d);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kKeys; i++) sum[i] = fma(of_q, load(key[i] + d), sum[i]);
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < kKeys; i++) scores[first + i] = sum_of(sum[i]);  // the array has room for whole fours
  }
}

// Scores [kSpan], -infinity where there is no position, to exp(score - top); returns top, and the sum.
SPQR_INLINE float to_weights(float* scores, float* total) {
  constexpr int64_t kApart = 16;
  float top[kApart], sum[kApart];
  std::memcpy(top, scores, sizeof top);
  for (int64_t i = kApart; i < kSpan; i += kApart)
    for (int64_t j = 0; j < kApart; j++) top[j] = scores[i + j] > top[j] ? scores[i + j] : top[j];
  float highest = top[0];
  for (int64_t j = 1; j < kApart; j++) highest = top[j] > highest ? top[j] : highest;
  for (int64_t j = 0; j < kApart; j++) sum[j] = 0;
  for (int64_t i = 0; i < kSpan; i += kApart)
    for (int64_t j = 0; j < kApart; j++) {
      scores[i + j] = exp_below_one(scores[i + j] - highest);
      sum[j] += scores[i + j];
    }
  *total = 0;
  for (int64_t j = 0; j < kApart; j++) *total += sum[j];
  return highest;
}

// out = Σ weight value, for kQueries queries.
template <int kQueries>
SPQR_INLINE void weigh(const float (*weights)[kSpan], const float* values, int64_t count, int64_t dim, float* out) {
  constexpr int kVectors = kTile / kLanes;
  for (int64_t d = 0; d < dim; d += kTile) {
    F sum[kQueries][kVectors];
    for (int s = 0; s < kQueries; s++)
      for (int i = 0; i < kVectors; i++) sum[s][i] = zero();
    const float* value = values + d;
    for (int64_t key = 0; key < count; key++, value += dim)
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; i++) {
        const F of_value = load(value + kLanes * i);
#pragma GCC unroll 4
        for (int s = 0; s < kQueries; s++) sum[s][i] = fma(of_value, splat(weights[s][key]), sum[s][i]);
      }
    for (int s = 0; s < kQueries; s++)
      for (int i = 0; i < kVectors; i++) store(out + s * dim + d + kLanes * i, sum[s][i]);
  }
}

void attend_span(const float* q, int64_t share, int64_t dim, const float* keys, const float* values, int64_t count,
                 const SpanResult& result) {
  constexpr int64_t kAtOnce = 4;
  const int64_t bytes = count * dim * 4;
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(reinterpret_cast<const char*>(values) + at);
  alignas(64) float weights[kAtOnce][kSpan];
  for (int64_t first = 0; first < share; first += kAtOnce) {
    const int64_t queries = share - first < kAtOnce ? share - first : kAtOnce;
    for (int64_t s = 0; s < queries; s++) {
      score(q + (first + s) * dim, keys, count, dim, weights[s]);
      for (int64_t i = count; i < kSpan; i++) weights[s][i] = -1e30f;
      result.top[first + s] = to_weights(weights[s], result.total + first + s);
    }
    float* out = result.out + first * dim;
    if (queries == 1) weigh<1>(weights, values, count, dim, out);
    else if (queries == 2) weigh<2>(weights, values, count, dim, out);
    else if (queries == 3) weigh<3>(weights, values, count, dim, out);
    else weigh<4>(weights, values, count, dim, out);
  }
}
