// What kernels_avx512.cc does with activations of 8 bits, with VNNI's dot products of bytes.
#include <cstring>

#include "half.h"
#include "inline.h"
#include "matrix.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define SPQR_VNNI
#define SPQR_ONLY_ROUNDED
SPQR_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
namespace spqr {
namespace {
#include "simd_avx512.h"
#include "kernels.h"
}  // namespace
}  // namespace spqr
SPQR_END_TARGET
const spqr::FewRows spqr::kAvx512VnniRounded = spqr::few<true>;
#else
const spqr::FewRows spqr::kAvx512VnniRounded = nullptr;
#endif
