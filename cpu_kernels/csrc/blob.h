// A matrix as one array of bytes: what a program is handed for it, so that it is handed few things.
#pragma once

#include <cstdint>
#include <string>

#include "matrix.h"

namespace spqr {

// kHeaderWords numbers of 64 bits: kBlobMagic, rows, columns, bits, group, kind, outliers, bytes of an outlier's column
// (2 or 4), whether there is a permutation (0 or 1), zeros. Then the arrays of Matrix in the order in which they stand
// there, each from a multiple of kBlobAlign bytes on; those of outliers have kTile entries more than there are outliers.
constexpr int64_t kBlobMagic = 0x31525153'4c425053;
constexpr int64_t kHeaderWords = 16;
constexpr int64_t kBlobAlign = 64;

// Points `w` into `size` bytes at `data`, which are aligned to 8. Returns what is wrong, empty if nothing: then every array
// lies within the bytes. What the arrays say is for `problem` to check.
std::string read_blob(const uint8_t* data, int64_t size, Matrix& w);

}  // namespace spqr
