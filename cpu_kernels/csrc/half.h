// float16 to float32, in plain C++.
#pragma once

#include <cstdint>
#include <cstring>

namespace spqr {

inline float half_to_float(uint16_t half) {
  // Exponent and mantissa moved up; scaled by 2^112, subnormals come out right as well.
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  float value;
  std::memcpy(&value, &magnitude, 4);
  value *= 5.192296858534828e33f;  // 2^112
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((half & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;  // infinity and NaN
  bits |= static_cast<uint32_t>(half & 0x8000u) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace spqr
