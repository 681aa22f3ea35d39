// The layout that the kernels read, and what a set of kernels offers.
//
// Letters: W [rows, columns] is the quantized matrix, columns in permuted order;
// a tile is 16 rows, a block 32 columns, g the columns of a group.
#pragma once

#include <cstdint>

#include "attention.h"

namespace spqr {

constexpr int64_t kTile = 16;
constexpr int64_t kBlock = 32;

// How the scale and zero point of a tile's 16 rows in one group are kept.
enum class Statistics : int32_t {
  kNibbles = 0,  // 16 bytes, scale code in the low and zero code in the high nibble;
                 // then float16 ss, sz, zs, zz: s = ss (code - sz), z = zs (code - zz)
  kHalf = 1,     // 16 scales, then 16 zero points, float16
  kFloat = 2,    // the same, float32
};

constexpr int64_t statistics_bytes(Statistics kind) {
  return kind == Statistics::kNibbles ? 24 : kind == Statistics::kHalf ? 64 : 128;
}

// A weight is s (code - z), plus its outlier if it has one.
//
// codes: [tiles][blocks][bits][16] words of 32 bits, lane = row of the tile. For 4
// bits, word t holds columns 8t..8t+7, one a nibble. For 2 and 3 bits, word t/2
// holds the low two bits of those nibbles, shifted by 2 (t % 2); for 3 bits a third
// word holds the high bits, bit 4i + t that of nibble i in word t. For 8 bits, word
// t holds columns 4t..4t+3, one a byte.
//
// Outliers of a tile: its rows, sorted by falling number of outliers, are lanes;
// slot k holds the k-th outlier of each lane that has one, lanes in order; columns
// rise. So 16 entries at a time belong to 16 rows, and none is padding.
struct Matrix {
  int64_t rows = 0, columns = 0;
  int32_t bits = 4;  // 2, 3, 4 or 8
  int64_t group = 16;  // 8, 16 or a multiple of 32
  Statistics kind = Statistics::kNibbles;
  const uint32_t* codes = nullptr;
  const uint8_t* stats = nullptr;            // [tiles][groups][statistics_bytes]
  const int32_t* outlier_start = nullptr;    // [tiles + 1], entries before each tile
  const int32_t* outlier_counts = nullptr;   // [tiles][16], of each lane, falling
  const uint8_t* lane_of_row = nullptr;      // [tiles][16]
  const uint16_t* outlier_cols16 = nullptr;  // one of these two
  const int32_t* outlier_cols32 = nullptr;
  const uint16_t* outlier_values = nullptr;  // float16; at least kTile more than there are outliers, to be read at will
  const int32_t* perm = nullptr;             // [columns] or null

  int64_t tiles() const { return (rows + kTile - 1) / kTile; }
  int64_t blocks() const { return (columns + kBlock - 1) / kBlock; }
  int64_t padded_columns() const { return blocks() * kBlock; }
  int64_t groups() const { return (padded_columns() + group - 1) / group; }
  int64_t rows_in_tile(int64_t tile) const { return rows - tile * kTile < kTile ? rows - tile * kTile : kTile; }
  int32_t outlier_col(int64_t entry) const {
    return outlier_cols16 != nullptr ? outlier_cols16[entry] : outlier_cols32[entry];
  }
};

// Activations, columns in permuted order, padded with zeros to whole blocks.
struct Input {
  int64_t rows = 0;
  // For few rows, row by row, as floats and as `FewRows::fix` leaves them:
  int64_t stride = 0;                // floats from row to row
  const float* x = nullptr;          // [rows][stride]
  const int32_t* fixed = nullptr;    // [rows][blocks][words]
  const float* step = nullptr;       // [rows][blocks]
  const float* sums = nullptr;       // [rows][groups], of the fixed-point numbers times their step
  // For more rows, column by column, so that what is multiplied together lies together:
  // [panels of `Panels::width` rows][padded columns][width], zeros where there is no row.
  const float* panels = nullptr;
};

constexpr int64_t kFewRows = 16;    // up to here int8 activations meet codes as they are; above, weights are made
constexpr int64_t kRowsAtOnce = 4;  // of few rows, those that go through a tile together
constexpr int64_t kScratch = 8;     // floats a group that this takes
constexpr int64_t kUnitTiles = 2;   // tiles of a panel of weights
constexpr int64_t kDepth = 512;     // its columns

// Products with few rows of activations, in fixed point.
struct FewRows {
  int64_t most;   // rows
  int64_t words;  // 32-bit words that a block of activations becomes
  // One row of activations to `fixed` [blocks][words], `step` [blocks] and `sums` [groups].
  void (*fix)(const Matrix&, const float* x, int32_t* fixed, float* step, float* sums);
  // y [input.rows][matrix.rows] of tiles [first, last); scratch holds kScratch floats a group.
  void (*run)(const Matrix&, const Input&, float* y, int64_t first, int64_t last, float* scratch);
};

// Products with more rows, in float32, by panels of activations.
struct Panels {
  int64_t most;   // rows
  int64_t width;  // rows of a panel
  int64_t tiles;  // of a unit of the matrix
  // y of units [first, last); scratch holds kDepth * kUnitTiles * kTile floats, aligned to 64 bytes.
  void (*run)(const Matrix&, const Input&, float* y, int64_t first, int64_t last, float* scratch);
};

// One instruction set's kernels.
struct Kernels {
  const char* name;
  FewRows few;          // as exact as products in float32
  FewRows few_rounded;  // with activations of 8 bits
  Panels some, many;    // the first may take no rows
  SpanOfPositions attend;  // see attention.h
};

// Null where they are of another family of processors. Whether this one has them is for the caller to ask.
extern const Kernels* const kPortable;  // on ARM, NEON's
extern const Kernels* const kNeonDot;
extern const Kernels* const kAvx2;
extern const Kernels* const kAvx512;
extern const Kernels* const kAvx512Vnni;

}  // namespace spqr
