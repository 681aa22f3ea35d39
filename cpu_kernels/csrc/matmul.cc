#include "matmul.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "half.h"

namespace spqr {

// ---- which kernels ----------------------------------------------------------------------

namespace {

#if defined(__aarch64__)
bool has_dotprod() {
#if defined(__APPLE__)
  int there = 0;
  size_t size = sizeof there;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &there, &size, nullptr, 0) == 0 && there == 1;
#elif defined(__linux__)
  constexpr unsigned long kAsimdDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kAsimdDotProduct) != 0;
#else
  return false;
#endif
}
#endif

std::vector<const Kernels*> look_for_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512vnni")) found.push_back(kAvx512Vnni);
  if (avx512) found.push_back(kAvx512);
  if (avx2) found.push_back(kAvx2);
#elif defined(__aarch64__)
  if (has_dotprod()) found.push_back(kNeonDot);
#endif
  found.push_back(kPortable);
  return found;
}

}  // namespace

const std::vector<const Kernels*>& supported_kernels() {
  static const std::vector<const Kernels*> found = look_for_kernels();
  return found;
}

const Kernels* find_kernels(std::string_view name) {
  for (const Kernels* kernels : supported_kernels())
    if (name == kernels->name) return kernels;
  return nullptr;
}

// ---- codes ------------------------------------------------------------------------------

namespace {

// Puts a code where `Matrix::codes` has it; `block` is the block's first word for the row.
void put_code(uint32_t* block, int64_t in_block, uint32_t code, int32_t width) {
  if (width == 8) {
    block[in_block / 4 * kTile] |= code << (8 * (in_block % 4));
    return;
  }
  const int64_t t = in_block / 8, nibble = in_block % 8;
  if (width == 4) {
    block[t * kTile] |= code << (4 * nibble);
    return;
  }
  block[t / 2 * kTile] |= (code & 3) << (4 * nibble + 2 * (t % 2));
  if (width == 3) block[2 * kTile] |= (code >> 2) << (4 * nibble + t);
}

}  // namespace

void pack_codes(const uint16_t* stored, int64_t rows, int64_t columns, int64_t words, int32_t bits, int32_t width,
                uint32_t* to) {
  const int64_t tiles = (rows + kTile - 1) / kTile, blocks = (columns + kBlock - 1) / kBlock;
  const uint32_t mask = (1u << bits) - 1;
  const auto pack_tile = [&](int64_t tile) {
    for (int64_t row = tile * kTile; row < std::min((tile + 1) * kTile, rows); row++) {
      const uint16_t* from = stored + row * words;
      for (int64_t column = 0; column < columns; column++) {
        const int64_t bit = column % 16 * bits, word = column / 16 * bits + bit / 16, shift = bit % 16;
        uint32_t code = from[word] >> shift;
        if (shift + bits > 16) code |= static_cast<uint32_t>(from[word + 1]) << (16 - shift);
        uint32_t* block = to + (tile * blocks + column / kBlock) * width * kTile + row % kTile;
        put_code(block, column % kBlock, code & mask, width);
      }
    }
  };
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t tile = next++; tile < tiles; tile = next++) pack_tile(tile);
  };
  const int64_t helpers = std::min<int64_t>(std::thread::hardware_concurrency(), tiles * columns >> 15) - 1;
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < helpers; i++) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

// ---- activations ------------------------------------------------------------------------

namespace {

void permute_row(const Matrix& w, const float* x, float* to) {
  if (w.perm == nullptr)
    std::memcpy(to, x, sizeof(float) * static_cast<size_t>(w.columns));
  else
    for (int64_t k = 0; k < w.columns; k++) to[k] = x[w.perm[k]];
  std::fill(to + w.columns, to + w.padded_columns(), 0.0f);
}

// Memory that is not cleared.
template <typename T>
std::unique_ptr<T[]> space_for(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);
}

// Memory that a thread keeps, at least so much, for use until it is asked for again.
float* scratch_of_thread(int64_t count) {
  static thread_local std::unique_ptr<float[]> space;
  static thread_local int64_t size = 0;
  if (size < count) {
    space = space_for<float>(count);
    size = count;
  }
  return space.get();
}

// Rows [m, m + width) column by column; `row` holds one permuted row.
void interleave_panel(const Matrix& w, const float* x, int64_t rows, int64_t m, int64_t width, float* row, float* panel) {
  const int64_t padded = w.padded_columns(), there = std::min(width, rows - m);
  if (there < width) std::fill(panel, panel + padded * width, 0.0f);
  for (int64_t i = 0; i < there; i++) {
    permute_row(w, x + (m + i) * w.columns, row);
    for (int64_t k = 0; k < padded; k++) panel[k * width + i] = row[k];
  }
}

constexpr int64_t kWorthAThread = 1 << 17;  // multiplications; fewer take less time than waking one
constexpr int64_t kPartsPerThread = 4;

int64_t grain_of(int64_t units, const Threads& threads) {
  return std::max<int64_t>(1, units / (threads.count * kPartsPerThread));
}

void fetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at);
}

// Fetches what is read first of a pair of tiles; the rest is fetched while these are multiplied.
void fetch_start(const Matrix& w, int64_t tile) {
  constexpr int64_t kStart = 4096;
  const int64_t codes = w.blocks() * w.bits * kTile, stats = w.groups() * statistics_bytes(w.kind);
  for (int64_t own = tile; own < std::min(tile + 2, w.tiles()); own++) {
    fetch(w.stats + own * stats, std::min(stats, kStart));
    fetch(w.codes + own * codes, std::min(4 * codes, kStart));
  }
}

// Activations as a matrix wants them.
struct Prepared {
  std::unique_ptr<float[]> floats;
  std::unique_ptr<int32_t[]> fixed;
  Input input;

  Prepared(const FewRows& few, const Matrix& w, const float* from, int64_t rows) {
    const int64_t padded = w.padded_columns(), blocks = w.blocks(), groups = w.groups();
    floats = space_for<float>(rows * (padded + blocks + groups));
    fixed = space_for<int32_t>(rows * blocks * few.words);
    float *x = floats.get(), *step = x + rows * padded, *sums = step + rows * blocks;
    for (int64_t m = 0; m < rows; m++) {
      permute_row(w, from + m * w.columns, x + m * padded);
      few.fix(w, x + m * padded, fixed.get() + m * blocks * few.words, step + m * blocks, sums + m * groups);
    }
    input.rows = rows;
    input.stride = padded;
    input.x = x;
    input.fixed = fixed.get();
    input.step = step;
    input.sums = sums;
  }
};

// Whether two matrices want activations in the same way, as those that read one input mostly do.
bool read_alike(const Matrix& a, const Matrix& b) {
  if (a.group != b.group || (a.bits == 8) != (b.bits == 8) || (a.perm == nullptr) != (b.perm == nullptr)) return false;
  return a.perm == b.perm || std::memcmp(a.perm, b.perm, sizeof(int32_t) * static_cast<size_t>(a.columns)) == 0;
}

void multiply_few(const FewRows& few, const std::vector<Product>& products, const float* x, int64_t rows,
                  const Threads& threads) {
  fetch_start(products[0].w, 0);
  std::vector<std::shared_ptr<Prepared>> prepared;
  prepared.reserve(products.size());
  std::vector<int64_t> begin;  // each product's first tile among all, even: kernels take tiles in pairs
  begin.reserve(products.size() + 1);
  begin.push_back(0);
  int64_t multiplications = 0, groups = 0;
  for (const Product& product : products) {
    size_t like = 0;
    while (like < prepared.size() && !read_alike(product.w, products[like].w)) like++;
    prepared.push_back(like < prepared.size() ? prepared[like] : std::make_shared<Prepared>(few, product.w, x, rows));
    begin.push_back(begin.back() + (product.w.tiles() + 1) / 2 * 2);
    multiplications += product.w.rows * product.w.columns * rows;
    groups = std::max(groups, product.w.groups());
  }
  const Threads alone;
  const Threads& used = multiplications < kWorthAThread ? alone : threads;
  const int64_t grain = (grain_of(begin.back(), used) + 1) / 2 * 2;
  parallel_for(used, begin.back(), grain, [&](int64_t first, int64_t last) {
    float* scratch = scratch_of_thread(kScratch * groups);
    for (size_t i = 0; i < products.size(); i++) {
      const Matrix& w = products[i].w;
      const int64_t from = std::max(first - begin[i], int64_t{0}), to = std::min(last - begin[i], w.tiles());
      if (from >= to) continue;
      fetch_start(w, from);
      few.run(w, prepared[i]->input, products[i].y, from, to, scratch);
    }
  });
}

// All rows as panels of `width`, in a matrix's own order of columns.
std::shared_ptr<float> panels_of(const Matrix& w, const float* x, int64_t rows, int64_t width, const Threads& threads) {
  const int64_t padded = w.padded_columns(), count = (rows + width - 1) / width;
  const std::shared_ptr<float> panels(space_for<float>(count * padded * width).release(), std::default_delete<float[]>());
  parallel_for(threads, count, grain_of(count, threads), [&](int64_t first, int64_t last) {
    std::vector<float> row(static_cast<size_t>(padded));
    for (int64_t i = first; i < last; i++)
      interleave_panel(w, x, rows, i * width, width, row.data(), panels.get() + i * padded * width);
  });
  return panels;
}

void multiply_panels(const Panels& kernel, const std::vector<Product>& products, const float* x, int64_t rows,
                     const Threads& threads) {
  std::vector<std::shared_ptr<float>> panels;
  std::vector<int64_t> begin = {0};  // each product's first unit among all
  int64_t multiplications = 0;
  for (const Product& product : products) multiplications += product.w.rows * product.w.columns * rows;
  const Threads alone;
  const Threads& used = multiplications < kWorthAThread ? alone : threads;
  for (const Product& product : products) {
    size_t like = 0;
    while (like < panels.size() && !read_alike(product.w, products[like].w)) like++;
    panels.push_back(like < panels.size() ? panels[like]
                                          : panels_of(product.w, x, rows, kernel.width, used));
    begin.push_back(begin.back() + (product.w.tiles() + kernel.tiles - 1) / kernel.tiles);
  }
  parallel_for(used, begin.back(), grain_of(begin.back(), used), [&](int64_t first, int64_t last) {
    alignas(64) float scratch[kDepth * kUnitTiles * kTile];
    for (size_t i = 0; i < products.size(); i++) {
      Input input;
      input.rows = rows;
      input.panels = panels[i].get();
      const int64_t from = std::max(first, begin[i]) - begin[i], to = std::min(last, begin[i + 1]) - begin[i];
      if (from < to) kernel.run(products[i].w, input, products[i].y, from, to, scratch);
    }
  });
}

}  // namespace

void matmul(const Kernels& kernels, const std::vector<Product>& products, const float* x, int64_t rows, bool rounded,
            const Threads& threads) {
  if (rows == 0 || products.empty()) return;
  const FewRows& few = rounded ? kernels.few_rounded : kernels.few;
  if (rows <= few.most) return multiply_few(few, products, x, rows, threads);
  multiply_panels(rows <= kernels.some.most ? kernels.some : kernels.many, products, x, rows, threads);
}

// ---- rows of the matrix -----------------------------------------------------------------

namespace {

int code_at(const Matrix& w, int64_t tile, int64_t row, int64_t column) {
  const int64_t in_block = column % kBlock, words = w.bits;
  const uint32_t* block = w.codes + (tile * w.blocks() + column / kBlock) * words * kTile + row;
  if (w.bits == 8) return static_cast<int>(block[in_block / 4 * kTile] >> (8 * (in_block % 4)) & 255);
  const int64_t t = in_block / 8, nibble = in_block % 8;
  if (w.bits == 4) return static_cast<int>(block[t * kTile] >> (4 * nibble) & 15);
  uint32_t code = block[t / 2 * kTile] >> (4 * nibble + 2 * (t % 2)) & 3;
  if (w.bits == 3) code |= (block[2 * kTile] >> (4 * nibble + t) & 1) << 2;
  return static_cast<int>(code);
}

float float_at(const uint8_t* p, int64_t index) {
  float value;
  std::memcpy(&value, p + 4 * index, 4);
  return value;
}

float half_at(const uint8_t* p, int64_t index) {
  uint16_t value;
  std::memcpy(&value, p + 2 * index, 2);
  return half_to_float(value);
}

void statistics_at(const Matrix& w, int64_t tile, int64_t row, int64_t group, float& scale, float& zero_point) {
  const uint8_t* p = w.stats + (tile * w.groups() + group) * statistics_bytes(w.kind);
  switch (w.kind) {
    case Statistics::kNibbles:
      scale = half_at(p + kTile, 0) * (static_cast<float>(p[row] & 15) - half_at(p + kTile, 1));
      zero_point = half_at(p + kTile, 2) * (static_cast<float>(p[row] >> 4) - half_at(p + kTile, 3));
      return;
    case Statistics::kHalf:
      scale = half_at(p, row);
      zero_point = half_at(p, kTile + row);
      return;
    case Statistics::kFloat:
      scale = float_at(p, row);
      zero_point = float_at(p, kTile + row);
  }
}

void take_row(const Matrix& w, int64_t row, float* y) {
  const int64_t tile = row / kTile, in_tile = row % kTile;
  float scale = 0, zero_point = 0;
  for (int64_t k = 0; k < w.columns; k++) {
    if (k % w.group == 0) statistics_at(w, tile, in_tile, k / w.group, scale, zero_point);
    y[w.perm != nullptr ? w.perm[k] : k] = scale * (static_cast<float>(code_at(w, tile, in_tile, k)) - zero_point);
  }
  const int lane = w.lane_of_row[kTile * tile + in_tile];
  const int32_t* counts = w.outlier_counts + kTile * tile;
  int64_t entry = w.outlier_start[tile];
  int lanes = kTile;
  for (int32_t slot = 0; slot < counts[lane]; slot++, entry += lanes) {
    while (lanes > 1 && counts[lanes - 1] <= slot) lanes--;
    const int64_t column = w.outlier_col(entry + lane);
    y[w.perm != nullptr ? w.perm[column] : column] += half_to_float(w.outlier_values[entry + lane]);
  }
}

}  // namespace

void take_rows(const Matrix& w, const int32_t* index, int64_t count, float* y, const Threads& threads) {
  const Threads alone;
  const Threads& used = count * w.columns < kWorthAThread ? alone : threads;
  parallel_for(used, count, grain_of(count, used), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++)
      take_row(w, std::clamp<int64_t>(index[i], 0, w.rows - 1), y + i * w.columns);
  });
}

}  // namespace spqr
