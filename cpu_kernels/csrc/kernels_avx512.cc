// The kernels for x86-64 processors with avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c.
#include <cstring>

#include "half.h"
#include "inline.h"
#include "matrix.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define SPQR_NAME "avx512"

SPQR_BEGIN_TARGET("popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
namespace spqr {
namespace {
#include "simd_avx512.h"
#include "kernels.h"
}  // namespace
}  // namespace spqr
SPQR_END_TARGET
const spqr::Kernels* const spqr::kAvx512 = &spqr::kKernels;
#else
const spqr::Kernels* const spqr::kAvx512 = nullptr;
#endif
