// What all kernels share: codes, statistics and outliers of a tile, written once over the names of a simd_*.h.
// Included inside a namespace of one instruction set, and only there: nothing in it is seen outside that file.

template <int kBits>
constexpr int kWords = kBits == 8 ? 8 : kBits;

// 32 columns of kLanes rows: nibbles in four words, or for 8 bits bytes in eight.
template <int kBits>
struct Codes {
  I word[kBits == 8 ? 8 : 4];

  SPQR_INLINE void read(const uint32_t* p) {
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

// Scale and zero point of kLanes rows in one group, whose statistics start at `p`; `of_tile` is what
// read_tile_statistics made of the four float16, if there are any.
SPQR_INLINE void read_statistics(Statistics kind, const uint8_t* p, int lane, const float* of_tile, F& scale,
                                 F& zero_point) {
  if (__builtin_expect(kind == Statistics::kNibbles, 1)) {
    const I codes = bytes(p + lane);
    scale = fms(nibble(codes, 0), splat(of_tile[0]), splat(of_tile[1]));
    zero_point = fms(number(right<4>(codes)), splat(of_tile[2]), splat(of_tile[3]));
  } else if (kind == Statistics::kHalf) {
    scale = halves(p + 2 * lane);
    zero_point = halves(p + 2 * (kTile + lane));
  } else {
    scale = load(reinterpret_cast<const float*>(p) + lane);
    zero_point = load(reinterpret_cast<const float*>(p) + kTile + lane);
  }
}

// The same for weights that are made one by one: w = scale code - offset.
SPQR_INLINE void read_scale_and_offset(Statistics kind, const uint8_t* p, int lane, F& scale, F& offset) {
  alignas(16) float of_tile[4] = {};
  if (kind == Statistics::kNibbles) factors_and_products(p + kTile, of_tile);
  F zero_point;
  read_statistics(kind, p, lane, of_tile, scale, zero_point);
  offset = mul(scale, zero_point);
}

// What all rows of a tile have in common, group by group: to [groups][4] = ss, ss sz, zs, zs zz. Products of two float16
// are exact in float32, so a scale is rounded once.
inline void read_tile_statistics(const Matrix& w, int64_t tile, float* to) {
  if (w.kind != Statistics::kNibbles) return;
  const int64_t groups = w.groups(), size = statistics_bytes(w.kind);
  const uint8_t* p = w.stats + tile * groups * size + kTile;
  for (int64_t group = 0; group < groups; group++) factors_and_products(p + group * size, to + 4 * group);
}

// Activations laid out in the order of the outliers that they meet: gathering them in the loop that multiplies would be
// slower by far. It is done before a tile is multiplied, so that what was written one by one can be read sixteen at once.
template <int kRows>
struct MetByOutliers {
  static constexpr int64_t kAtATime = 512;
  alignas(64) float x[kRows][kAtATime + kTile];
  int64_t there;

  // For outliers from `first` on; x_of[m][k] is row m's column k.
  SPQR_INLINE void lay_out(const Matrix& w, const float* const* x_of, int64_t first, int64_t end) {
    there = end - first < kAtATime ? end - first : kAtATime;
    if (w.outlier_cols16 != nullptr)
      lay_out_columns(w.outlier_cols16 + first, x_of);
    else
      lay_out_columns(w.outlier_cols32 + first, x_of);
  }

 private:
  template <typename Column>
  SPQR_INLINE void lay_out_columns(const Column* columns, const float* const* x_of) {
    for (int m = 0; m < kRows; m++) {
      const float* from = x_of[m];
      for (int64_t i = 0; i < there; i++) x[m][i] = from[columns[i]];
      for (int64_t i = there; i < there + kTile; i++) x[m][i] = 0.0f;
    }
  }
};

// Adds a tile's outliers to `out` [kRows][16]; `met` has been laid out for the first of them.
template <int kRows>
SPQR_INLINE void add_outliers(const Matrix& w, const float* const* x_of, MetByOutliers<kRows>& met, float (*out)[kTile],
                              int64_t tile) {
  constexpr int kVectors = kTile / kLanes;
  const int64_t start = w.outlier_start[tile], end = w.outlier_start[tile + 1];
  if (start == end) return;
  const int32_t* counts = w.outlier_counts + kTile * tile;
  F sum[kRows][kVectors];
  for (int m = 0; m < kRows; m++)
    for (F& each : sum[m]) each = zero();
  int32_t slot = 0;
  for (int64_t first = start; first < end;) {
    if (first > start) met.lay_out(w, x_of, first, end);
    const auto* values = reinterpret_cast<const uint8_t*>(w.outlier_values + first);
    int64_t at = 0;
    for (int lanes = 0; at < met.there; slot++, at += lanes) {
      lanes = count_above(counts, slot);
      if (lanes == 0 || at + lanes > met.there) break;
      for (int i = 0; i < kVectors; i++) {
        const F value = where_above(halves(values + 2 * (at + kLanes * i)), counts + kLanes * i, slot);
        for (int m = 0; m < kRows; m++) sum[m][i] = fma(value, load(met.x[m] + at + kLanes * i), sum[m][i]);
      }
    }
    if (at == 0) break;  // counts that do not add up
    first += at;
  }
  for (int m = 0; m < kRows; m++) {
    alignas(64) float by_lane[kTile];
    for (int i = 0; i < kVectors; i++) store(by_lane + kLanes * i, sum[m][i]);
    for (int row = 0; row < kTile; row++) out[m][row] += by_lane[w.lane_of_row[kTile * tile + row]];
  }
}
