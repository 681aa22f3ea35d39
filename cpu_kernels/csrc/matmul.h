// y = x Wᵀ for a packed matrix: choice of kernels, preparation of x, threads.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "matrix.h"
#include "threads.h"

namespace spqr {

// Kernels that this processor can run, best first.
const std::vector<const Kernels*>& supported_kernels();

// The kernels called `name`; null if there are none of that name here.
const Kernels* find_kernels(std::string_view name);

// What is wrong with the parts of a matrix that its shape does not show (the order of
// outlier columns is left alone); empty if nothing. `entries` outliers are there.
std::string problem(const Matrix& w, int64_t entries);

// Codes [rows][words] as they are stored, 16 codes of `bits` bits a run of `bits` words of 16 bits,
// to the layout of Matrix::codes for `width` bits; `to` holds zeros. All threads of the machine.
void pack_codes(const uint16_t* stored, int64_t rows, int64_t columns, int64_t words, int32_t bits, int32_t width,
                uint32_t* to);

struct Product {
  Matrix w;
  float* y = nullptr;  // [rows][w.rows]
};

// Products of one x with matrices of as many columns. x: [rows][columns], in the matrices' own column order.
// `rounded`: for few rows, activations of 8 bits, one scale for 32 columns.
void matmul(const Kernels& kernels, const std::vector<Product>& products, const float* x, int64_t rows, bool rounded,
            const Threads& threads);

// Rows of the matrix, dequantized: y [count][w.columns]; rows outside it are clipped to it.
void take_rows(const Matrix& w, const int32_t* index, int64_t count, float* y, const Threads& threads);

}  // namespace spqr
