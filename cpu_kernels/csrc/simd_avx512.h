// Sixteen lanes: AVX-512 F, BW, VL, DQ; with SPQR_VNNI also VNNI. Included inside a
// namespace and a region that has these instructions switched on.

constexpr int kLanes = 16;
constexpr int kPerDot = 4, kLimbBits = 8;
#ifdef SPQR_VNNI
constexpr bool kWholeBytes = true;
#else
constexpr bool kWholeBytes = false;  // sums of 16 bits would overflow
#endif
constexpr int64_t kFewExactRows = kFewRows;
constexpr int kMicroRows = 12, kMicroVectors = 2;
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

// The second if one is NaN.
SPQR_INLINE F larger(F a, F b) { return _mm512_max_ps(a, b); }
SPQR_INLINE I bits_of(F a) { return _mm512_castps_si512(a); }
SPQR_INLINE F with_bits(I a) { return _mm512_castsi512_ps(a); }
SPQR_INLINE float sum_of(F a) { return _mm512_reduce_add_ps(a); }

SPQR_INLINE I words(const uint32_t* p) {
  I a = _mm512_loadu_si512(p);
  asm("" : "+v"(a));  // one load, not one for each use: loads are what is scarce
  return a;
}
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
// Four float16 a, b, c, d to a, a b, c, c d.
SPQR_INLINE void factors_and_products(const uint8_t* p, float* out) {
  const __m128 each = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  _mm_storeu_ps(out, _mm_blend_ps(each, _mm_mul_ps(each, _mm_moveldup_ps(each)), 0b1010));
}

SPQR_INLINE void nearest(F a, int32_t* out) { _mm512_storeu_si512(out, _mm512_cvtps_epi32(a)); }
SPQR_INLINE I plus(I a, I b) { return _mm512_add_epi32(a, b); }

// Adds up dot products of each lane's four codes, which unless kWholeBytes are below 16, with four signed bytes;
// up to eight of them.
struct Dots {
  I total;
  SPQR_INLINE Dots() : total(_mm512_setzero_si512()) {}
#ifdef SPQR_VNNI
  SPQR_INLINE void add(I codes, int32_t x) { total = _mm512_dpbusd_epi32(total, codes, _mm512_set1_epi32(x)); }
  SPQR_INLINE I sum() const { return total; }
#else
  SPQR_INLINE void add(I codes, int32_t x) {  // in 16 bits: at most 8 times 2 * 15 * 128
    total = _mm512_add_epi16(total, _mm512_maddubs_epi16(codes, _mm512_set1_epi32(x)));
  }
  SPQR_INLINE I sum() const { return _mm512_madd_epi16(total, _mm512_set1_epi16(1)); }
#endif
};

// Those of `a` whose count is above `slot`, 0 for the others.
SPQR_INLINE F where_above(F a, const int32_t* counts, int32_t slot) {
  return _mm512_maskz_mov_ps(_mm512_cmpgt_epi32_mask(_mm512_loadu_si512(counts), _mm512_set1_epi32(slot)), a);
}
SPQR_INLINE int count_above(const int32_t* counts, int32_t slot) {  // of 16
  return _mm_popcnt_u32(_mm512_cmpgt_epi32_mask(_mm512_loadu_si512(counts), _mm512_set1_epi32(slot)));
}
