// The kernels for x86-64 processors with avx2,fma,f16c.
#include <cstring>

#include "half.h"
#include "inline.h"
#include "matrix.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define SPQR_NAME "avx2"
#define SPQR_SOME

SPQR_BEGIN_TARGET("popcnt,avx2,fma,f16c")
namespace spqr {
namespace {
#include "simd_avx2.h"
#include "kernels.h"
}  // namespace
}  // namespace spqr
SPQR_END_TARGET
const spqr::Kernels* const spqr::kAvx2 = &spqr::kKernels;
#else
const spqr::Kernels* const spqr::kAvx2 = nullptr;
#endif
