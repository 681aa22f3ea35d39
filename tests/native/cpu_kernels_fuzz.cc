// Random matrices, sound and damaged, through every kernel, in buffers of the exact size: for the
// sanitizers. Prints what went wrong and fails.
//   fuzz SECONDS SEED [MOST THREADS]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attention.h"
#include "blob.h"
#include "half.h"
#include "matmul.h"

using namespace spqr;

namespace {

std::mt19937_64 rng;
int64_t most_threads = 3;

int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }
float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(rng); }

uint16_t some_half() { return static_cast<uint16_t>(pick(0, 1) << 15 | pick(10, 16) << 10 | pick(0, 1023)); }

struct Sample {
  Matrix w;
  std::vector<uint32_t> codes;
  std::vector<uint8_t> stats, lane_of_row;
  std::vector<int32_t> start, counts, cols32, perm;
  std::vector<uint16_t> cols16, values;
  std::vector<double> dense;  // [rows][columns]
};

void make_statistics(Sample& s, int64_t tile, int64_t group, std::vector<double>& scale, std::vector<double>& zero) {
  uint8_t* p = s.stats.data() + (tile * s.w.groups() + group) * statistics_bytes(s.w.kind);
  scale.resize(kTile);
  zero.resize(kTile);
  if (s.w.kind == Statistics::kNibbles) {
    uint16_t floats[4] = {some_half(), some_half(), some_half(), some_half()};
    std::memcpy(p + kTile, floats, sizeof floats);
    for (int64_t row = 0; row < kTile; row++) {
      p[row] = static_cast<uint8_t>(pick(0, 255));
      scale[row] = half_to_float(floats[0]) * ((p[row] & 15) - half_to_float(floats[1]));
      zero[row] = half_to_float(floats[2]) * ((p[row] >> 4) - half_to_float(floats[3]));
    }
    return;
  }
  for (int64_t i = 0; i < 2 * kTile; i++) {
    double value;
    if (s.w.kind == Statistics::kHalf) {
      const uint16_t half = some_half();
      std::memcpy(p + 2 * i, &half, 2);
      value = half_to_float(half);
    } else {
      const float number = uniform(-2, 2);
      std::memcpy(p + 4 * i, &number, 4);
      value = number;
    }
    (i < kTile ? scale[i] : zero[i - kTile]) = value;
  }
}

void make_outliers(Sample& s, double share) {
  const Matrix& w = s.w;
  s.start.assign(1, 0);
  const bool wide = pick(0, 1) == 1;
  for (int64_t tile = 0; tile < w.tiles(); tile++) {
    std::vector<std::vector<int64_t>> of_lane(kTile);
    std::vector<int64_t> row_of_lane(kTile);
    for (int64_t i = 0; i < kTile; i++) row_of_lane[i] = i;
    std::shuffle(row_of_lane.begin(), row_of_lane.end(), rng);
    std::vector<int64_t> sizes(kTile);
    for (int64_t i = 0; i < kTile; i++)
      sizes[i] = std::min<int64_t>(w.columns, std::poisson_distribution<int64_t>(share * w.columns + 1e-9)(rng));
    std::sort(sizes.rbegin(), sizes.rend());
    int64_t total = 0;
    for (int64_t i = 0; i < kTile; i++) {
      if (tile * kTile + row_of_lane[i] >= w.rows) {  // no outliers past the last row: move it to the end
        std::rotate(row_of_lane.begin() + i, row_of_lane.begin() + i + 1, row_of_lane.end());
        bool others = false;
        for (int64_t j = i; j < kTile; j++) others |= tile * kTile + row_of_lane[j] < w.rows;
        if (others) {
          i--;
          continue;
        }
        for (int64_t j = i; j < kTile; j++) sizes[j] = 0;
      }
    }
    for (int64_t i = 0; i < kTile; i++) {
      s.counts.push_back(static_cast<int32_t>(sizes[i]));
      total += sizes[i];
      for (int64_t k = 0; k < sizes[i]; k++) of_lane[i].push_back(pick(0, w.columns - 1));
      std::sort(of_lane[i].begin(), of_lane[i].end());
    }
    std::vector<uint8_t> lanes(kTile);
    for (int64_t i = 0; i < kTile; i++) lanes[row_of_lane[i]] = static_cast<uint8_t>(i);
    s.lane_of_row.insert(s.lane_of_row.end(), lanes.begin(), lanes.end());
    for (int64_t slot = 0; slot < sizes[0]; slot++)
      for (int64_t i = 0; i < kTile && sizes[i] > slot; i++) {
        const int64_t column = of_lane[i][slot];
        const uint16_t value = some_half();
        if (wide) s.cols32.push_back(static_cast<int32_t>(column));
        else s.cols16.push_back(static_cast<uint16_t>(column));
        s.values.push_back(value);
        s.dense[(tile * kTile + row_of_lane[i]) * w.columns + column] += half_to_float(value);
      }
    s.start.push_back(s.start.back() + static_cast<int32_t>(total));
  }
  s.values.insert(s.values.end(), kTile, some_half());  // what kernels read at will
  s.w.outlier_start = s.start.data();
  s.w.outlier_counts = s.counts.data();
  s.w.lane_of_row = s.lane_of_row.data();
  static const uint16_t none = 0;
  if (wide) s.w.outlier_cols32 = s.cols32.data();
  else s.w.outlier_cols16 = s.cols16.empty() ? &none : s.cols16.data();
  s.w.outlier_values = s.values.data();
}

void make(Sample& s) {
  const int32_t widths[] = {2, 3, 4, 8};
  const int64_t groups[] = {8, 16, 32, 64, 96};
  Matrix& w = s.w;
  w.rows = pick(1, 100);
  w.columns = pick(0, 3) == 0 ? pick(500, 1100) : pick(1, 200);
  w.bits = widths[pick(0, 3)];
  w.group = groups[pick(0, 4)];
  w.kind = static_cast<Statistics>(pick(0, 2));
  const int32_t stored = w.bits == 8 ? static_cast<int32_t>(pick(5, 8)) : w.bits;
  const int64_t words = (w.columns + 15) / 16 * stored;
  std::vector<uint16_t> packed(static_cast<size_t>(w.rows * words), 0);
  std::vector<int> code(static_cast<size_t>(w.rows * w.columns));
  for (int64_t row = 0; row < w.rows; row++)
    for (int64_t k = 0; k < w.columns; k++) {
      const int value = static_cast<int>(pick(0, (1 << stored) - 1));
      code[row * w.columns + k] = value;
      for (int32_t b = 0; b < stored; b++) {
        const int64_t bit = k * stored + b;
        packed[row * words + bit / 16] |= static_cast<uint16_t>((value >> b & 1) << (bit % 16));
      }
    }
  s.codes.assign(static_cast<size_t>(w.tiles() * w.blocks() * w.bits * kTile), 0);
  pack_codes(packed.data(), w.rows, w.columns, words, stored, w.bits, s.codes.data());
  w.codes = s.codes.data();
  s.stats.assign(static_cast<size_t>(w.tiles() * w.groups() * statistics_bytes(w.kind)), 0);
  w.stats = s.stats.data();
  s.dense.assign(static_cast<size_t>(w.rows * w.columns), 0);
  std::vector<double> scale, zero;
  for (int64_t tile = 0; tile < w.tiles(); tile++)
    for (int64_t group = 0; group < w.groups(); group++) {
      make_statistics(s, tile, group, scale, zero);
      for (int64_t row = tile * kTile; row < std::min(w.rows, (tile + 1) * kTile); row++)
        for (int64_t k = group * w.group; k < std::min(w.columns, (group + 1) * w.group); k++)
          s.dense[row * w.columns + k] = scale[row % kTile] * (code[row * w.columns + k] - zero[row % kTile]);
    }
  const double shares[] = {0, 0.01, 0.1, 1.2};
  make_outliers(s, shares[pick(0, 3)]);
  if (pick(0, 1) == 1) {
    s.perm.resize(static_cast<size_t>(w.columns));
    for (int64_t k = 0; k < w.columns; k++) s.perm[k] = static_cast<int32_t>(k);
    std::shuffle(s.perm.begin(), s.perm.end(), rng);
    w.perm = s.perm.data();
  }
}

// Spoils what a checkpoint could have spoilt: any number may come to stand anywhere. Whatever Python lets pass
// (SpQRArray.validate), cpu_kernels.pack asks problem() of every matrix before a kernel may read it, and here no
// kernel leaves its buffers with any matrix that passes.
void damage(Sample& s) {
  for (int64_t times = pick(1, 3); times > 0; times--) {
    const auto number = static_cast<int32_t>(pick(0, 1) == 1 ? pick(-5, 40) : pick(INT32_MIN, INT32_MAX));
    switch (pick(0, 5)) {
      case 0: s.start[pick(0, static_cast<int64_t>(s.start.size()) - 1)] = number; break;
      case 1: s.counts[pick(0, static_cast<int64_t>(s.counts.size()) - 1)] = number; break;
      case 2: s.lane_of_row[pick(0, static_cast<int64_t>(s.lane_of_row.size()) - 1)] = static_cast<uint8_t>(number); break;
      case 3: if (!s.cols16.empty()) s.cols16[pick(0, static_cast<int64_t>(s.cols16.size()) - 1)] = static_cast<uint16_t>(number); break;
      case 4: if (!s.cols32.empty()) s.cols32[pick(0, static_cast<int64_t>(s.cols32.size()) - 1)] = number; break;
      case 5: if (!s.perm.empty()) s.perm[pick(0, static_cast<int64_t>(s.perm.size()) - 1)] = number; break;
    }
  }
}

// The matrix as one array of bytes, some of them damaged, in a buffer of the exact size.
void check_blob(const Sample& s, int64_t outliers) {
  const Matrix& w = s.w;
  const bool wide = w.outlier_cols32 != nullptr;
  int64_t header[kHeaderWords] = {kBlobMagic, w.rows, w.columns, w.bits, w.group, static_cast<int64_t>(w.kind),
                                  outliers, wide ? 4 : 2, w.perm != nullptr};
  std::vector<uint8_t> bytes;
  const auto put = [&](const void* from, size_t count) {
    bytes.resize((bytes.size() + kBlobAlign - 1) / kBlobAlign * kBlobAlign);
    const auto* begin = static_cast<const uint8_t*>(from);
    bytes.insert(bytes.end(), begin, begin + count);
  };
  put(header, sizeof header);
  put(s.codes.data(), 4 * s.codes.size());
  put(s.stats.data(), s.stats.size());
  put(s.start.data(), 4 * s.start.size());
  put(s.counts.data(), 4 * s.counts.size());
  put(s.lane_of_row.data(), s.lane_of_row.size());
  const std::vector<uint8_t> cols(static_cast<size_t>((outliers + kTile) * (wide ? 4 : 2)));
  put(cols.data(), cols.size());
  put(s.values.data(), 2 * s.values.size());
  put(s.perm.data(), 4 * s.perm.size());
  Matrix read;
  if (const std::string found = read_blob(bytes.data(), static_cast<int64_t>(bytes.size()), read); !found.empty()) {
    std::printf("sound bytes are refused: %s\n", found.c_str());
    std::exit(1);
  }
  for (int times = 0; times < 20; times++) {
    std::vector<uint8_t> damaged = bytes;
    if (pick(0, 3) == 0) damaged.resize(static_cast<size_t>(pick(0, static_cast<int64_t>(bytes.size()))));
    const auto number = pick(0, 1) == 1 ? pick(-3, 70) : static_cast<int64_t>(rng());
    if (damaged.size() >= sizeof header) std::memcpy(damaged.data() + 8 * pick(0, 8), &number, 8);
    const std::vector<uint8_t> exact(damaged);
    if (!read_blob(exact.data(), static_cast<int64_t>(exact.size()), read).empty()) continue;
    volatile int64_t sum = 0;  // reads the ends of all that is said to be there
    sum = sum + read.codes[read.tiles() * read.blocks() * read.bits * kTile - 1];
    sum = sum + read.stats[read.tiles() * read.groups() * statistics_bytes(read.kind) - 1];
    sum = sum + read.lane_of_row[read.tiles() * kTile - 1] + read.outlier_counts[read.tiles() * kTile - 1];
    const int64_t last = read.outlier_start[read.tiles()] + kTile - 1;
    sum = sum + read.outlier_values[last] + read.outlier_col(last);
    if (read.perm != nullptr) sum = sum + read.perm[read.columns - 1];
    problem(read, read.outlier_start[read.tiles()]);
  }
}

Threads some_threads() {
  return {pick(1, most_threads), [](std::function<void()> task) { std::thread(std::move(task)).detach(); }};
}

int check(const Sample& s, bool sound) {
  const Matrix& w = s.w;
  const int64_t many[] = {1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 40};
  const int64_t rows = many[pick(0, 10)];
  std::vector<float> x(static_cast<size_t>(rows * w.columns)), y(static_cast<size_t>(rows * w.rows)), again(y.size());
  for (float& value : x) value = uniform(-1, 1);
  for (const Kernels* kernels : supported_kernels())
    for (const bool rounded : {false, true}) {
      std::fill(y.begin(), y.end(), NAN);
      matmul(*kernels, {{w, y.data()}, {w, again.data()}}, x.data(), rows, rounded, some_threads());
      if (!sound) continue;
      if (std::memcmp(y.data(), again.data(), 4 * y.size()) != 0) {
        std::printf("%s: two equal matrices in one call give different products\n", kernels->name);
        return 1;
      }
      double error = 0, size = 0;
      for (int64_t m = 0; m < rows; m++)
        for (int64_t row = 0; row < w.rows; row++) {
          double want = 0, magnitude = 0;
          for (int64_t k = 0; k < w.columns; k++) {
            const double term = s.dense[row * w.columns + k] * x[m * w.columns + (w.perm ? w.perm[k] : k)];
            want += term;
            magnitude += std::fabs(term);
          }
          error += std::pow(y[m * w.rows + row] - want, 2);
          size += std::pow(magnitude, 2) / static_cast<double>(w.columns);
        }
      const double relative = std::sqrt(error / (size + 1e-30));
      const bool used = rounded && rows <= kFewRows;
      if (!(relative < (used ? 0.05 : 1e-5))) {
        std::printf("%s rounded=%d rows=%ld matrix %ldx%ld bits=%d group=%ld kind=%d: relative error %g\n",
                    kernels->name, rounded, (long)rows, (long)w.rows, (long)w.columns, w.bits, (long)w.group,
                    (int)w.kind, relative);
        return 1;
      }
    }
  const int32_t index[] = {-1, 0, static_cast<int32_t>(w.rows - 1), INT32_MAX};
  std::vector<float> taken(static_cast<size_t>(4 * w.columns));
  take_rows(w, index, 4, taken.data(), some_threads());
  return 0;
}

// Attention in buffers of the exact size, positions and padding at will, against float64 where they are sound.
int check_attention() {
  Attention a;
  a.batch = pick(1, 2);
  a.kv_heads = pick(1, 3);
  a.share = pick(1, 6);
  a.dim = kTile * pick(1, 5);
  a.length = pick(1, 200);
  const bool sound = pick(0, 2) > 0;
  a.position = sound ? pick(0, a.length - 1) : static_cast<int64_t>(rng());
  const int64_t heads = a.batch * a.kv_heads, half = a.dim / 2;
  const auto draw = [](int64_t count) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = uniform(-2, 2);
    return values;
  };
  std::vector<float> q = draw(heads * a.share * a.dim), k = draw(heads * a.dim), v = draw(heads * a.dim), out(q.size());
  const std::vector<float> cos(static_cast<size_t>(a.batch * half), 1.0f), sin(cos.size(), 0.0f);
  const std::vector<float> keys = draw(heads * a.length * a.dim), values = draw(heads * a.length * a.dim);
  std::vector<int32_t> padding(static_cast<size_t>(a.batch));
  for (int32_t& each : padding) each = static_cast<int32_t>(sound ? pick(0, a.position) : pick(INT32_MIN, INT32_MAX));
  a.padding = padding.data();
  a.cos = cos.data();
  a.sin = sin.data();
  a.q = q.data();
  a.k = k.data();
  a.v = v.data();
  a.out = out.data();
  for (const Kernels* kernels : supported_kernels()) {
    std::vector<float> own_keys = keys, own_values = values;
    a.keys = own_keys.data();
    a.values = own_values.data();
    std::fill(out.begin(), out.end(), NAN);
    attend(*kernels, a, some_threads());
    for (int64_t query = 0; sound && query < heads * a.share; query++) {
      const int64_t head = query / a.share, first = padding[head / a.kv_heads];
      std::vector<double> want(static_cast<size_t>(a.dim), 0.0);
      double total = 0;
      for (int64_t i = first; i <= a.position; i++) {
        double score = 0;
        for (int64_t d = 0; d < a.dim; d++)
          score += q[query * a.dim + d] * double{own_keys[(head * a.length + i) * a.dim + d]};
        const double weight = std::exp(score / std::sqrt(static_cast<double>(a.dim)));
        total += weight;
        for (int64_t d = 0; d < a.dim; d++) want[d] += weight * own_values[(head * a.length + i) * a.dim + d];
      }
      for (int64_t d = 0; d < a.dim; d++)
        if (!(std::fabs(out[query * a.dim + d] - want[d] / total) < 1e-4)) {
          std::printf("%s attention: %g instead of %g\n", kernels->name, out[query * a.dim + d], want[d] / total);
          return 1;
        }
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
  rng.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
  if (argc > 3) most_threads = std::atol(argv[3]);
  const auto begun = std::chrono::steady_clock::now();
  long sound = 0, damaged = 0, refused = 0;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count() < seconds) {
    Sample s;
    make(s);
    const auto entries = static_cast<int64_t>(s.values.size()) - kTile;
    if (const std::string found = problem(s.w, entries); !found.empty()) {
      std::printf("a sound matrix is refused: %s\n", found.c_str());
      return 1;
    }
    check_blob(s, entries);
    if (check(s, true) != 0 || check_attention() != 0) return 1;
    sound++;
    damage(s);
    damaged++;
    if (problem(s.w, entries).empty()) check(s, false);
    else refused++;
  }
  for (const Kernels* each : supported_kernels())
    std::printf("%s%s", each->name, each == supported_kernels().back() ? ": " : ", ");
  std::printf("%ld sound, %ld damaged of which %ld refused\n", sound, damaged, refused);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));  // threads that came too late
  return sound > 0 && refused > 0 ? 0 : 1;
}
