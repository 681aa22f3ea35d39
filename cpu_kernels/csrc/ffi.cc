// What XLA calls: the handlers SpqrMatmul and SpqrTakeRows; and what Python asks by ctypes.
#include <cstdint>
#include <string>
#include <string_view>

#include "matmul.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using spqr::Matrix;

// The leaves of a packed matrix, in the order in which every handler takes them.
struct Leaves {
  ffi::Buffer<ffi::U32> codes;
  ffi::Buffer<ffi::U8> stats;
  ffi::Buffer<ffi::S32> outlier_start, outlier_counts;
  ffi::Buffer<ffi::U8> lane_of_row;
  ffi::AnyBuffer outlier_cols;
  ffi::Buffer<ffi::F16> outlier_values;
  ffi::Buffer<ffi::S32> perm;
};

ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("spqr: " + what); }

bool known_format(const Matrix& w) {
  const bool bits = w.bits == 2 || w.bits == 3 || w.bits == 4 || w.bits == 8;
  const bool group = w.group == 8 || w.group == 16 || (w.group > 0 && w.group % spqr::kBlock == 0);
  const bool kind = w.kind == spqr::Statistics::kNibbles || w.kind == spqr::Statistics::kHalf ||
                    w.kind == spqr::Statistics::kFloat;
  return bits && group && kind && w.rows > 0 && w.columns > 0;
}

// Fills `w` in; every size is compared with what the kernels will read.
ffi::Error read_matrix(const Leaves& leaves, int64_t rows, int64_t columns, int64_t bits, int64_t group, int64_t kind,
                       Matrix& w) {
  w.rows = rows;
  w.columns = columns;
  w.bits = static_cast<int32_t>(bits);
  w.group = group;
  w.kind = static_cast<spqr::Statistics>(kind);
  if (!known_format(w)) return invalid("no such format");
  const auto differs = [](size_t have, int64_t want) { return have != static_cast<size_t>(want); };
  if (differs(leaves.codes.element_count(), w.tiles() * w.blocks() * w.bits * spqr::kTile))
    return invalid("codes have the wrong size");
  if (differs(leaves.stats.element_count(), w.tiles() * w.groups() * spqr::statistics_bytes(w.kind)))
    return invalid("stats have the wrong size");
  if (differs(leaves.outlier_start.element_count(), w.tiles() + 1) ||
      differs(leaves.outlier_counts.element_count(), w.tiles() * spqr::kTile) ||
      differs(leaves.lane_of_row.element_count(), w.tiles() * spqr::kTile))
    return invalid("outlier_start, outlier_counts or lane_of_row has the wrong size");
  if (leaves.outlier_cols.element_count() != leaves.outlier_values.element_count())
    return invalid("outlier_cols and outlier_values differ in size");
  if (leaves.perm.element_count() != 0 && differs(leaves.perm.element_count(), columns))
    return invalid("perm has the wrong size");
  w.codes = leaves.codes.typed_data();
  w.stats = leaves.stats.typed_data();
  w.outlier_start = leaves.outlier_start.typed_data();
  w.outlier_counts = leaves.outlier_counts.typed_data();
  w.lane_of_row = leaves.lane_of_row.typed_data();
  if (leaves.outlier_cols.element_type() == ffi::U16)
    w.outlier_cols16 = leaves.outlier_cols.typed_data<uint16_t>();
  else if (leaves.outlier_cols.element_type() == ffi::S32)
    w.outlier_cols32 = leaves.outlier_cols.typed_data<int32_t>();
  else
    return invalid("outlier_cols must be uint16 or int32");
  w.outlier_values = static_cast<const uint16_t*>(leaves.outlier_values.untyped_data());
  w.perm = leaves.perm.element_count() != 0 ? leaves.perm.typed_data() : nullptr;
  if (w.outlier_start[w.tiles()] + static_cast<size_t>(spqr::kTile) > leaves.outlier_values.element_count())
    return invalid("outlier_start points past the outliers");
  return ffi::Error::Success();
}

spqr::Threads threads_of(ffi::ThreadPool& pool, int64_t threads) {
  const int64_t there = pool.num_threads();
  return {threads > 0 && threads < there ? threads : there > 0 ? there : 1,
          [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); }};
}

ffi::Error matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U32> codes,
                  ffi::Buffer<ffi::U8> stats, ffi::Buffer<ffi::S32> outlier_start,
                  ffi::Buffer<ffi::S32> outlier_counts, ffi::Buffer<ffi::U8> lane_of_row, ffi::AnyBuffer outlier_cols,
                  ffi::Buffer<ffi::F16> outlier_values, ffi::Buffer<ffi::S32> perm, ffi::ResultBuffer<ffi::F32> y,
                  int64_t bits, int64_t group, int64_t kind, std::string_view kernels, bool rounded, int64_t threads) {
  if (x.dimensions().size() != 2 || y->dimensions().size() != 2 || x.dimensions()[0] != y->dimensions()[0])
    return invalid("x and y must be [rows, columns] and [rows, out]");
  Matrix w;
  const Leaves leaves{codes, stats, outlier_start, outlier_counts, lane_of_row, outlier_cols, outlier_values, perm};
  if (ffi::Error error = read_matrix(leaves, y->dimensions()[1], x.dimensions()[1], bits, group, kind, w);
      error.failure())
    return error;
  const spqr::Kernels* found = spqr::find_kernels(std::string(kernels));
  if (found == nullptr) return invalid("this processor has no kernels called " + std::string(kernels));
  spqr::matmul(*found, w, x.typed_data(), x.dimensions()[0], y->typed_data(), rounded, threads_of(pool, threads));
  return ffi::Error::Success();
}

ffi::Error take_rows(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> index, ffi::Buffer<ffi::U32> codes,
                     ffi::Buffer<ffi::U8> stats, ffi::Buffer<ffi::S32> outlier_start,
                     ffi::Buffer<ffi::S32> outlier_counts, ffi::Buffer<ffi::U8> lane_of_row,
                     ffi::AnyBuffer outlier_cols, ffi::Buffer<ffi::F16> outlier_values, ffi::Buffer<ffi::S32> perm,
                     ffi::ResultBuffer<ffi::F32> y, int64_t rows, int64_t bits, int64_t group, int64_t kind) {
  if (index.dimensions().size() != 1 || y->dimensions().size() != 2 || index.dimensions()[0] != y->dimensions()[0])
    return invalid("index and y must be [rows] and [rows, columns]");
  Matrix w;
  const Leaves leaves{codes, stats, outlier_start, outlier_counts, lane_of_row, outlier_cols, outlier_values, perm};
  if (ffi::Error error = read_matrix(leaves, rows, y->dimensions()[1], bits, group, kind, w); error.failure())
    return error;
  spqr::take_rows(w, index.typed_data(), index.dimensions()[0], y->typed_data(), threads_of(pool, 0));
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)

#define SPQR_LEAVES             \
  Arg<ffi::Buffer<ffi::U32>>()  \
      .Arg<ffi::Buffer<ffi::U8>>()  \
      .Arg<ffi::Buffer<ffi::S32>>() \
      .Arg<ffi::Buffer<ffi::S32>>() \
      .Arg<ffi::Buffer<ffi::U8>>()  \
      .Arg<ffi::AnyBuffer>()        \
      .Arg<ffi::Buffer<ffi::F16>>() \
      .Arg<ffi::Buffer<ffi::S32>>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpqrMatmul, matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .SPQR_LEAVES.Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("kind")
                                  .Attr<std::string_view>("kernels")
                                  .Attr<bool>("rounded")
                                  .Attr<int64_t>("threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpqrTakeRows, take_rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .SPQR_LEAVES.Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("rows")
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("kind"));

extern "C" {

#ifdef SPQR_DIGEST
// Of the sources: whoever builds the library sees by it whether it must be built again.
extern const char spqr_digest[];
const char spqr_digest[] = "spqr sources " SPQR_DIGEST;
#endif

// Names of the kernels that this processor can run, best first, with commas between.
const char* spqr_kernel_names() {
  static const std::string names = [] {
    std::string all;
    for (const spqr::Kernels* kernels : spqr::supported_kernels()) all += (all.empty() ? "" : ",") + std::string(kernels->name);
    return all;
  }();
  return names.c_str();
}

// What is wrong with a matrix's outliers and permutation; "" if nothing. The text lives until the next call.
const char* spqr_problem(int64_t rows, int64_t columns, const int32_t* outlier_start, const int32_t* outlier_counts,
                         const uint8_t* lane_of_row, const uint16_t* cols16, const int32_t* cols32, int64_t entries,
                         const int32_t* perm) {
  static thread_local std::string found;
  Matrix w;
  w.rows = rows;
  w.columns = columns;
  w.outlier_start = outlier_start;
  w.outlier_counts = outlier_counts;
  w.lane_of_row = lane_of_row;
  w.outlier_cols16 = cols16;
  w.outlier_cols32 = cols32;
  w.perm = perm;
  found = spqr::problem(w, entries);
  return found.c_str();
}

// As spqr::pack_codes.
void spqr_pack_codes(const uint16_t* stored, int64_t rows, int64_t columns, int64_t words, int32_t bits, int32_t width,
                     uint32_t* to) {
  spqr::pack_codes(stored, rows, columns, words, bits, width, to);
}

}  // extern "C"

#pragma GCC visibility pop
