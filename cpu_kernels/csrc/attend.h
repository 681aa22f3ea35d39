// A span of positions in one token's attention. Included after a simd_*.h, inside a namespace of one instruction set.

// e^x for x <= 0, to some 1e-7 of it: e^x = 2^n e^r with |r| <= ln 2 / 2, and e^r by its series.
SPQR_INLINE F exp_of(F x) {
  x = larger(splat(-87.0f), x);  // 2^-126: nothing beside 1. In this order NaN stays NaN: `larger` gives its second then
  alignas(64) int32_t nearest_int[kLanes];
  nearest(mul(x, splat(1.44269504088896341f)), nearest_int);
  const I n = words(reinterpret_cast<const uint32_t*>(nearest_int));
  F r = fnma(number(n), splat(0.693359375f), x);  // ln 2 in two parts; the first has few bits, n times it is exact
  r = fnma(number(n), splat(-2.12194440054690583e-4f), r);
  F series = splat(1.0f / 5040);
  series = fma(series, r, splat(1.0f / 720));
  series = fma(series, r, splat(1.0f / 120));
  series = fma(series, r, splat(1.0f / 24));
  series = fma(series, r, splat(1.0f / 6));
  series = fma(series, r, splat(0.5f));
  series = fma(series, r, splat(1.0f));
  series = fma(series, r, splat(1.0f));
  return with_bits(plus(left<23>(n), bits_of(series)));  // n more in the exponent
}

// scores[s][i] = q_s key_i, for kQueries queries; some positions past `count` may be written, up to a multiple of 4.
template <int kQueries>
SPQR_INLINE void score(const float* q, const float* keys, int64_t count, int64_t dim, float (*scores)[kSpan]) {
  constexpr int64_t kKeys = kQueries == 1 ? 4 : 2;
  for (int64_t first = 0; first < count; first += kKeys) {
    F sum[kQueries][kKeys];
    const float* key[kKeys];
    for (int64_t i = 0; i < kKeys; i++) {
      key[i] = keys + (first + i < count ? first + i : first) * dim;
      for (int s = 0; s < kQueries; s++) sum[s][i] = zero();
    }
    for (int64_t d = 0; d < dim; d += kLanes) {
      F of_key[kKeys];
      for (int64_t i = 0; i < kKeys; i++) of_key[i] = load(key[i] + d);
      for (int s = 0; s < kQueries; s++) {
        const F of_q = load(q + s * dim + d);
        for (int64_t i = 0; i < kKeys; i++) sum[s][i] = fma(of_q, of_key[i], sum[s][i]);
      }
    }
    for (int s = 0; s < kQueries; s++)
      for (int64_t i = 0; i < kKeys; i++) scores[s][first + i] = sum_of(sum[s][i]);
  }
}

// Scores [kSpan] to exp(score - top); returns top, and the sum.
SPQR_INLINE float to_weights(float* scores, float* total) {
  F top = load(scores), sum = zero();
  for (int64_t i = kLanes; i < kSpan; i += kLanes) top = larger(top, load(scores + i));
  alignas(64) float each[kLanes];
  store(each, top);
  float highest = each[0];
  for (int i = 1; i < kLanes; i++) highest = each[i] > highest ? each[i] : highest;
  for (int64_t i = 0; i < kSpan; i += kLanes) {
    const F weight = exp_of(sub(load(scores + i), splat(highest)));
    store(scores + i, weight);
    sum = add(sum, weight);
  }
  *total = sum_of(sum);
  return highest;
}

// out_s = Σ weight_s value, for kQueries queries.
template <int kQueries>
SPQR_INLINE void weigh(const float (*weights)[kSpan], const float* values, int64_t count, int64_t dim, float* out) {
  constexpr int kVectors = kTile / kLanes;
  for (int64_t d = 0; d < dim; d += kTile) {
    F sum[kQueries][kVectors];
    for (int s = 0; s < kQueries; s++)
      for (int i = 0; i < kVectors; i++) sum[s][i] = zero();
    const float* value = values + d;
    for (int64_t key = 0; key < count; key++, value += dim) {
      F weight[kQueries];
      for (int s = 0; s < kQueries; s++) weight[s] = splat(weights[s][key]);
      for (int i = 0; i < kVectors; i++) {
        const F of_value = load(value + kLanes * i);
        for (int s = 0; s < kQueries; s++) sum[s][i] = fma(of_value, weight[s], sum[s][i]);
      }
    }
    for (int s = 0; s < kQueries; s++)
      for (int i = 0; i < kVectors; i++) store(out + s * dim + d + kLanes * i, sum[s][i]);
  }
}

template <int kQueries>
void attend_queries(const float* q, int64_t dim, const float* keys, const float* values, int64_t count, int64_t first,
                    const SpanResult& result) {
  alignas(64) float weights[kQueries][kSpan];
  score<kQueries>(q + first * dim, keys, count, dim, weights);
  for (int s = 0; s < kQueries; s++) {
    for (int64_t i = count; i < kSpan; i++) weights[s][i] = -1e30f;
    result.top[first + s] = to_weights(weights[s], result.total + first + s);
  }
  weigh<kQueries>(weights, values, count, dim, result.out + first * dim);
}

void attend_span(const float* q, int64_t share, int64_t dim, const float* keys, const float* values, int64_t count,
                 const SpanResult& result) {
  for (int64_t at = 0; at < count * dim; at += 16) __builtin_prefetch(values + at);
  for (int64_t first = 0; first < share;) {
    const int64_t left = share - first;
    if (left >= 4) attend_queries<4>(q, dim, keys, values, count, first, result);
    else if (left == 3) attend_queries<3>(q, dim, keys, values, count, first, result);
    else if (left == 2) attend_queries<2>(q, dim, keys, values, count, first, result);
    else attend_queries<1>(q, dim, keys, values, count, first, result);
    first += left < 4 ? left : 4;
  }
}
