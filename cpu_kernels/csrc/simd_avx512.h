// Sixteen lanes: AVX-512 F, BW, VL, DQ; with SPQR_VNNI also VNNI. Included inside a
// namespace and a region that has these instructions switched on.

constexpr int kLanes = 16;
constexpr int kFewWidth = 16;
constexpr int kMicroRows = 12, kMicroVectors = 2;
#define SPQR_DOTS
#define SPQR_GATHERS
using F = __m512;
using I = __m512i;

SPQR_INLINE F zero() { return _mm512_setzero_ps(); }
SPQR_INLINE F splat(float a) { return _mm512_set1_ps(a); }
SPQR_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
SPQR_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
SPQR_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
SPQR_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
SPQR_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
SPQR_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
SPQR_INLINE F fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
SPQR_INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }

SPQR_INLINE I words(const uint32_t* p) { return _mm512_loadu_si512(p); }
SPQR_INLINE I bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SPQR_INLINE I masked(I a, uint32_t mask) { return _mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(mask))); }
SPQR_INLINE I joined(I a, I b, uint32_t mask) {  // a | (b & mask)
  return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi32(static_cast<int>(mask)), 0xF8);
}
template <int kBits>
SPQR_INLINE I right(I a) {
  return kBits == 0 ? a : _mm512_srli_epi32(a, kBits);
}
template <int kBits>
SPQR_INLINE I left(I a) {
  return kBits == 0 ? a : _mm512_slli_epi32(a, kBits);
}
SPQR_INLINE F number(I a) { return _mm512_cvtepi32_ps(a); }

// Nibble i of each lane. A permutation reads the low four bits of its index only.
SPQR_INLINE F nibble(I a, int i) {
  const F counting = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(i == 0 ? a : _mm512_srli_epi32(a, static_cast<unsigned>(4 * i)), counting);
}

SPQR_INLINE F halves(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SPQR_INLINE void four_halves(const uint8_t* p, F out[4]) {
  const __m128 four = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  out[0] = _mm512_broadcastss_ps(four);
  out[1] = _mm512_broadcastss_ps(_mm_permute_ps(four, 0x55));
  out[2] = _mm512_broadcastss_ps(_mm_permute_ps(four, 0xAA));
  out[3] = _mm512_broadcastss_ps(_mm_permute_ps(four, 0xFF));
}

SPQR_INLINE I no_dots() { return _mm512_setzero_si512(); }
SPQR_INLINE I plus(I a, I b) { return _mm512_add_epi32(a, b); }

// acc + the dot product of each lane's four bytes (below 16) with four signed bytes.
SPQR_INLINE I dot(I acc, I codes, int32_t x) {
#ifdef SPQR_VNNI
  return _mm512_dpbusd_epi32(acc, codes, _mm512_set1_epi32(x));
#else
  const I pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi32(x));
  return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}

// One slot of outliers: `count` values and columns from `entry` on.
struct Slot {
  __mmask16 mask;
  F values;
  I cols;
  SPQR_INLINE Slot(const Matrix& w, int64_t entry, int count) {
    mask = static_cast<__mmask16>((1u << count) - 1);
    values = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, w.outlier_values + entry));
    cols = w.outlier_cols16 != nullptr
               ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, w.outlier_cols16 + entry))
               : _mm512_maskz_loadu_epi32(mask, w.outlier_cols32 + entry);
  }
  template <int kColumnStep>
  SPQR_INLINE F times(const float* x, F sum) const {
    const I at = _mm512_mullo_epi32(cols, _mm512_set1_epi32(kColumnStep));
    return fma(values, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, at, x, 4), sum);
  }
};
SPQR_INLINE F by_row(F by_lane, const uint8_t* lane_of_row) {
  return _mm512_permutexvar_ps(bytes(lane_of_row), by_lane);
}
