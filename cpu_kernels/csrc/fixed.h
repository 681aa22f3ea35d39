// Activations in fixed point, for few.h. Included after tile.h, inside a namespace of one instruction set.
//
// A block of 32 activations becomes numbers with one step for all, x_k = step * v_k, and v_k a few limbs of
// kLimbBits bits each, so that one instruction multiplies kPerDot codes of a row by kPerDot limbs. 24 bits keep
// what float32 keeps of the block's largest activation, and sums of a group are exact: no less accurate than
// products in float32, at a fraction of the instructions. One limb of 8 bits is the faster, rounded way.

constexpr int kParts = 8 / kPerDot;       // shifts that bring all codes of a word to where a dot product reads them
constexpr int kXWords = kBlock / kPerDot;  // 32-bit words of one limb of a block of activations

constexpr int limbs_of(bool rounded) { return rounded ? 1 : 24 / kLimbBits; }

// The largest v of a block. Sums of 16 (or, for wider groups, 32) products with codes below 16 stay below 2^31.
inline int32_t largest_fixed(const Matrix& w, bool rounded) {
  if (rounded) return 127;
  if (w.group > 16) return (1 << 22) - 1;
  return kLimbBits == 8 ? 0x7f7f7f : 0x7ff7ff;  // the largest with all limbs in their range
}

// Digits of 32 / kPerDot bits each, all nonnegative and below 2^kLimbBits, less half of that.
constexpr uint64_t balanced(uint64_t digits) {
  return kLimbBits == 8 ? digits ^ 0x8080808080808080u : (digits + 0x7800780078007800u) ^ 0x8000800080008000u;
}

// The limbs of a block's activations for codes that are nibbles: word u of a limb holds those of columns
// 8 (u / kParts) + u % kParts + kParts j, j = 0.., from the low bits on. Two columns at a time.
SPQR_INLINE void put_limbs(const uint32_t* v, int limbs, int32_t* to) {
  constexpr uint64_t kDigits = ((1u << kLimbBits) - 1) * 0x100000001u;
  for (int limb = limbs - 1; limb >= 0; limb--)
    for (int t = 0; t < kBlock / 8; t++)
#pragma GCC unroll 2
      for (int p = 0; p < kParts; p += 2, to += 2) {
        uint64_t both = 0;
#pragma GCC unroll 4
        for (int j = 0; j < kPerDot; j++) {
          uint64_t pair;
          std::memcpy(&pair, v + 8 * t + p + kParts * j, 8);
          both |= (pair >> (limb * kLimbBits) & kDigits) << (32 / kPerDot * j);
        }
        both = balanced(both);
        std::memcpy(to, &both, 8);
      }
}

// The same for codes that are bytes: word u holds columns 4 (u / half) + u % half + half j, half = kParts / 2.
inline void put_limbs_for_bytes(const uint32_t* v, int limbs, int32_t* to) {
  constexpr int kHalf = kParts / 2;
  for (int limb = limbs - 1; limb >= 0; limb--)
    for (int u = 0; u < kXWords; u++, to++) {
      uint64_t word = 0;
#pragma GCC unroll 4
      for (int j = 0; j < kPerDot; j++) {
        const uint32_t digit = v[u / kHalf * 4 + u % kHalf + kHalf * j] >> (limb * kLimbBits) & ((1u << kLimbBits) - 1);
        word |= static_cast<uint64_t>(digit) << (32 / kPerDot * j);
      }
      *to = static_cast<int32_t>(balanced(word));
    }
}

// A block of activations as multiples of the step that is returned, at most `limit` of them.
SPQR_INLINE float fix_block(const float* x, int32_t limit, int32_t* value) {
  int32_t largest_bits = 0;
  for (int64_t k = 0; k < kBlock; k++) {
    int32_t bits;
    std::memcpy(&bits, x + k, 4);
    bits &= 0x7fffffff;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  float largest;
  std::memcpy(&largest, &largest_bits, 4);
  // Below 2^-100 is nothing; infinity and NaN make the whole product NaN.
  const bool finite = largest_bits < 0x7f800000, something = finite && largest > 7.9e-31f;
  const float inverse = something ? static_cast<float>(limit) / largest : 0.0f;
  for (int64_t k = 0; k < kBlock; k += kLanes) nearest(something ? mul(load(x + k), splat(inverse)) : zero(), value + k);
  for (int64_t k = 0; k < kBlock; k++) value[k] = value[k] > limit ? limit : value[k] < -limit ? -limit : value[k];
  return !finite ? __builtin_nanf("") : something ? largest / static_cast<float>(limit) : 0.0f;
}

// One row of activations, columns in permuted order and padded with zeros to whole blocks.
template <bool kRounded>
void fix_row(const Matrix& w, const float* x, int32_t* fixed, float* step, float* sums) {
  constexpr int kLimbs = limbs_of(kRounded);
  const int32_t limit = largest_fixed(w, kRounded);
  uint32_t bias = 0;  // makes every digit of v + bias that limb plus half its range
  for (int limb = 0; limb < kLimbs; limb++) bias += 1u << (limb * kLimbBits + kLimbBits - 1);
  const int64_t per_group = w.group / 8;
  int64_t left = per_group;
  *sums = 0;
  for (int64_t block = 0; block < w.blocks(); block++, x += kBlock, fixed += kLimbs * kXWords) {
    alignas(64) int32_t value[kBlock];
    alignas(64) uint32_t biased[kBlock];
    step[block] = fix_block(x, limit, value);
    for (int64_t k = 0; k < kBlock; k++) biased[k] = static_cast<uint32_t>(value[k]) + bias;
    for (int64_t k = 0; k < kBlock; k += 8, left--) {
      if (left == 0) {
        *++sums = 0;
        left = per_group;
      }
      int32_t sum = 0;
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) sum += value[k + i];
      *sums += static_cast<float>(sum) * step[block];
    }
    if (w.bits == 8)
      put_limbs_for_bytes(biased, kLimbs, fixed);
    else
      put_limbs(biased, kLimbs, fixed);
  }
}
