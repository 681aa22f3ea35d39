// The kernels, written once over the names of a simd_*.h. Included inside a namespace
// of one instruction set, and only there: nothing in it is seen outside that file.

template <int kBits>
constexpr int kWords = kBits == 8 ? 8 : kBits;

// 32 columns of kLanes rows: nibbles in four words, or for 8 bits bytes in eight.
template <int kBits>
struct Codes {
  I word[kBits == 8 ? 8 : 4];

  SPQR_INLINE explicit Codes(const uint32_t* p) {
    if constexpr (kBits == 4 || kBits == 8) {
#pragma GCC unroll 8
      for (int t = 0; t < kWords<kBits>; t++) word[t] = words(p + kTile * t);
    } else {
      const I first = words(p), second = words(p + kTile);
      word[0] = masked(first, 0x33333333u);
      word[1] = masked(right<2>(first), 0x33333333u);
      word[2] = masked(second, 0x33333333u);
      word[3] = masked(right<2>(second), 0x33333333u);
      if constexpr (kBits == 3) {
        const I high = words(p + 2 * kTile);
        word[0] = joined(word[0], left<2>(high), 0x44444444u);
        word[1] = joined(word[1], left<1>(high), 0x44444444u);
        word[2] = joined(word[2], high, 0x44444444u);
        word[3] = joined(word[3], right<1>(high), 0x44444444u);
      }
    }
  }

  SPQR_INLINE F operator[](int column) const {
    if constexpr (kBits == 8) {
      const I a = word[column / 4];
      const int i = column % 4;
      return number(i == 0   ? masked(a, 255)
                    : i == 1 ? masked(right<8>(a), 255)
                    : i == 2 ? masked(right<16>(a), 255)
                             : right<24>(a));
    } else {
      return nibble(word[column / 8], column % 8);
    }
  }
};

SPQR_INLINE void read_statistics(Statistics kind, const uint8_t* p, int lane, F& scale, F& zero_point) {
  if (__builtin_expect(kind == Statistics::kNibbles, 1)) {
    const I codes = bytes(p + lane);
    F of_tile[4];
    four_halves(p + kTile, of_tile);
    scale = mul(sub(nibble(codes, 0), of_tile[1]), of_tile[0]);
    zero_point = mul(sub(nibble(codes, 1), of_tile[3]), of_tile[2]);
  } else if (kind == Statistics::kHalf) {
    scale = halves(p + 2 * lane);
    zero_point = halves(p + 2 * (kTile + lane));
  } else {
    scale = load(reinterpret_cast<const float*>(p) + lane);
    zero_point = load(reinterpret_cast<const float*>(p) + kTile + lane);
  }
}

// ---- outliers ---------------------------------------------------------------------------

// Adds a tile's outliers to `out` [kRows][16]; x[m][kColumnStep k] is row m's column k.
template <int kRows, int kColumnStep>
SPQR_INLINE void add_outliers(const Matrix& w, const float* const* x, float (*out)[kTile], int64_t tile) {
  int64_t entry = w.outlier_start[tile];
  const int64_t end = w.outlier_start[tile + 1];
  if (entry == end) return;
  const int32_t* counts = w.outlier_counts + kTile * tile;
  const uint8_t* lane_of_row = w.lane_of_row + kTile * tile;
  int lanes = kTile;
#ifdef SPQR_GATHERS
  F sum[kRows];
  for (int m = 0; m < kRows; m++) sum[m] = zero();
  for (int32_t slot = 0; entry < end; slot++, entry += lanes) {
    while (lanes > 1 && counts[lanes - 1] <= slot) lanes--;
    const Slot found(w, entry, lanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; m++) sum[m] = found.times<kColumnStep>(x[m], sum[m]);
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; m++) store(out[m], add(load(out[m]), by_row(sum[m], lane_of_row)));
#else
  float sum[kRows][kTile] = {};
  for (int32_t slot = 0; entry < end; slot++, entry += lanes) {
    while (lanes > 1 && counts[lanes - 1] <= slot) lanes--;
    for (int lane = 0; lane < lanes; lane++) {
      const float value = half_to_float(w.outlier_values[entry + lane]);
      const int64_t at = kColumnStep * static_cast<int64_t>(w.outlier_col(entry + lane));
      for (int m = 0; m < kRows; m++) sum[m][lane] += value * x[m][at];
    }
  }
  for (int m = 0; m < kRows; m++)
    for (int row = 0; row < kTile; row++) out[m][row] += sum[m][lane_of_row[row]];
#endif
}

// ---- few rows of activations ------------------------------------------------------------

SPQR_INLINE void ahead(const uint32_t* codes) {
  for (int line = 0; line < 3; line++) __builtin_prefetch(codes + 16 * line);
}

// total += S (Σ_k code_k x_k - Z Σ_k x_k), group by group.
template <int kBits, int kStep, int kRows>
SPQR_INLINE void factored(const Matrix& w, const Input& in, const float* const* x, int64_t tile, int lane, F* total) {
  const int64_t blocks = w.blocks(), groups = w.groups(), per_group = w.group / kBlock;
  const int64_t size = statistics_bytes(w.kind);
  const uint32_t* codes = w.codes + tile * blocks * kWords<kBits> * kTile + lane;
  const uint8_t* stats = w.stats + tile * groups * size;
  int64_t group = 0, left_in_group = per_group;
  F sum[kRows][2];
  for (int m = 0; m < kRows; m++) sum[m][0] = sum[m][1] = zero();
  for (int64_t block = 0; block < blocks; block++, codes += kWords<kBits> * kTile) {
    ahead(codes + 8 * kWords<kBits> * kTile);
    const Codes<kBits> code(codes);
#pragma GCC unroll 4
    for (int part = 0; part < kBlock / kStep; part++) {
#pragma GCC unroll 32
      for (int k = 0; k < kStep; k++) {
        const F q = code[part * kStep + k];
#pragma GCC unroll 4
        for (int m = 0; m < kRows; m++)
          sum[m][k & 1] = fma(q, splat(x[m][block * kBlock + part * kStep + k]), sum[m][k & 1]);
      }
      if (kStep < kBlock || --left_in_group == 0 || block + 1 == blocks) {
        F scale, zero_point;
        read_statistics(w.kind, stats, lane, scale, zero_point);
#pragma GCC unroll 4
        for (int m = 0; m < kRows; m++) {
          const int64_t row = m < in.rows ? m : in.rows - 1;
          const F away = splat(in.sums[row * groups + group]);
          total[m] = fma(scale, fnma(zero_point, away, add(sum[m][0], sum[m][1])), total[m]);
          sum[m][0] = sum[m][1] = zero();
        }
        stats += size;
        group++;
        left_in_group = per_group;
      }
    }
  }
}

// total += Σ_k (S code_k - S Z) x_k: with many rows it pays to make the weight first.
template <int kBits, int kStep, int kRows>
SPQR_INLINE void expanded(const Matrix& w, const float* panel, int64_t tile, int lane, F* total) {
  const int64_t blocks = w.blocks(), per_group = w.group / kBlock;
  const int64_t size = statistics_bytes(w.kind);
  const uint32_t* codes = w.codes + tile * blocks * kWords<kBits> * kTile + lane;
  const uint8_t* stats = w.stats + tile * w.groups() * size;
  int64_t left_in_group = 0;
  F scale = zero(), offset = zero();
  for (int64_t block = 0; block < blocks; block++, codes += kWords<kBits> * kTile) {
    ahead(codes + 8 * kWords<kBits> * kTile);
    const Codes<kBits> code(codes);
#pragma GCC unroll 4
    for (int part = 0; part < kBlock / kStep; part++) {
      if (kStep < kBlock || left_in_group == 0) {
        F zero_point;
        read_statistics(w.kind, stats, lane, scale, zero_point);
        offset = mul(scale, zero_point);
        stats += size;
        left_in_group = per_group;
      }
#pragma GCC unroll 32
      for (int k = 0; k < kStep; k++) {
        const F weight = fms(code[part * kStep + k], scale, offset);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; m++)
          total[m] = fma(weight, splat(panel[(part * kStep + k) * kRows + m]), total[m]);
      }
    }
    left_in_group--;
    panel += kBlock * kRows;
  }
}

#ifdef SPQR_DOTS
// Codes times activations of 8 bits, in integers; the rest as in `factored`.
template <int kBits, int kStep, int kRows>
SPQR_INLINE void rounded(const Matrix& w, const Input& in, int64_t tile, int lane, F* total) {
  const int64_t blocks = w.blocks(), groups = w.groups(), per_group = w.group / kBlock;
  const int64_t size = statistics_bytes(w.kind);
  const uint32_t* codes = w.codes + tile * blocks * kWords<kBits> * kTile + lane;
  const uint8_t* stats = w.stats + tile * groups * size;
  int64_t group = 0, left_in_group = per_group;
  F sum[kRows];
  for (int m = 0; m < kRows; m++) sum[m] = zero();
  constexpr int kColumns = kBits == 8 ? 4 : 8;  // of a word
  for (int64_t block = 0; block < blocks; block++, codes += kWords<kBits> * kTile) {
    ahead(codes + 8 * kWords<kBits> * kTile);
    const Codes<kBits> code(codes);
#pragma GCC unroll 4
    for (int part = 0; part < kBlock / kStep; part++) {
#pragma GCC unroll 4
      for (int m = 0; m < kRows; m++) {
        const int64_t row = m < in.rows ? m : in.rows - 1;
        const int8_t* x = in.rounded + row * w.padded_columns() + block * kBlock + part * kStep;
        I low = no_dots(), high = no_dots();
#pragma GCC unroll 8
        for (int t = 0; t < kStep / kColumns; t++) {
          const I word = code.word[part * (kStep / kColumns) + t];
          int32_t four;
          std::memcpy(&four, x + kColumns * t, 4);
          low = dot(low, masked(word, 0x0f0f0f0fu), four);
          if (kBits != 8) std::memcpy(&four, x + kColumns * t + 4, 4);
          high = dot(high, masked(right<4>(word), 0x0f0f0f0fu), four);
        }
        const I both = plus(low, kBits == 8 ? left<4>(high) : high);
        sum[m] = fma(number(both), splat(in.rounded_scale[row * blocks + block]), sum[m]);
      }
      if (kStep < kBlock || --left_in_group == 0 || block + 1 == blocks) {
        F scale, zero_point;
        read_statistics(w.kind, stats, lane, scale, zero_point);
#pragma GCC unroll 4
        for (int m = 0; m < kRows; m++) {
          const int64_t row = m < in.rows ? m : in.rows - 1;
          const F away = splat(in.sums[row * groups + group]);
          total[m] = fma(scale, fnma(zero_point, away, sum[m]), total[m]);
          sum[m] = zero();
        }
        stats += size;
        group++;
        left_in_group = per_group;
      }
    }
  }
}
#endif  // SPQR_DOTS

// A panel of activations of kRows rows, or where kApart kRows of them one by one.
template <int kBits, int kStep, int kRows, bool kRounded, bool kApart>
void few_tiles(const Matrix& w, const Input& in, const float* panel, float* y, int64_t first, int64_t last) {
  const float* x[kRows];
  for (int m = 0; m < kRows; m++)
    x[m] = kApart ? in.x + (m < in.rows ? m : in.rows - 1) * in.stride : panel + m;
  const int64_t rows = in.rows < kRows ? in.rows : kRows;
  for (int64_t tile = first; tile < last; tile++) {
    alignas(64) float out[kRows][kTile];
    for (int lane = 0; lane < kTile; lane += kLanes) {
      F total[kRows];
#pragma GCC unroll 16
      for (int m = 0; m < kRows; m++) total[m] = zero();
#ifdef SPQR_DOTS
      if constexpr (kRounded)
        rounded<kBits, kStep, kRows>(w, in, tile, lane, total);
      else
#endif
      if constexpr (kApart)
        factored<kBits, kStep, kRows>(w, in, x, tile, lane, total);
      else
        expanded<kBits, kStep, kRows>(w, panel, tile, lane, total);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; m++) store(out[m] + lane, total[m]);
    }
    add_outliers<kRows, kApart ? 1 : kRows>(w, x, out, tile);
    const size_t wide = sizeof(float) * static_cast<size_t>(w.rows_in_tile(tile));
    for (int64_t m = 0; m < rows; m++) std::memcpy(y + m * w.rows + tile * kTile, out[m], wide);
  }
}

// Up to kApartRows rows at a time.
template <int kBits, int kStep, bool kRounded>
void few_apart(const Matrix& w, Input in, float* y, int64_t first, int64_t last) {
  constexpr bool kPreset = kStep == 16 && kBits != 8;  // others make do with fewer programs
  for (int64_t left = in.rows; left > 0; left -= kApartRows) {
    in.rows = left < kApartRows ? left : kApartRows;
    if (in.rows == 1)
      few_tiles<kBits, kStep, 1, kRounded, true>(w, in, nullptr, y, first, last);
    else if (in.rows == 2 && kPreset)
      few_tiles<kBits, kStep, kPreset ? 2 : 1, kRounded, true>(w, in, nullptr, y, first, last);
    else
      few_tiles<kBits, kStep, kApartRows, kRounded, true>(w, in, nullptr, y, first, last);
    in.x += kApartRows * in.stride;
    in.sums += kApartRows * w.groups();
    if (kRounded) {
      in.rounded += kApartRows * w.padded_columns();
      in.rounded_scale += kApartRows * w.blocks();
    }
    y += kApartRows * w.rows;
  }
}

template <int kBits, int kStep, bool kRounded>
void few_of_step(const Matrix& w, const Input& in, float* y, int64_t first, int64_t last) {
  if (kRounded || in.rows <= kApartRows) return few_apart<kBits, kStep, kRounded>(w, in, y, first, last);
  if constexpr (!kRounded) {
    Input part = in;
    const float* panel = in.panels;
    for (int64_t left = in.rows; left > 0; left -= in.width) {
      part.rows = left < in.width ? left : in.width;
      if (in.width == kFewWidth)
        few_tiles<kBits, kStep, kFewWidth, false, false>(w, part, panel, y, first, last);
      else
        few_tiles<kBits, kStep, kFewWidth / 2, false, false>(w, part, panel, y, first, last);
      panel += in.width * w.padded_columns();
      y += in.width * w.rows;
    }
  }
}

template <int kBits, bool kRounded>
void few_of_bits(const Matrix& w, const Input& in, float* y, int64_t first, int64_t last) {
  if (w.group == 8)
    few_of_step<kBits, 8, kRounded>(w, in, y, first, last);
  else if (w.group == 16)
    few_of_step<kBits, 16, kRounded>(w, in, y, first, last);
  else
    few_of_step<kBits, 32, kRounded>(w, in, y, first, last);
}

template <bool kRounded>
void few(const Matrix& w, const Input& in, float* y, int64_t first, int64_t last) {
  if (w.bits == 2) return few_of_bits<2, kRounded>(w, in, y, first, last);
  if (w.bits == 3) return few_of_bits<3, kRounded>(w, in, y, first, last);
  if (w.bits == 4) return few_of_bits<4, kRounded>(w, in, y, first, last);
  return few_of_bits<8, kRounded>(w, in, y, first, last);
}

#ifndef SPQR_ONLY_ROUNDED
// ---- many rows of activations -----------------------------------------------------------

constexpr int64_t kWide = kUnitTiles * kTile;  // rows of W in a panel

// Columns of blocks [first, last) of a tile, dequantized to panel[column][at + row].
template <int kBits>
void dequantize(const Matrix& w, int64_t tile, int64_t first, int64_t last, float* panel) {
  const int64_t size = statistics_bytes(w.kind);
  const uint8_t* stats = w.stats + tile * w.groups() * size;
  for (int lane = 0; lane < kTile; lane += kLanes) {
    const uint32_t* codes = w.codes + (tile * w.blocks() + first) * kWords<kBits> * kTile + lane;
    float* to = panel + lane;
    F scale = zero(), offset = zero();
    int64_t group = -1;
    for (int64_t block = first; block < last; block++, codes += kWords<kBits> * kTile) {
      const Codes<kBits> code(codes);
#pragma GCC unroll 4
      for (int part = 0; part < 4; part++) {
        const int64_t wanted = (block * kBlock + part * 8) / w.group;
        if (wanted != group) {
          group = wanted;
          F zero_point;
          read_statistics(w.kind, stats + group * size, lane, scale, zero_point);
          offset = mul(scale, zero_point);
        }
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++, to += kWide) store(to, fms(code[part * 8 + k], scale, offset));
      }
    }
  }
}

inline void scatter_outliers(const Matrix& w, int64_t tile, int64_t first, int64_t last, float* panel) {
  int64_t entry = w.outlier_start[tile];
  const int64_t end = w.outlier_start[tile + 1];
  const int32_t* counts = w.outlier_counts + kTile * tile;
  int row_of_lane[kTile] = {};
  for (int row = 0; row < kTile; row++) row_of_lane[w.lane_of_row[kTile * tile + row]] = row;
  int lanes = kTile;
  for (int32_t slot = 0; entry < end; slot++, entry += lanes) {
    while (lanes > 1 && counts[lanes - 1] <= slot) lanes--;
    for (int lane = 0; lane < lanes; lane++) {
      const int64_t column = w.outlier_col(entry + lane);
      if (column >= first && column < last)
        panel[(column - first) * kWide + row_of_lane[lane]] += half_to_float(w.outlier_values[entry + lane]);
    }
  }
}

// y[m][0..wide) = (or +=) Σ_k x[k][m] panel[k][0..wide) for kRows rows, of which `rows` are there.
template <int kRows>
void micro(const float* panel, int64_t depth, const float* x, float* y, int64_t y_stride, int64_t rows, int64_t wide,
           bool onto) {
  for (int64_t at = 0; at < wide; at += kLanes * kMicroVectors) {
    F sum[kRows][kMicroVectors];
#pragma GCC unroll 12
    for (int m = 0; m < kRows; m++)
#pragma GCC unroll 4
      for (int v = 0; v < kMicroVectors; v++) sum[m][v] = zero();
    const float* from = panel + at;
    const float* a = x;
    for (int64_t k = 0; k < depth; k++, from += kWide, a += kMicroRows) {
      F weight[kMicroVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kMicroVectors; v++) weight[v] = load(from + kLanes * v);
#pragma GCC unroll 12
      for (int m = 0; m < kRows; m++) {
        const F of_row = splat(a[m]);
#pragma GCC unroll 4
        for (int v = 0; v < kMicroVectors; v++) sum[m][v] = fma(of_row, weight[v], sum[m][v]);
      }
    }
    const int64_t valid = wide - at < kLanes * kMicroVectors ? wide - at : kLanes * kMicroVectors;
    alignas(64) float out[kRows][kLanes * kMicroVectors];
#pragma GCC unroll 12
    for (int m = 0; m < kRows; m++)
#pragma GCC unroll 4
      for (int v = 0; v < kMicroVectors; v++) store(out[m] + kLanes * v, sum[m][v]);
    for (int64_t m = 0; m < rows; m++) {
      float* to = y + m * y_stride + at;
      for (int64_t i = 0; i < valid; i++) to[i] = onto ? to[i] + out[m][i] : out[m][i];
    }
  }
}

template <int kBits>
void many_of_bits(const Matrix& w, const Input& in, float* y, int64_t first, int64_t last, float* panel) {
  constexpr int64_t kBlocksDeep = kDepth / kBlock;
  const int64_t blocks = w.blocks();
  for (int64_t unit = first; unit < last; unit++) {
    const int64_t top = unit * kWide;
    const int64_t wide = w.rows - top < kWide ? w.rows - top : kWide;
    for (int64_t block = 0; block < blocks; block += kBlocksDeep) {
      const int64_t end = blocks - block < kBlocksDeep ? blocks : block + kBlocksDeep;
      for (int64_t tile = 0; tile * kTile < wide; tile++) {
        float* part = panel + tile * kTile;
        dequantize<kBits>(w, unit * kUnitTiles + tile, block, end, part);
        scatter_outliers(w, unit * kUnitTiles + tile, block * kBlock, end * kBlock, part);
      }
      const int64_t depth = (end - block) * kBlock;
      const float* x = in.panels + block * kBlock * kMicroRows;
      for (int64_t m = 0; m < in.rows; m += kMicroRows, x += w.padded_columns() * kMicroRows) {
        const int64_t rows = in.rows - m < kMicroRows ? in.rows - m : kMicroRows;
        float* to = y + m * w.rows + top;
        if (rows <= kMicroRows / 3)
          micro<kMicroRows / 3>(panel, depth, x, to, w.rows, rows, wide, block != 0);
        else if (rows <= kMicroRows / 3 * 2)
          micro<kMicroRows / 3 * 2>(panel, depth, x, to, w.rows, rows, wide, block != 0);
        else
          micro<kMicroRows>(panel, depth, x, to, w.rows, rows, wide, block != 0);
      }
    }
  }
}

void many(const Matrix& w, const Input& in, float* y, int64_t first, int64_t last, float* scratch) {
  if (w.bits == 2) return many_of_bits<2>(w, in, y, first, last, scratch);
  if (w.bits == 3) return many_of_bits<3>(w, in, y, first, last, scratch);
  if (w.bits == 4) return many_of_bits<4>(w, in, y, first, last, scratch);
  return many_of_bits<8>(w, in, y, first, last, scratch);
}

#ifdef SPQR_DOTS
constexpr Kernels kKernels = {SPQR_NAME, few<false>, few<true>, kFewWidth, kMicroRows, many};
#else
constexpr Kernels kKernels = {SPQR_NAME, few<false>, nullptr, kFewWidth, kMicroRows, many};
#endif
#endif  // SPQR_ONLY_ROUNDED
