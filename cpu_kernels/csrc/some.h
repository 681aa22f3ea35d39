// Some rows of activations, too many to multiply codes in integers and too few to dequantize for a cache: weights are
// made in registers and multiplied at once by kSomeRows rows. Included after few.h, in the same way.

constexpr int64_t kSomeRows = 8;  // as many sums as keep two units for products busy

// Products of kVectors vectors of rows of W, from `lane` on, with rows of activations: total[m][lane].
template <int kBits, int kRows, int kVectors>
SPQR_INLINE void multiply_dequantized(const Matrix& w, const float* panel, int64_t tile, int lane,
                                      float (*total)[kTile]) {
  const int64_t blocks = w.blocks(), size = statistics_bytes(w.kind), per_group = w.group / 8;
  const uint32_t* codes = w.codes + tile * blocks * kWords<kBits> * kTile + lane;
  const uint8_t* stats = w.stats + tile * w.groups() * size;
  Fetches fetches;
  fetches.aim(w, tile);
  F sum[kRows][kVectors], scale[kVectors], offset[kVectors];
  for (int m = 0; m < kRows; m++)
    for (F& each : sum[m]) each = zero();
  int64_t left_in_group = 0;
  for (int64_t block = 0; block < blocks; block++, codes += kWords<kBits> * kTile) {
    fetches.template at<kBits>(codes, block, blocks);
    Codes<kBits> code[kVectors];
    for (int v = 0; v < kVectors; v++) code[v].read(codes + kLanes * v);
#pragma GCC unroll 4
    for (int part = 0; part < kBlock / 8; part++, left_in_group--) {
      if (left_in_group == 0) {
        for (int v = 0; v < kVectors; v++)
          read_scale_and_offset(w.kind, stats, lane + kLanes * v, scale[v], offset[v]);
        stats += size;
        left_in_group = per_group;
      }
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++, panel += kSomeRows) {
        F weight[kVectors];
        for (int v = 0; v < kVectors; v++) weight[v] = fms(code[v][part * 8 + k], scale[v], offset[v]);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; m++) {
          const F of_row = splat(panel[m]);
          for (int v = 0; v < kVectors; v++) sum[m][v] = fma(of_row, weight[v], sum[m][v]);
        }
      }
    }
  }
  for (int m = 0; m < kRows; m++)
    for (int v = 0; v < kVectors; v++) store(total[m] + lane + kLanes * v, sum[m][v]);
}

// A tile's outliers times activations: to[row][m] += Σ value panel[column][m].
inline void add_outliers_of_panel(const Matrix& w, int64_t tile, const float* panel, float (*to)[kSomeRows]) {
  constexpr int kVectors = kSomeRows / kLanes;
  const int64_t end = w.outlier_start[tile + 1];
  const int32_t* counts = w.outlier_counts + kTile * tile;
  int row_of_lane[kTile] = {};
  for (int row = 0; row < kTile; row++) row_of_lane[w.lane_of_row[kTile * tile + row]] = row;
  int lanes = kTile;
  int64_t entry = w.outlier_start[tile];
  for (int32_t slot = 0; entry < end; slot++, entry += lanes) {
    while (lanes > 1 && counts[lanes - 1] <= slot) lanes--;
    alignas(64) float value[kTile];
    const auto* values = reinterpret_cast<const uint8_t*>(w.outlier_values + entry);
    for (int i = 0; i < kTile; i += kLanes) store(value + i, halves(values + 2 * i));
    for (int lane = 0; lane < lanes; lane++) {
      const float* x = panel + w.outlier_col(entry + lane) * kSomeRows;
      float* sum = to[row_of_lane[lane]];
      for (int v = 0; v < kVectors; v++)
        store(sum + kLanes * v, fma(splat(value[lane]), load(x + kLanes * v), load(sum + kLanes * v)));
    }
  }
}

template <int kBits>
void some_of_bits(const Matrix& w, const Input& in, float* y, int64_t first, int64_t last) {
  constexpr int kVectors = kTile / kLanes;
  for (int64_t tile = first; tile < last; tile++) {
    const float* panel = in.panels;
    for (int64_t m = 0; m < in.rows; m += kSomeRows, panel += w.padded_columns() * kSomeRows) {
      const int64_t rows = in.rows - m < kSomeRows ? in.rows - m : kSomeRows;
      alignas(64) float dense[kSomeRows][kTile];
      alignas(64) float sparse[kTile][kSomeRows] = {};
      if (rows <= kSomeRows / 2)  // as many sums at once as otherwise, or each would wait for itself
        multiply_dequantized<kBits, kSomeRows / 2, kVectors>(w, panel, tile, 0, dense);
      else
        for (int lane = 0; lane < kTile; lane += kLanes)
          multiply_dequantized<kBits, kSomeRows, 1>(w, panel, tile, lane, dense);
      add_outliers_of_panel(w, tile, panel, sparse);
      for (int64_t i = 0; i < rows; i++)
        for (int64_t row = 0; row < w.rows_in_tile(tile); row++)
          y[(m + i) * w.rows + tile * kTile + row] = dense[i][row] + sparse[row][i];
    }
  }
}

void some(const Matrix& w, const Input& in, float* y, int64_t first, int64_t last, float*) {
  if (w.bits == 2) return some_of_bits<2>(w, in, y, first, last);
  if (w.bits == 3) return some_of_bits<3>(w, in, y, first, last);
  if (w.bits == 4) return some_of_bits<4>(w, in, y, first, last);
  return some_of_bits<8>(w, in, y, first, last);
}

constexpr Panels kSome = {kFewRows, kSomeRows, 1, some};
