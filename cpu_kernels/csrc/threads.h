// A loop over threads that belong to someone else.
#pragma once

#include <cstdint>
#include <functional>

namespace spqr {

// Hands a function to another thread, some time; it need not ever run.
using Schedule = std::function<void(std::function<void()>)>;

struct Threads {
  int64_t count = 1;
  Schedule schedule;  // not used if count is 1
};

// Calls run(first, last) over [0, units), in parts of `grain`. The caller takes part and
// waits only for parts that another thread has begun, so a full or blocked pool delays
// nothing and cannot deadlock.
//
// To wake a thread takes longer than many a product. So one that has helped looks out for
// more to do for a moment before it goes back to its pool.
void parallel_for(const Threads& threads, int64_t units, int64_t grain,
                  std::function<void(int64_t first, int64_t last)> run);

}  // namespace spqr
