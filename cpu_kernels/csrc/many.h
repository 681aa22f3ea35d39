// Many rows of activations: a panel of weights is dequantized into cache and multiplied like a dense one.
// Included after tile.h, in the same way.

constexpr int64_t kWide = kUnitTiles * kTile;       // rows of W in a panel
constexpr int64_t kStrip = kLanes * kMicroVectors;  // of these, what goes through `micro` together, and lies together:
constexpr int64_t kStripSize = kStrip * kDepth;     // [strips][kDepth][kStrip]
constexpr int64_t kTurn = 96 / kMicroRows * kMicroRows;  // rows of activations that all strips meet in turn
static_assert(kWide % kStrip == 0);

// Where a panel has a row's first column.
constexpr int64_t at_row(int64_t row) { return row / kStrip * kStripSize + row % kStrip; }

// Columns of blocks [first, last) of a tile, dequantized to rows of a panel from `top` on.
template <int kBits>
void dequantize(const Matrix& w, int64_t tile, int64_t first, int64_t last, float* panel, int64_t top) {
  const int64_t size = statistics_bytes(w.kind);
  const uint8_t* stats = w.stats + tile * w.groups() * size;
  for (int lane = 0; lane < kTile; lane += kLanes) {
    const uint32_t* codes = w.codes + (tile * w.blocks() + first) * kWords<kBits> * kTile + lane;
    float* to = panel + at_row(top + lane);
    F scale = zero(), offset = zero();
    int64_t group = -1;
    for (int64_t block = first; block < last; block++, codes += kWords<kBits> * kTile) {
      Codes<kBits> code;
      code.read(codes);
#pragma GCC unroll 4
      for (int part = 0; part < 4; part++) {
        const int64_t wanted = (block * kBlock + part * 8) / w.group;
        if (wanted != group) {
          group = wanted;
          read_scale_and_offset(w.kind, stats + group * size, lane, scale, offset);
        }
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++, to += kStrip) store(to, fms(code[part * 8 + k], scale, offset));
      }
    }
  }
}

// Where a tile's outliers are first to be looked at: all those before belong to columns that have been dequantized.
struct Cursor {
  int64_t entry;
  int32_t slot;
};

// Adds the outliers of columns [first, last), a part of the panel that begins where the last call's ended.
inline void scatter_outliers(const Matrix& w, int64_t tile, int64_t first, int64_t last, float* panel, int64_t top,
                             Cursor* cursor) {
  const int64_t end = w.outlier_start[tile + 1];
  const int32_t* counts = w.outlier_counts + kTile * tile;
  int64_t of_lane[kTile] = {};  // where the panel has a lane's row
  for (int row = 0; row < kTile; row++) of_lane[w.lane_of_row[kTile * tile + row]] = at_row(top + row);
  int lanes = kTile;
  bool all_done = true;
  int64_t entry = cursor->entry;
  for (int32_t slot = cursor->slot; entry < end;) {
    while (lanes > 1 && counts[lanes - 1] <= slot) lanes--;
    alignas(64) float value[kTile];
    const auto* values = reinterpret_cast<const uint8_t*>(w.outlier_values + entry);
    for (int i = 0; i < kTile; i += kLanes) store(value + i, halves(values + 2 * i));
    int later = 0;
    for (int lane = 0; lane < lanes; lane++) {
      const int64_t column = w.outlier_col(entry + lane);
      later += column >= last;
      if (column >= first && column < last) panel[(column - first) * kStrip + of_lane[lane]] += value[lane];
    }
    if (later == lanes) break;  // columns rise from slot to slot
    entry += lanes;
    slot++;
    all_done = all_done && later == 0;
    if (all_done) *cursor = {entry, slot};
  }
}

// y[m][0..wide) = (or +=) Σ_k x[k][m] strip[k][0..wide) for kRows rows, of which `rows` are there.
template <int kRows>
void micro(const float* strip, int64_t depth, const float* x, float* y, int64_t y_stride, int64_t rows, int64_t wide,
           bool onto) {
  F sum[kRows][kMicroVectors];
#pragma GCC unroll 12
  for (int m = 0; m < kRows; m++)
#pragma GCC unroll 4
    for (int v = 0; v < kMicroVectors; v++) sum[m][v] = zero();
  for (int64_t k = 0; k < depth; k++, strip += kStrip, x += kMicroRows) {
    F weight[kMicroVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kMicroVectors; v++) weight[v] = load(strip + kLanes * v);
#pragma GCC unroll 12
    for (int m = 0; m < kRows; m++) {
      const F of_row = splat(x[m]);
#pragma GCC unroll 4
      for (int v = 0; v < kMicroVectors; v++) sum[m][v] = fma(of_row, weight[v], sum[m][v]);
    }
  }
  if (wide == kStrip) {
#pragma GCC unroll 12
    for (int m = 0; m < kRows; m++, y += y_stride) {
      if (m >= rows) break;
#pragma GCC unroll 4
      for (int v = 0; v < kMicroVectors; v++)
        store(y + kLanes * v, onto ? add(load(y + kLanes * v), sum[m][v]) : sum[m][v]);
    }
    return;
  }
  alignas(64) float out[kRows][kStrip];
#pragma GCC unroll 12
  for (int m = 0; m < kRows; m++)
#pragma GCC unroll 4
    for (int v = 0; v < kMicroVectors; v++) store(out[m] + kLanes * v, sum[m][v]);
  for (int64_t m = 0; m < rows; m++) {
    float* to = y + m * y_stride;
    for (int64_t i = 0; i < wide; i++) to[i] = onto ? to[i] + out[m][i] : out[m][i];
  }
}

// A strip with rows [first, last) of activations; their columns for it begin at `x` in the panel of the first.
inline void multiply_strip(const Matrix& w, int64_t first, int64_t last, const float* strip, int64_t depth, const float* x,
                           float* y, int64_t wide, bool onto) {
  for (int64_t m = first; m < last; m += kMicroRows, x += w.padded_columns() * kMicroRows) {
    const int64_t rows = last - m < kMicroRows ? last - m : kMicroRows;
    float* to = y + m * w.rows;
    if (rows <= kMicroRows / 3)
      micro<kMicroRows / 3>(strip, depth, x, to, w.rows, rows, wide, onto);
    else if (rows <= kMicroRows / 3 * 2)
      micro<kMicroRows / 3 * 2>(strip, depth, x, to, w.rows, rows, wide, onto);
    else
      micro<kMicroRows>(strip, depth, x, to, w.rows, rows, wide, onto);
  }
}

template <int kBits>
void many_of_bits(const Matrix& w, const Input& in, float* y, int64_t first, int64_t last, float* panel) {
  constexpr int64_t kMostBlocks = kDepth / kBlock;
  const int64_t blocks = w.blocks(), panels = (blocks + kMostBlocks - 1) / kMostBlocks;
  const int64_t deep = (blocks + panels - 1) / panels;  // blocks of a panel
  for (int64_t unit = first; unit < last; unit++) {
    const int64_t top = unit * kWide;
    const int64_t wide = w.rows - top < kWide ? w.rows - top : kWide;
    Cursor cursor[kUnitTiles];
    for (int64_t tile = 0; tile * kTile < wide; tile++) cursor[tile] = {w.outlier_start[unit * kUnitTiles + tile], 0};
    for (int64_t block = 0; block < blocks; block += deep) {
      const int64_t end = blocks - block < deep ? blocks : block + deep;
      for (int64_t i = 0; i * kTile < wide; i++) {
        const int64_t tile = unit * kUnitTiles + i;
        dequantize<kBits>(w, tile, block, end, panel, i * kTile);
        scatter_outliers(w, tile, block * kBlock, end * kBlock, panel, i * kTile, cursor + i);
      }
      const float* x = in.panels + block * kBlock * kMicroRows;
      for (int64_t m = 0; m < in.rows; m += kTurn, x += kTurn * w.padded_columns()) {
        const int64_t last = in.rows - m < kTurn ? in.rows : m + kTurn;
        for (int64_t at = 0; at < wide; at += kStrip)
          multiply_strip(w, m, last, panel + at_row(at), (end - block) * kBlock, x, y + top + at,
                         wide - at < kStrip ? wide - at : kStrip, block != 0);
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

constexpr Panels kMany = {INT64_MAX, kMicroRows, kUnitTiles, many};
