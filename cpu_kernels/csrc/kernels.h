// One instruction set's kernels: included after a simd_*.h, inside a namespace of that instruction set.
#include "tile.h"

#include "fixed.h"

#include "few.h"
#ifdef SPQR_SOME
#include "some.h"
#else
constexpr Panels kSome = {};
#endif
#include "many.h"

#include "attend.h"

constexpr Kernels kKernels = {SPQR_NAME, kFewExact, kFewRounded, kSome, kMany, attend_span};
