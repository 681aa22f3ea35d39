// Four lanes in the compiler's own vector types: SSE2 on x86-64, NEON on ARM (with SPQR_DOTPROD also its dot products
// of bytes), plain code elsewhere.

typedef float F __attribute__((vector_size(16)));
typedef uint32_t I __attribute__((vector_size(16)));
typedef int32_t SignedI __attribute__((vector_size(16)));

constexpr int kLanes = 4;
#if defined(SPQR_DOTPROD)
constexpr int kPerDot = 4, kLimbBits = 8;
#else
constexpr int kPerDot = 2, kLimbBits = 12;
#endif
constexpr bool kWholeBytes = false;
constexpr int64_t kFewExactRows = kFewRows;
#if defined(__aarch64__)
constexpr int kMicroRows = 6, kMicroVectors = 4;  // of 32 registers
#else
constexpr int kMicroRows = 6, kMicroVectors = 2;  // of 16
#endif

SPQR_INLINE F zero() { return F{}; }
SPQR_INLINE F splat(float a) { return F{a, a, a, a}; }
SPQR_INLINE F load(const float* p) {
  F a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
SPQR_INLINE void store(float* p, F a) { std::memcpy(p, &a, sizeof a); }
SPQR_INLINE F add(F a, F b) { return a + b; }
SPQR_INLINE F sub(F a, F b) { return a - b; }
SPQR_INLINE F mul(F a, F b) { return a * b; }
SPQR_INLINE F fma(F a, F b, F c) { return a * b + c; }  // one instruction where there is one
SPQR_INLINE F fms(F a, F b, F c) { return a * b - c; }
SPQR_INLINE F fnma(F a, F b, F c) { return c - a * b; }

// The second if one is NaN.
SPQR_INLINE F larger(F a, F b) { return (F)(((SignedI)a & (a > b)) | ((SignedI)b & ~(a > b))); }
SPQR_INLINE I bits_of(F a) { return (I)a; }
SPQR_INLINE F with_bits(I a) { return (F)a; }
SPQR_INLINE float sum_of(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }

SPQR_INLINE I words(const uint32_t* p) {
  I a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
SPQR_INLINE I bytes(const uint8_t* p) { return I{p[0], p[1], p[2], p[3]}; }
SPQR_INLINE I masked(I a, uint32_t mask) { return a & mask; }
SPQR_INLINE I joined(I a, I b, uint32_t mask) { return a | (b & mask); }
template <int kBits>
SPQR_INLINE I right(I a) {
  return a >> kBits;
}
template <int kBits>
SPQR_INLINE I left(I a) {
  return a << kBits;
}
SPQR_INLINE F number(I a) { return __builtin_convertvector((SignedI)a, F); }
SPQR_INLINE F nibble(I a, int i) { return number((a >> static_cast<uint32_t>(4 * i)) & 15u); }

#if defined(__aarch64__)
SPQR_INLINE F halves(const uint8_t* p) {
  uint16x4_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return (F)vcvt_f32_f16(vreinterpret_f16_u16(bits));
}
#else
SPQR_INLINE float half_at(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  return half_to_float(half);
}
SPQR_INLINE F halves(const uint8_t* p) { return F{half_at(p), half_at(p + 2), half_at(p + 4), half_at(p + 6)}; }
#endif
SPQR_INLINE void factors_and_products(const uint8_t* p, float* out) {  // four float16 a, b, c, d to a, a b, c, c d
  const F each = halves(p);
  store(out, F{each[0], each[0] * each[1], each[2], each[2] * each[3]});
}

SPQR_INLINE void nearest(F a, int32_t* out) {
#if defined(__aarch64__)
  vst1q_s32(out, vcvtnq_s32_f32((float32x4_t)a));
#else
  for (int i = 0; i < kLanes; i++) out[i] = static_cast<int32_t>(__builtin_lrintf(a[i]));
#endif
}
SPQR_INLINE I plus(I a, I b) { return a + b; }

// Adds up dot products of each lane's kPerDot codes, which are below 16, with as many signed numbers.
struct Dots {
  I total = {};
  SPQR_INLINE I sum() const { return total; }
#if defined(SPQR_DOTPROD)
  SPQR_INLINE void add(I codes, int32_t x) {
    total = (I)vdotq_s32((int32x4_t)total, (int8x16_t)codes, vreinterpretq_s8_s32(vdupq_n_s32(x)));
  }
#elif defined(__SSE2__)
  SPQR_INLINE void add(I codes, int32_t x) {
    total += (I)_mm_madd_epi16((__m128i)codes, _mm_set1_epi32(x));
  }
#else
  SPQR_INLINE void add(I codes, int32_t x) {
    const auto low = static_cast<uint32_t>(static_cast<int16_t>(x)), high = static_cast<uint32_t>(x >> 16);
    total += (codes & 0xffffu) * low + (codes >> 16) * high;
  }
#endif
};

SPQR_INLINE F where_above(F a, const int32_t* counts, int32_t slot) {
  SignedI there;
  std::memcpy(&there, counts, sizeof there);
  return (F)((SignedI)a & (there > slot));
}
SPQR_INLINE int count_above(const int32_t* counts, int32_t slot) {
  int above = 0;
  for (int i = 0; i < kTile; i++) above += counts[i] > slot;
  return above;
}
