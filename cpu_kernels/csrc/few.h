// Few rows of activations: codes are multiplied as they are, in integers. Included after fixed.h, in the same way.

// A word's codes, where dot products read them: 4 bits at the bottom of each field of 32 / kPerDot bits.
template <int kPart = 0>
SPQR_INLINE void split(I word, I* part) {
  part[kPart] = masked(right<4 * kPart>(word), kPerDot == 4 ? 0x0f0f0f0fu : 0x000f000fu);
  if constexpr (kPart + 1 < kParts) split<kPart + 1>(word, part);
}

// Tiles that are multiplied together, so that activations are read once for both.
constexpr int kTiles = kLanes == kTile ? 2 : 1;

// How many sums the codes of kBits need: bytes have one for each nibble, unless dot products take whole bytes.
template <int kBits>
constexpr int kSums = kBits == 8 && !kWholeBytes ? 2 : 1;

// Words of codes that kStep columns take, and what each is split into.
template <int kBits, int kStep>
constexpr int kStepWords = kStep * (kBits == 8 ? 8 : 4) / kBlock;
template <int kBits>
constexpr int kSplit = kBits == 8 && kWholeBytes ? 1 : kParts;

// Σ codes v over kStep columns of each lane, for one row of activations; `part` is the codes' words as dot products
// read them. Each limb, and of bytes each nibble, has its own sum: long chains of sums would wait for one another.
template <int kBits, int kStep, int kLimbs>
SPQR_INLINE void dots_of_step(const I (*part)[kStepWords<kBits, kStep>][kSplit<kBits>], const int32_t* x, F* to) {
  Dots dots[kTiles][kSums<kBits>][kLimbs];
#pragma GCC unroll 8
  for (int t = 0; t < kStepWords<kBits, kStep>; t++)
#pragma GCC unroll 4
    for (int p = 0; p < kSplit<kBits>; p++)
#pragma GCC unroll 3
      for (int limb = 0; limb < kLimbs; limb++) {
        const int32_t of_x = x[limb * kXWords + t * (kSplit<kBits> / kSums<kBits>) + p / kSums<kBits>];
#pragma GCC unroll 2
        for (int i = 0; i < kTiles; i++) dots[i][p % kSums<kBits>][limb].add(part[i][t][p], of_x);
      }
#pragma GCC unroll 2
  for (int i = 0; i < kTiles; i++) {
    if constexpr (kBits == 8 && kWholeBytes) {  // the limbs' sums together would not fit into 32 bits
      to[i] = number(dots[i][0][0].sum());
#pragma GCC unroll 2
      for (int limb = 1; limb < kLimbs; limb++)
        to[i] = fma(to[i], splat(static_cast<float>(1 << kLimbBits)), number(dots[i][0][limb].sum()));
    } else {
      F total[kSums<kBits>];
#pragma GCC unroll 2
      for (int half = 0; half < kSums<kBits>; half++) {
        I all = dots[i][half][0].sum();
#pragma GCC unroll 3
        for (int limb = 1; limb < kLimbs; limb++) all = plus(left<kLimbBits>(all), dots[i][half][limb].sum());
        total[half] = number(all);
      }
      to[i] = kSums<kBits> == 1 ? total[0] : fma(total[kSums<kBits> - 1], splat(16.0f), total[0]);
    }
  }
}

// What follows a tile in memory is fetched while it is multiplied, a little with every block, because the processor
// sees too short streams to do it by itself: codes about kAhead bytes ahead, statistics and outliers of the tile's successor.
constexpr int64_t kAhead = 4608;

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
    const auto each = static_cast<uint32_t>(blocks);  // divides much faster than 64 bits
    stats_step = static_cast<uint32_t>(bytes) / each + 1;
    values_step = static_cast<uint32_t>(2 * entries) / each + 1;
    cols_step = values_step * (col_bytes / 2);
  }

  template <int kBits>
  SPQR_INLINE void at(const uint32_t* codes, int64_t block, int64_t blocks) {
    constexpr int64_t kBlockWords = kWords<kBits> * kTile, kBlocks = kAhead / (4 * kBlockWords);
    const int64_t ahead = blocks < kBlocks ? blocks : kBlocks;
    const int64_t past = block + ahead < blocks ? 0 : (kTiles - 1) * blocks;  // other tiles of the same pair
    const auto* next = codes + (ahead + past) * kBlockWords;
#pragma GCC unroll 8
    for (int64_t word = 0; word < kBlockWords; word += 16) __builtin_prefetch(next + word);
    __builtin_prefetch(stats + block * stats_step);
    if (block % 4 == 0) {
      __builtin_prefetch(cols + block * cols_step);
      __builtin_prefetch(values + block * values_step);
    }
  }
};

// A tile, from one of its rows on, and how far it has been read.
struct Source {
  const uint32_t* codes;
  const uint8_t* stats;
  const float* of_tile;  // what read_tile_statistics made of it
};

// total += S (Σ_k code_k x_k - Z Σ_k x_k), group by group.
template <int kBits, int kStep, int kRows, int kLimbs>
SPQR_INLINE void multiply_tiles(const Matrix& w, const Input& in, int64_t first_row, int64_t tile, int lane, Source* from,
                                F (*total)[kTiles]) {
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
      constexpr int kHere = kStepWords<kBits, kStep>;
      I part[kTiles][kHere][kSplit<kBits>];
#pragma GCC unroll 2
      for (int i = 0; i < kTiles; i++)
#pragma GCC unroll 8
        for (int t = 0; t < kHere; t++) {
          if constexpr (kSplit<kBits> == 1)
            part[i][t][0] = code[i].word[of_block * kHere + t];
          else
            split(code[i].word[of_block * kHere + t], part[i][t]);
        }
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
  MetByOutliers<kRows> met[kTiles];
  const float* x[kRows];
  for (int m = 0; m < kRows; m++) x[m] = in.x + (first_row + m < in.rows ? first_row + m : in.rows - 1) * in.stride;
  for (int i = 0; i < kTiles && tile + i < last_tile; i++)
    met[i].lay_out(w, x, w.outlier_start[tile + i], w.outlier_start[tile + i + 1]);
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
  for (int i = 0; i < kTiles && tile + i < last_tile; i++) {
    add_outliers<kRows>(w, x, met[i], out[i], tile + i);
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

constexpr FewRows kFewExact = {kFewExactRows, limbs_of(false) * kXWords, fix_row<false>, few<false>};
constexpr FewRows kFewRounded = {kFewRows, limbs_of(true) * kXWords, fix_row<true>, few<true>};
