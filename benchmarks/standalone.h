// What the library otherwise provides, for programs without torch: a thread pool behind
// parallel_for and the instruction sets of this processor.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "../csrc/cpu/isa.h"
#include "../csrc/cpu/parallel.h"

namespace rs {

// Threads that stay: creating one costs as much as a small product. The caller takes a range too.
class Pool {
 public:
  static Pool& get() {
    static Pool pool;
    return pool;
  }
  ~Pool() { resize(1); }

  void resize(int threads) {
    stop_ = true;
    for (auto& w : workers_) w->wake();
    for (auto& w : workers_) w->thread.join();
    workers_.clear();
    stop_ = false;
    for (int i = 1; i < threads; ++i) workers_.push_back(std::make_unique<Worker>(*this));
  }

  void run(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
    const int64_t units = (n + grain - 1) / grain;
    const int64_t parts = std::min<int64_t>(units, static_cast<int64_t>(workers_.size()) + 1);
    const auto edge = [&](int64_t p) { return std::min(n, units * p / parts * grain); };
    for (int64_t p = 1; p < parts; ++p) {
      Worker& w = *workers_[static_cast<size_t>(p - 1)];
      w.body = body, w.context = context, w.begin = edge(p), w.end = edge(p + 1);
      w.wake();
    }
    if (parts > 0) body(context, 0, edge(1));
    for (int64_t p = 1; p < parts; ++p) {
      Worker& w = *workers_[static_cast<size_t>(p - 1)];
      while (w.done.load(std::memory_order_acquire) != w.calls) w.done.wait(w.calls - 1);
    }
  }

 private:
  struct Worker {
    void (*body)(void*, int64_t, int64_t) = nullptr;
    void* context = nullptr;
    int64_t begin = 0, end = 0;
    uint32_t calls = 0;
    std::atomic<uint32_t> asked = 0, done = 0;
    std::thread thread;

    explicit Worker(Pool& pool) : thread([this, &pool] { loop(pool); }) {}
    void wake() {
      asked.store(++calls, std::memory_order_release);
      asked.notify_one();
    }
    void loop(Pool& pool) {
      for (uint32_t seen = 0;;) {
        for (int spin = 0; asked.load(std::memory_order_acquire) == seen; ++spin)
          if (spin > 20000) asked.wait(seen);
        ++seen;
        if (pool.stop_) return;
        body(context, begin, end);
        done.store(seen, std::memory_order_release);
        done.notify_one();
      }
    }
  };

  std::vector<std::unique_ptr<Worker>> workers_;
  std::atomic<bool> stop_ = false;
};

void parallel_for_raw(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t),
                      void* context) {
  Pool::get().run(n, grain, body, context);
}

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const auto all = [](auto... has) { return (has && ...); };
  if (all(__builtin_cpu_supports("avx512bw"), __builtin_cpu_supports("avx512dq"),
          __builtin_cpu_supports("avx512vl"), __builtin_cpu_supports("avx512vbmi"),
          __builtin_cpu_supports("avx512vbmi2"), __builtin_cpu_supports("avx512vnni")))
    return Isa::avx512;
  if (all(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"))) return Isa::avx2;
#endif
  return Isa::generic;
}

const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "generic";
}

}  // namespace rs
