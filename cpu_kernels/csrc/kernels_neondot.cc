// The kernels for ARM processors with dot products of bytes (ARMv8.2 dotprod: most since 2018, all of Apple's).
#include <cstring>

#include "half.h"
#include "inline.h"
#include "matrix.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#define SPQR_NAME "neondot"
#define SPQR_DOTPROD

#if defined(__clang__)
SPQR_BEGIN_TARGET("dotprod")
#else
SPQR_BEGIN_TARGET("arch=armv8.2-a+dotprod")
#endif
namespace spqr {
namespace {
#include "simd_portable.h"
#include "kernels.h"
}  // namespace
}  // namespace spqr
SPQR_END_TARGET
const spqr::Kernels* const spqr::kNeonDot = &spqr::kKernels;
#else
const spqr::Kernels* const spqr::kNeonDot = nullptr;
#endif
