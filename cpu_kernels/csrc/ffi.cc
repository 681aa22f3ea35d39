// What XLA calls: the handlers SpqrMatmul, SpqrTakeRows and SpqrAttend; and what Python asks by ctypes.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "attention.h"
#include "blob.h"
#include "matmul.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using spqr::Matrix;
using Blob = ffi::Buffer<ffi::U8>;

ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("spqr: " + what); }

ffi::Error read(const Blob& blob, int64_t rows, int64_t columns, Matrix& w) {
  const std::string found = spqr::read_blob(blob.typed_data(), static_cast<int64_t>(blob.element_count()), w);
  if (!found.empty()) return invalid(found);
  if (w.rows != rows || w.columns != columns) return invalid("a matrix of another shape was expected");
  return ffi::Error::Success();
}

spqr::Threads threads_of(ffi::ThreadPool& pool, int64_t threads) {
  const int64_t there = pool.num_threads();
  return {threads > 0 && threads < there ? threads : there > 0 ? there : 1,
          [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); }};
}

// x, then matrices; a result for each.
ffi::Error matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs matrices, ffi::RemainingRets results,
                  std::string_view kernels, bool rounded, int64_t threads) {
  if (x.dimensions().size() != 2 || matrices.size() != results.size())
    return invalid("x must be [rows, columns], with a result for each matrix");
  const int64_t rows = x.dimensions()[0];
  std::vector<spqr::Product> products(matrices.size());
  for (size_t i = 0; i < matrices.size(); i++) {
    const ffi::ErrorOr<Blob> blob = matrices.get<Blob>(i);
    ffi::ErrorOr<ffi::Result<ffi::Buffer<ffi::F32>>> result = results.get<ffi::Buffer<ffi::F32>>(i);
    if (!blob.has_value()) return blob.error();
    if (!result.has_value()) return result.error();
    ffi::Buffer<ffi::F32>& y = **result;
    if (y.dimensions().size() != 2 || y.dimensions()[0] != rows) return invalid("a result must be [rows, out]");
    if (ffi::Error error = read(*blob, y.dimensions()[1], x.dimensions()[1], products[i].w); error.failure()) return error;
    products[i].y = y.typed_data();
  }
  const spqr::Kernels* found = spqr::find_kernels(kernels);
  if (found == nullptr) return invalid("this processor has no kernels called " + std::string(kernels));
  spqr::matmul(*found, products, x.typed_data(), rows, rounded, threads_of(pool, threads));
  return ffi::Error::Success();
}

ffi::Error take_rows(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> index, Blob matrix, ffi::ResultBuffer<ffi::F32> y,
                     int64_t rows) {
  if (index.dimensions().size() != 1 || y->dimensions().size() != 2 || index.dimensions()[0] != y->dimensions()[0])
    return invalid("index and y must be [rows] and [rows, columns]");
  Matrix w;
  if (ffi::Error error = read(matrix, rows, y->dimensions()[1], w); error.failure()) return error;
  spqr::take_rows(w, index.typed_data(), index.dimensions()[0], y->typed_data(), threads_of(pool, 0));
  return ffi::Error::Success();
}

using Floats = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;

bool has_shape(ffi::AnyBuffer::Dimensions dimensions, std::initializer_list<int64_t> shape) {
  return std::equal(dimensions.begin(), dimensions.end(), shape.begin(), shape.end());
}

// `keys` and `values` are given and returned: XLA is told that the results are written in place of the arguments.
ffi::Error attend(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Floats cos, Floats sin, Floats keys, Floats values,
                  ffi::Buffer<ffi::S32> padding, ffi::Buffer<ffi::S32> position, Result out, Result new_keys,
                  Result new_values, std::string_view kernels) {
  if (q.dimensions().size() != 4 || keys.dimensions().size() != 4) return invalid("q and keys must have four axes");
  spqr::Attention a;
  a.batch = q.dimensions()[0];
  a.kv_heads = q.dimensions()[1];
  a.share = q.dimensions()[2];
  a.dim = q.dimensions()[3];
  a.length = keys.dimensions()[2];
  bool fits = a.dim % spqr::kTile == 0 && has_shape(padding.dimensions(), {a.batch}) && has_shape(position.dimensions(), {});
  for (const Floats& each : {keys, values, *new_keys, *new_values})
    fits = fits && has_shape(each.dimensions(), {a.batch, a.kv_heads, a.length, a.dim});
  for (const Floats& each : {k, v}) fits = fits && has_shape(each.dimensions(), {a.batch, a.kv_heads, a.dim});
  for (const Floats& each : {cos, sin}) fits = fits && has_shape(each.dimensions(), {a.batch, a.dim / 2});
  if (!fits || !has_shape(out->dimensions(), {a.batch, a.kv_heads, a.share, a.dim})) return invalid("arrays of attention do not fit together");
  a.q = q.typed_data();
  a.k = k.typed_data();
  a.v = v.typed_data();
  a.cos = cos.typed_data();
  a.sin = sin.typed_data();
  a.padding = padding.typed_data();
  a.position = *position.typed_data();
  a.keys = new_keys->typed_data();
  a.values = new_values->typed_data();
  a.out = out->typed_data();
  if (a.keys != keys.typed_data()) std::memcpy(a.keys, keys.typed_data(), keys.size_bytes());
  if (a.values != values.typed_data()) std::memcpy(a.values, values.typed_data(), values.size_bytes());
  const spqr::Kernels* found = spqr::find_kernels(kernels);
  if (found == nullptr) return invalid("this processor has no kernels called " + std::string(kernels));
  spqr::attend(*found, a, threads_of(pool, 0));
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpqrMatmul, matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("kernels")
                                  .Attr<bool>("rounded")
                                  .Attr<int64_t>("threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpqrTakeRows, take_rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<Blob>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("rows"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpqrAttend, attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()  // q, k, v
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()  // cos, sin
                                  .Arg<Floats>()
                                  .Arg<Floats>()  // keys, values
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::S32>>()  // padding, position
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<Floats>()  // out, keys, values
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<std::string_view>("kernels"));

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

// What is wrong with a matrix as one array; "" if nothing. The text lives until the next call.
const char* spqr_problem(const uint8_t* data, int64_t size) {
  static thread_local std::string found;
  Matrix w;
  found = spqr::read_blob(data, size, w);
  if (found.empty()) found = spqr::problem(w, w.outlier_start[w.tiles()]);
  return found.c_str();
}

// As spqr::pack_codes.
void spqr_pack_codes(const uint16_t* stored, int64_t rows, int64_t columns, int64_t words, int32_t bits, int32_t width,
                     uint32_t* to) {
  spqr::pack_codes(stored, rows, columns, words, bits, width, to);
}

}  // extern "C"

#pragma GCC visibility pop
