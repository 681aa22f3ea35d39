#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace spqr {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::microseconds kLookOut{200};
constexpr int64_t kPausesPerLook = 32, kPausesPerYield = 4096;

constexpr int64_t kMostShares = 64;

// Units are divided into as many shares as there may be threads. A thread goes through a share of its own, which is
// one stream of memory, and then helps with the others.
struct Work {
  int64_t units, grain, shares;
  std::function<void(int64_t, int64_t)> run;
  std::atomic<int64_t> next[kMostShares], joined{0}, done{0};

  Work(int64_t units, int64_t grain, int64_t threads) : units(units), grain(grain) {
    const int64_t parts = (units + grain - 1) / grain;
    shares = std::min({parts, threads, kMostShares});
    for (int64_t share = 0; share < shares; share++) next[share] = begin(share);
  }

  int64_t begin(int64_t share) const {  // whole grains
    const int64_t parts = (units + grain - 1) / grain;
    return std::min(units, share * parts / shares * grain);
  }

  // What `run` refers to lives until all units are done: a thread that comes later finds
  // no unit left and does not touch it.
  void take_part() {
    const int64_t own = joined.fetch_add(1, std::memory_order_relaxed) % shares;
    for (int64_t i = 0; i < shares; i++) take_from((own + i) % shares);
  }

  void take_from(int64_t share) {
    const int64_t end = begin(share + 1);
    for (;;) {
      const int64_t first = next[share].fetch_add(grain, std::memory_order_relaxed);
      if (first >= end) return;
      const int64_t last = std::min(first + grain, end);
      run(first, last);
      done.fetch_add(last - first, std::memory_order_release);
    }
  }
};

void pause_briefly(int64_t waited) {
  if (waited % kPausesPerYield == kPausesPerYield - 1) {
    std::this_thread::yield();
    return;
  }
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads on loan from their pools, and the latest work there is for them.
class Crew {
 public:
  void offer(const std::shared_ptr<Work>& work, int64_t helpers, const Schedule& schedule) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      work_ = work;
      round_.fetch_add(1, std::memory_order_release);
    }
    for (int64_t there = coming_ + looking_out_; there < helpers; there++) {
      coming_++;
      schedule([this] { help(); });
    }
  }

 private:
  void help() {
    looking_out_++;
    coming_--;
    uint64_t seen = 0;
    auto since = Clock::now();
    for (int64_t waited = 0;; waited++) {
      if (round_.load(std::memory_order_acquire) != seen) {
        const std::shared_ptr<Work> work = latest(seen);
        looking_out_--;
        work->take_part();
        looking_out_++;
        since = Clock::now();
        waited = 0;
      } else if (waited % kPausesPerLook == kPausesPerLook - 1 && Clock::now() - since > kLookOut) {
        break;
      }
      pause_briefly(waited);
    }
    looking_out_--;
  }

  std::shared_ptr<Work> latest(uint64_t& seen) {
    const std::lock_guard<std::mutex> lock(mutex_);
    seen = round_.load(std::memory_order_relaxed);
    return work_;
  }

  std::mutex mutex_;
  std::shared_ptr<Work> work_;
  std::atomic<uint64_t> round_{0};
  std::atomic<int64_t> coming_{0}, looking_out_{0};  // threads that were sent for; that would see work at once
};

}  // namespace

void parallel_for(const Threads& threads, int64_t units, int64_t grain,
                  std::function<void(int64_t first, int64_t last)> run) {
  const int64_t helpers = std::min(threads.count, (units + grain - 1) / grain) - 1;
  if (helpers < 1) return run(0, units);
  auto work = std::make_shared<Work>(units, grain, helpers + 1);
  work->run = std::move(run);
  static Crew& crew = *new Crew;  // threads may look out for work until the process ends
  crew.offer(work, helpers, threads.schedule);
  work->take_part();
  for (int64_t waited = 0; work->done.load(std::memory_order_acquire) < units; waited++) pause_briefly(waited);
}

}  // namespace spqr
