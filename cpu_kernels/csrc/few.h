// Few rows of activations: codes are multiplied as they are, in integers. Included after tile.h, in the same way.
//
// A block of 32 activations becomes fixed-point numbers with one step for all, x_k = step * v_k, and v_k a few
// limbs of kLimbBits bits each, so that one instruction multiplies kPerDot codes of a row by kPerDot limbs. 24 bits
// keep what float32 keeps of the block's largest activation, and sums of a group are exact: no less accurate than
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

// A word's codes, where dot products read them: 4 bits at the bottom of each field of 32 / kPerDot bits.
template <int kPart = 0>
SPQR_INLINE void split(I word, I* part) {
  part[kPart] = masked(right<4 * kPart>(word), kPerDot == 4 ? 0x0f0f0f0fu : 0x000f000fu);
  if constexpr (kPart + 1 < kParts) split<kPart + 1>(word, part);
}

// Tiles that are multiplied together, so that activations are read once for both.
constexpr int kTiles = kLanes == kTile ? 2 : 1;

// Σ codes v over kStep columns of each lane, for one row of activations; `part` is the codes' words as dot products
// read them. Each limb, and of bytes each nibble, has its own sum: long chains of sums would wait for one another.
template <int kBits, int kStep, int kLimbs>
SPQR_INLINE void dots_of_step(const I (*part)[kStep * (kBits == 8 ? 8 : 4) / kBlock][kParts], const int32_t* x, F* to) {
  constexpr int kStepWords = kStep * (kBits == 8 ? 8 : 4) / kBlock, kSums = kBits == 8 ? 2 : 1;
  Dots dots[kTiles][kSums][kLimbs];
#pragma GCC unroll 8
  for (int t = 0; t < kStepWords; t++)
#pragma GCC unroll 4
    for (int p = 0; p < kParts; p++)
#pragma GCC unroll 3
      for (int limb = 0; limb < kLimbs; limb++) {
        const int32_t of_x = x[limb * kXWords + t * (kParts / kSums) + p / kSums];
#pragma GCC unroll 2
        for (int i = 0; i < kTiles; i++) dots[i][p % kSums][limb].add(part[i][t][p], of_x);
      }
#pragma GCC unroll 2
  for (int i = 0; i < kTiles; i++) {
    F total[kSums];
#pragma GCC unroll 2
    for (int half = 0; half < kSums; half++) {
      I all = dots[i][half][0].sum();
#pragma GCC unroll 3
      for (int limb = 1; limb < kLimbs; limb++) all = plus(left<kLimbBits>(all), dots[i][half][limb].sum());
      total[half] = number(all);
    }
    to[i] = kSums == 1 ? total[0] : fma(total[kSums - 1], splat(16.0f), total[0]);
  }
}

// A tile, from one of its rows on, and how far it has been read.
struct Source {
  const uint32_t* codes;
  const uint8_t* stats;
  const float* of_tile;  // what read_tile_statistics made of it
};

// What follows a tile in memory is fetched while it is multiplied, a little with every block, because the processor
// sees too short streams to do it by itself: codes kAhead blocks ahead, statistics and outliers of the tile's successor.
constexpr int64_t kAhead = 24;

struct Fetches {
  const char *stats, *cols, *values;
  int64_t stats_step, cols_step, values_step;  // bytes a block

  SPQR_INLINE void aim(const Matrix& w, int64_t tile) {
    const int64_t successor = tile + kTiles < w.tiles() ? tile + kTiles : w.tiles() - 1, blocks = w.blocks();
    const int64_t start = w.outlier_start[successor], entries = w.outlier_start[successor + 1] - start;
    const int64_t bytes = w.groups() * statistics_bytes(w.kind), col_bytes = w.outlier_cols16 != nullptr ? 2 : 4;
    stats = reinterpret_cast<const char*>(w.stats) + successor * bytes;
    cols = (w.outlier_cols16 != nullptr ? reinterpret_cast<const char*>(w.outlier_cols16)
                                        : reinterpret_cast<const char*>(w.outlier_cols32)) + start * col_bytes;
    values = reinterpret_cast<const char*>(w.outlier_values + start);
    stats_step = bytes / blocks + 1;
    cols_step = entries * col_bytes / blocks + 1;
    values_step = entries * 2 / blocks + 1;
  }

  template <int kBits>
  SPQR_INLINE void at(const uint32_t* codes, int64_t block, int64_t blocks) {
    constexpr int64_t kBlockWords = kWords<kBits> * kTile;
    const int64_t past = block + kAhead < blocks ? 0 : (kTiles - 1) * blocks;  // other tiles of the same pair
    const auto* next = codes + (kAhead + past) * kBlockWords;
#pragma GCC unroll 8
    for (int64_t word = 0; word < kBlockWords; word += 16) __builtin_prefetch(next + word);
    __builtin_prefetch(stats + block * stats_step);
    if (block % 4 == 0) {
      __builtin_prefetch(cols + block * cols_step);
      __builtin_prefetch(values + block * values_step);
    }
  }
};

// total += S (Σ_k code_k x_k - Z Σ_k x_k), group by group.
template <int kBits, int kStep, int kRows, int kLimbs>
SPQR_INLINE void multiply_tiles(const Matrix& w, const Input& in, int64_t first_row, int64_t tile, int lane, Source* from,
                                F (*total)[kTiles]) {
  constexpr int kStepWords = kStep * (kBits == 8 ? 8 : 4) / kBlock;
  const int64_t blocks = w.blocks(), per_group = w.group / kBlock, size = statistics_bytes(w.kind);
  const int32_t* x[kRows];
  const float *step[kRows], *sums[kRows];
  F sum[kRows][kTiles];
  for (int m = 0; m < kRows; m++) {
    const int64_t row = first_row + m < in.rows ? first_row + m : in.rows - 1;
    x[m] = in.fixed + row * blocks * kLimbs * kXWords;
    step[m] = in.step + row * blocks;
    sums[m] = in.sums + row * w.groups();
    for (int i = 0; i < kTiles; i++) sum[m][i] = zero();
  }
  Fetches fetches[kTiles];
  for (int i = 0; i < kTiles; i++) fetches[i].aim(w, tile + i);
  int64_t group = 0, left_in_group = per_group;
  for (int64_t block = 0; block < blocks; block++) {
    Codes<kBits> code[kTiles];
#pragma GCC unroll 2
    for (int i = 0; i < kTiles; i++) {
      fetches[i].template at<kBits>(from[i].codes, block, blocks);
      code[i].read(from[i].codes);
      from[i].codes += kWords<kBits> * kTile;
    }
#pragma GCC unroll 4
    for (int of_block = 0; of_block < kBlock / kStep; of_block++) {
      I part[kTiles][kStepWords][kParts];
#pragma GCC unroll 2
      for (int i = 0; i < kTiles; i++)
#pragma GCC unroll 8
        for (int t = 0; t < kStepWords; t++) split(code[i].word[of_block * kStepWords + t], part[i][t]);
      const int64_t at = block * kLimbs * kXWords + of_block * kStep / kPerDot;
#pragma GCC unroll 4
      for (int m = 0; m < kRows; m++) {
        F dots[kTiles];
        dots_of_step<kBits, kStep, kLimbs>(part, x[m] + at, dots);
#pragma GCC unroll 2
        for (int i = 0; i < kTiles; i++) sum[m][i] = fma(dots[i], splat(step[m][block]), sum[m][i]);
      }
      if (kStep < kBlock || --left_in_group == 0 || block + 1 == blocks) {
#pragma GCC unroll 2
        for (int i = 0; i < kTiles; i++) {
          F scale, zero_point;
          read_statistics(w.kind, from[i].stats, lane, from[i].of_tile + 4 * group, scale, zero_point);
          from[i].stats += size;
#pragma GCC unroll 4
          for (int m = 0; m < kRows; m++) {
            total[m][i] = fma(scale, fnma(zero_point, splat(sums[m][group]), sum[m][i]), total[m][i]);
            sum[m][i] = zero();
          }
        }
        group++;
        left_in_group = per_group;
      }
    }
  }
}

// kTiles tiles from `tile` on, as far as there are so many; kRows rows of activations from `first_row` on, likewise.
template <int kBits, int kStep, int kRows, int kLimbs>
void multiply_rows(const Matrix& w, const Input& in, int64_t first_row, int64_t tile, int64_t last_tile,
                   const float* of_tile, float* y) {
  alignas(64) float out[kTiles][kRows][kTile];
  for (int lane = 0; lane < kTile; lane += kLanes) {
    F total[kRows][kTiles];
    Source from[kTiles];
    for (int i = 0; i < kTiles; i++) {
      const int64_t own = tile + i < last_tile ? tile + i : tile;
      from[i].codes = w.codes + own * w.blocks() * kWords<kBits> * kTile + lane;
      from[i].stats = w.stats + own * w.groups() * statistics_bytes(w.kind);
      from[i].of_tile = of_tile + (own - tile) * 4 * w.groups();
      for (int m = 0; m < kRows; m++) total[m][i] = zero();
    }
    multiply_tiles<kBits, kStep, kRows, kLimbs>(w, in, first_row, tile, lane, from, total);
    for (int i = 0; i < kTiles; i++)
      for (int m = 0; m < kRows; m++) store(out[i][m] + lane, total[m][i]);
  }
  const float* x[kRows];
  for (int m = 0; m < kRows; m++) x[m] = in.x + (first_row + m < in.rows ? first_row + m : in.rows - 1) * in.stride;
  for (int i = 0; i < kTiles && tile + i < last_tile; i++) {
    add_outliers<kRows>(w, x, out[i], tile + i);
    const size_t wide = sizeof(float) * static_cast<size_t>(w.rows_in_tile(tile + i));
    for (int64_t m = first_row; m < first_row + kRows && m < in.rows; m++)
      std::memcpy(y + m * w.rows + (tile + i) * kTile, out[i][m - first_row], wide);
  }
}

template <int kBits, int kStep, int kLimbs>
void few_of_step(const Matrix& w, const Input& in, float* y, int64_t first, int64_t last, float* of_tile) {
  constexpr bool kPreset = kStep == 16 && kBits != 8;  // others make do with fewer programs
  for (int64_t tile = first; tile < last; tile += kTiles) {
    for (int64_t i = 0; i < kTiles && tile + i < last; i++)
      read_tile_statistics(w, tile + i, of_tile + i * 4 * w.groups());
    for (int64_t row = 0; row < in.rows; row += kRowsAtOnce) {
      const int64_t rows = in.rows - row;
      if (rows == 1)
        multiply_rows<kBits, kStep, 1, kLimbs>(w, in, row, tile, last, of_tile, y);
      else if (rows == 2 && kPreset)
        multiply_rows<kBits, kStep, kPreset ? 2 : 1, kLimbs>(w, in, row, tile, last, of_tile, y);
      else
        multiply_rows<kBits, kStep, kRowsAtOnce, kLimbs>(w, in, row, tile, last, of_tile, y);
    }
  }
}

template <int kBits, int kLimbs>
void few_of_bits(const Matrix& w, const Input& in, float* y, int64_t first, int64_t last, float* of_tile) {
  if (w.group == 8)
    few_of_step<kBits, 8, kLimbs>(w, in, y, first, last, of_tile);
  else if (w.group == 16)
    few_of_step<kBits, 16, kLimbs>(w, in, y, first, last, of_tile);
  else
    few_of_step<kBits, 32, kLimbs>(w, in, y, first, last, of_tile);
}

template <bool kRounded>
void few(const Matrix& w, const Input& in, float* y, int64_t first, int64_t last, float* of_tile) {
  constexpr int kLimbs = limbs_of(kRounded);
  if (w.bits == 2) return few_of_bits<2, kLimbs>(w, in, y, first, last, of_tile);
  if (w.bits == 3) return few_of_bits<3, kLimbs>(w, in, y, first, last, of_tile);
  if (w.bits == 4) return few_of_bits<4, kLimbs>(w, in, y, first, last, of_tile);
  return few_of_bits<8, kLimbs>(w, in, y, first, last, of_tile);
}

constexpr FewRows kFewExact = {limbs_of(false) * kXWords, fix_row<false>, few<false>};
constexpr FewRows kFewRounded = {limbs_of(true) * kXWords, fix_row<true>, few<true>};
