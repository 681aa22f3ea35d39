// Eight lanes: AVX2, FMA and F16C. Included inside a namespace and a region that has these instructions switched on.

constexpr int kLanes = 8;
constexpr int kPerDot = 4, kLimbBits = 8;
constexpr bool kWholeBytes = false;
constexpr int64_t kFewExactRows = 2;  // two products in floats take no longer than those of three limbs
constexpr int kMicroRows = 6, kMicroVectors = 2;
using F = __m256;
using I = __m256i;

SPQR_INLINE F zero() { return _mm256_setzero_ps(); }
SPQR_INLINE F splat(float a) { return _mm256_set1_ps(a); }
SPQR_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
SPQR_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a); }
SPQR_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
SPQR_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
SPQR_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
SPQR_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
SPQR_INLINE F fms(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
SPQR_INLINE F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }

// The second if one is NaN.
SPQR_INLINE F larger(F a, F b) { return _mm256_max_ps(a, b); }
SPQR_INLINE I bits_of(F a) { return _mm256_castps_si256(a); }
SPQR_INLINE F with_bits(I a) { return _mm256_castsi256_ps(a); }
SPQR_INLINE float sum_of(F a) {
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

SPQR_INLINE I words(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
SPQR_INLINE I bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
SPQR_INLINE I masked(I a, uint32_t mask) { return _mm256_and_si256(a, _mm256_set1_epi32(static_cast<int>(mask))); }
SPQR_INLINE I joined(I a, I b, uint32_t mask) { return _mm256_or_si256(a, masked(b, mask)); }
template <int kBits>
SPQR_INLINE I right(I a) {
  return kBits == 0 ? a : _mm256_srli_epi32(a, kBits);
}
template <int kBits>
SPQR_INLINE I left(I a) {
  return kBits == 0 ? a : _mm256_slli_epi32(a, kBits);
}
SPQR_INLINE F number(I a) { return _mm256_cvtepi32_ps(a); }
SPQR_INLINE F nibble(I a, int i) {
  const I shifted = i == 0 ? a : _mm256_srli_epi32(a, 4 * i);
  return number(i == 7 ? shifted : masked(shifted, 15));
}

SPQR_INLINE F halves(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// Four float16 a, b, c, d to a, a b, c, c d.
SPQR_INLINE void factors_and_products(const uint8_t* p, float* out) {
  const __m128 each = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  _mm_storeu_ps(out, _mm_blend_ps(each, _mm_mul_ps(each, _mm_moveldup_ps(each)), 0b1010));
}

SPQR_INLINE void nearest(F a, int32_t* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_cvtps_epi32(a));
}
SPQR_INLINE I plus(I a, I b) { return _mm256_add_epi32(a, b); }

// As in simd_avx512.h without VNNI.
struct Dots {
  I total;
  SPQR_INLINE Dots() : total(_mm256_setzero_si256()) {}
  SPQR_INLINE void add(I codes, int32_t x) {
    total = _mm256_add_epi16(total, _mm256_maddubs_epi16(codes, _mm256_set1_epi32(x)));
  }
  SPQR_INLINE I sum() const { return _mm256_madd_epi16(total, _mm256_set1_epi16(1)); }
};

SPQR_INLINE F above(const int32_t* counts, int32_t slot) {
  const I counted = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(counts));
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(counted, _mm256_set1_epi32(slot)));
}
SPQR_INLINE F where_above(F a, const int32_t* counts, int32_t slot) { return _mm256_and_ps(a, above(counts, slot)); }
SPQR_INLINE int count_above(const int32_t* counts, int32_t slot) {
  const int low = _mm256_movemask_ps(above(counts, slot)), high = _mm256_movemask_ps(above(counts + 8, slot));
  return __builtin_popcount(static_cast<unsigned>(low | high << 8));
}
