#include "blob.h"

#include <cstring>

namespace spqr {

namespace {

constexpr int64_t kMost = int64_t{1} << 31;  // of rows, columns and outliers: products of three sizes fit 64 bits

bool known_format(const Matrix& w) {
  const bool bits = w.bits == 2 || w.bits == 3 || w.bits == 4 || w.bits == 8;
  const bool group = w.group == 8 || w.group == 16 || (w.group > 0 && w.group % kBlock == 0);
  const bool kind = w.kind == Statistics::kNibbles || w.kind == Statistics::kHalf || w.kind == Statistics::kFloat;
  return bits && group && kind;
}

// Hands out the bytes one array after the other.
class Reader {
 public:
  Reader(const uint8_t* data, int64_t size) : data_(data), size_(size) {}

  template <typename T>
  const T* next(int64_t count) {
    const uint8_t* found = data_ + at_;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (bytes > size_ - at_) {
      enough_ = false;
      return nullptr;
    }
    at_ += (bytes + kBlobAlign - 1) / kBlobAlign * kBlobAlign;
    if (at_ > size_) at_ = size_;  // the last array need not be padded
    return reinterpret_cast<const T*>(found);
  }

  bool enough() const { return enough_; }

 private:
  const uint8_t* data_;
  int64_t size_, at_ = 0;
  bool enough_ = true;
};

}  // namespace

std::string read_blob(const uint8_t* data, int64_t size, Matrix& w) {
  int64_t header[kHeaderWords];
  Reader reader(data, size);
  if (reader.next<int64_t>(kHeaderWords) == nullptr) return "too short for a matrix";
  std::memcpy(header, data, sizeof header);
  if (header[0] != kBlobMagic) return "not a packed matrix, or of another version";
  for (int64_t i = 1; i < 7; i++)
    if (header[i] < 0 || header[i] >= kMost) return "a size in the header is out of range";
  w = Matrix{};
  w.rows = header[1];
  w.columns = header[2];
  w.bits = static_cast<int32_t>(header[3]);
  w.group = header[4];
  w.kind = static_cast<Statistics>(header[5]);
  if (!known_format(w) || w.rows < 1 || w.columns < 1 || (header[7] != 2 && header[7] != 4) ||
      (header[8] != 0 && header[8] != 1))
    return "no such format";
  const int64_t outliers = header[6] + kTile;
  w.codes = reader.next<uint32_t>(w.tiles() * w.blocks() * w.bits * kTile);
  w.stats = reader.next<uint8_t>(w.tiles() * w.groups() * statistics_bytes(w.kind));
  w.outlier_start = reader.next<int32_t>(w.tiles() + 1);
  w.outlier_counts = reader.next<int32_t>(w.tiles() * kTile);
  w.lane_of_row = reader.next<uint8_t>(w.tiles() * kTile);
  if (header[7] == 2)
    w.outlier_cols16 = reader.next<uint16_t>(outliers);
  else
    w.outlier_cols32 = reader.next<int32_t>(outliers);
  w.outlier_values = reader.next<uint16_t>(outliers);
  if (header[8] == 1) w.perm = reader.next<int32_t>(w.columns);
  if (!reader.enough()) return "fewer bytes than its header asks for";
  if (w.outlier_start[0] != 0 || w.outlier_start[w.tiles()] != header[6]) return "outlier_start does not span all outliers";
  return "";
}

}  // namespace spqr
