#include "matmul.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>

#include "half.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace spqr {

// ---- which kernels ----------------------------------------------------------------------

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512vnni")) {
    static const Kernels vnni = {"avx512vnni", kAvx512->few, kAvx512VnniRounded, kAvx512->few_width,
                                 kAvx512->many_width, kAvx512->many};
    found.push_back(&vnni);
  }
  if (avx512) found.push_back(kAvx512);
  if (avx2) found.push_back(kAvx2);
#endif
  found.push_back(kPortable);
  return found;
}

const Kernels* find_kernels(const std::string& name) {
  for (const Kernels* kernels : supported_kernels())
    if (name == kernels->name) return kernels;
  return nullptr;
}

// ---- threads ----------------------------------------------------------------------------

namespace {

struct Work {
  int64_t units, grain;
  std::function<void(int64_t, int64_t)> run;
  std::atomic<int64_t> next{0}, done{0};

  // What `run` refers to lives until all units are done: a thread that comes later finds
  // no unit left and does not touch it.
  void take_part() {
    for (;;) {
      const int64_t first = next.fetch_add(grain, std::memory_order_relaxed);
      if (first >= units) return;
      const int64_t last = std::min(first + grain, units);
      run(first, last);
      done.fetch_add(last - first, std::memory_order_release);
    }
  }
};

void pause_briefly(int64_t waited) {
  if (waited > 4096) {
    std::this_thread::yield();
    return;
  }
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void parallel_for(const Threads& threads, int64_t units, int64_t grain,
                  std::function<void(int64_t first, int64_t last)> run) {
  const int64_t helpers = std::min(threads.count, (units + grain - 1) / grain) - 1;
  if (helpers < 1) return run(0, units);
  auto work = std::make_shared<Work>();
  work->units = units;
  work->grain = grain;
  work->run = std::move(run);
  for (int64_t i = 0; i < helpers; i++) threads.schedule([work] { work->take_part(); });
  work->take_part();
  for (int64_t waited = 0; work->done.load(std::memory_order_acquire) < units; waited++) pause_briefly(waited);
}

// ---- what a matrix must be --------------------------------------------------------------

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
  if (w.perm != nullptr)
    for (int64_t k = 0; k < w.columns; k++)
      if (w.perm[k] < 0 || w.perm[k] >= w.columns) return "perm is not in the matrix";
  return "";
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

// Activations as the kernels want them, and what that takes.
struct Prepared {
  Input input;
  std::vector<float> x, sums, scale, panels;
  std::vector<int8_t> rounded;
};

void permute_row(const Matrix& w, const float* x, float* to) {
  if (w.perm == nullptr)
    std::memcpy(to, x, sizeof(float) * static_cast<size_t>(w.columns));
  else
    for (int64_t k = 0; k < w.columns; k++) to[k] = x[w.perm[k]];
  std::fill(to + w.columns, to + w.padded_columns(), 0.0f);
}

void sum_groups(const Matrix& w, const float* x, float* sums) {
  // Partial sums side by side, which compilers make vectors of.
  for (int64_t group = 0; group < w.groups(); group++) {
    const float* from = x + group * w.group;
    const int64_t width = std::min(w.group, w.padded_columns() - group * w.group);
    float part[8] = {};
    for (int64_t k = 0; k < width; k += 8)
      for (int i = 0; i < 8; i++) part[i] += from[k + i];
    sums[group] = ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
  }
}

// One block to 8 bits, and its group sums after rounding added to `sums`.
void round_block(const Matrix& w, const float* x, int64_t block, int8_t* rounded, float* scale, float* sums) {
  float largest = 0;
  for (int64_t k = 0; k < kBlock; k++) largest = std::max(largest, std::fabs(x[k]));
  *scale = largest / 127.0f;
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  for (int64_t k = 0; k < kBlock; k++) {
    const auto code = static_cast<int8_t>(std::lrintf(x[k] * inverse));
    const int64_t in_word = k % 8;
    rounded[w.bits == 8 ? k : k - in_word + (in_word % 2) * 4 + in_word / 2] = code;
    sums[(block * kBlock + k) / w.group] += static_cast<float>(code) * *scale;
  }
}

void prepare_rows(const Matrix& w, const float* x, int64_t rows, bool round, Prepared& p) {
  const int64_t padded = w.padded_columns(), groups = w.groups(), blocks = w.blocks();
  p.input.rows = rows;
  p.input.stride = w.columns;
  p.input.x = x;
  const bool copied = w.perm != nullptr || padded != w.columns;
  if (copied) {
    p.x.resize(static_cast<size_t>(rows * padded));
    p.input.x = p.x.data();
    p.input.stride = padded;
  }
  p.sums.assign(static_cast<size_t>(rows * groups), 0.0f);
  p.input.sums = p.sums.data();
  if (round) {
    p.rounded.resize(static_cast<size_t>(rows * padded));
    p.scale.resize(static_cast<size_t>(rows * blocks));
    p.input.rounded = p.rounded.data();
    p.input.rounded_scale = p.scale.data();
  }
  for (int64_t m = 0; m < rows; m++) {
    if (copied) permute_row(w, x + m * w.columns, p.x.data() + m * padded);
    const float* row = p.input.x + m * p.input.stride;
    float* sums = p.sums.data() + m * groups;
    if (!round) {
      sum_groups(w, row, sums);
      continue;
    }
    for (int64_t block = 0; block < blocks; block++)
      round_block(w, row + block * kBlock, block, p.rounded.data() + m * padded + block * kBlock,
                  p.scale.data() + m * blocks + block, sums);
  }
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

void multiply_few(const Kernels& kernels, const Matrix& w, const float* x, int64_t rows, float* y, bool rounded,
                  const Threads& threads) {
  Prepared p;
  rounded = rounded && kernels.few_rounded != nullptr;
  if (rounded || rows <= kApartRows) {
    prepare_rows(w, x, rows, rounded, p);
  } else {
    const int64_t padded = w.padded_columns();
    const int64_t width = rows <= kernels.few_width / 2 ? kernels.few_width / 2 : kernels.few_width;
    const int64_t panels = (rows + width - 1) / width;
    p.x.resize(static_cast<size_t>(padded));
    p.panels.resize(static_cast<size_t>(panels * padded * width));
    for (int64_t i = 0; i < panels; i++)
      interleave_panel(w, x, rows, i * width, width, p.x.data(), p.panels.data() + i * padded * width);
    p.input.rows = rows;
    p.input.width = width;
    p.input.panels = p.panels.data();
  }
  const auto run = rounded ? kernels.few_rounded : kernels.few;
  const Threads alone;
  const Threads& used = w.rows * w.columns * rows < kWorthAThread ? alone : threads;
  parallel_for(used, w.tiles(), grain_of(w.tiles(), used),
               [&](int64_t first, int64_t last) { run(w, p.input, y, first, last); });
}

void multiply_many(const Kernels& kernels, const Matrix& w, const float* x, int64_t rows, float* y,
                   const Threads& threads) {
  const int64_t width = kernels.many_width, padded = w.padded_columns();
  const int64_t count = (rows + width - 1) / width;
  const std::unique_ptr<float[]> panels(new float[static_cast<size_t>(count * padded * width)]);
  parallel_for(threads, count, grain_of(count, threads), [&](int64_t first, int64_t last) {
    std::vector<float> row(static_cast<size_t>(padded));
    for (int64_t i = first; i < last; i++)
      interleave_panel(w, x, rows, i * width, width, row.data(), panels.get() + i * padded * width);
  });
  Input input;
  input.rows = rows;
  input.width = width;
  input.panels = panels.get();
  const int64_t units = (w.tiles() + kUnitTiles - 1) / kUnitTiles;
  parallel_for(threads, units, grain_of(units, threads), [&](int64_t first, int64_t last) {
    alignas(64) float scratch[kDepth * kUnitTiles * kTile];
    kernels.many(w, input, y, first, last, scratch);
  });
}

}  // namespace

void matmul(const Kernels& kernels, const Matrix& w, const float* x, int64_t rows, float* y, bool rounded,
            const Threads& threads) {
  if (rows == 0) return;
  if (rows <= kFewRows)
    multiply_few(kernels, w, x, rows, y, rounded, threads);
  else
    multiply_many(kernels, w, x, rows, y, threads);
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
