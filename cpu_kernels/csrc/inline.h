// What differs between GCC and Clang.
#pragma once

#define SPQR_INLINE inline __attribute__((always_inline))

// Functions between the two may use the instructions named, whatever the rest is compiled for.
#define SPQR_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SPQR_BEGIN_TARGET(names) \
  SPQR_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define SPQR_END_TARGET SPQR_PRAGMA(clang attribute pop)
#else
#define SPQR_BEGIN_TARGET(names) SPQR_PRAGMA(GCC push_options) SPQR_PRAGMA(GCC target(names))
#define SPQR_END_TARGET SPQR_PRAGMA(GCC pop_options)
#endif
