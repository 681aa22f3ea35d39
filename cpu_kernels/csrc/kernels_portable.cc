// The kernels for any processor; on ARM these are NEON's instructions.
#include <cstring>

#include "half.h"
#include "inline.h"
#include "matrix.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__aarch64__)
#define SPQR_NAME "neon"
#else
#define SPQR_NAME "portable"
#endif
namespace spqr {
namespace {
#include "simd_portable.h"
#include "kernels.h"
}  // namespace
}  // namespace spqr
const spqr::Kernels* const spqr::kPortable = &spqr::kKernels;
