// What a matrix must be before kernels may read it.
#include "matmul.h"

namespace spqr {

namespace {

bool columns_rise(const Matrix& w, int64_t tile) {
  const int32_t* counts = w.outlier_counts + kTile * tile;
  int64_t last[kTile] = {};
  int lanes = kTile;
  int64_t entry = w.outlier_start[tile];
  for (int32_t slot = 0; entry < w.outlier_start[tile + 1]; slot++, entry += lanes) {
    while (lanes > 1 && counts[lanes - 1] <= slot) lanes--;
    for (int lane = 0; lane < lanes; lane++) {
      const int64_t column = w.outlier_col(entry + lane);
      if (column < last[lane]) return false;
      last[lane] = column;
    }
  }
  return true;
}

}  // namespace

std::string problem(const Matrix& w, int64_t entries) {
  if (w.outlier_start[0] != 0 || w.outlier_start[w.tiles()] != entries) return "outlier_start does not span all outliers";
  for (int64_t tile = 0; tile < w.tiles(); tile++) {
    const int32_t* counts = w.outlier_counts + kTile * tile;
    int64_t total = 0;
    uint32_t lanes = 0;
    for (int64_t lane = 0; lane < kTile; lane++) {
      if (counts[lane] < 0 || counts[lane] > w.columns || (lane > 0 && counts[lane] > counts[lane - 1]))
        return "outlier_counts do not fall within a tile";
      total += counts[lane];
      if (w.lane_of_row[kTile * tile + lane] >= kTile) return "lane_of_row is not in 0..15";
      lanes |= 1u << w.lane_of_row[kTile * tile + lane];
    }
    if (lanes != 0xffffu) return "lane_of_row is not a permutation";
    if (w.outlier_start[tile + 1] - static_cast<int64_t>(w.outlier_start[tile]) != total)
      return "outlier_counts and outlier_start disagree";
  }
  for (int64_t entry = 0; entry < entries; entry++)
    if (w.outlier_col(entry) < 0 || w.outlier_col(entry) >= w.columns) return "an outlier's column is not in the matrix";
  for (int64_t tile = 0; tile < w.tiles(); tile++)
    if (!columns_rise(w, tile)) return "outliers of a row are not in the order of their columns";
  if (w.perm != nullptr)
    for (int64_t k = 0; k < w.columns; k++)
      if (w.perm[k] < 0 || w.perm[k] >= w.columns) return "perm is not in the matrix";
  return "";
}

}  // namespace spqr
