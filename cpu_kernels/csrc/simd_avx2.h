// Eight lanes: AVX2, FMA and F16C. Included inside a namespace and a region that has these instructions switched on.

constexpr int kLanes = 8;
constexpr int kFewWidth = 8;
constexpr int kMicroRows = 6, kMicroVectors = 2;
#define SPQR_DOTS
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
SPQR_INLINE void four_halves(const uint8_t* p, F out[4]) {
  const __m128 four = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  out[0] = _mm256_broadcastss_ps(four);
  out[1] = _mm256_broadcastss_ps(_mm_permute_ps(four, 0x55));
  out[2] = _mm256_broadcastss_ps(_mm_permute_ps(four, 0xAA));
  out[3] = _mm256_broadcastss_ps(_mm_permute_ps(four, 0xFF));
}

SPQR_INLINE I no_dots() { return _mm256_setzero_si256(); }
SPQR_INLINE I plus(I a, I b) { return _mm256_add_epi32(a, b); }
SPQR_INLINE I dot(I acc, I codes, int32_t x) {
  const I pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi32(x));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
