// Threads and interruption, without a torch header. The library implements both on torch's own
// thread pool and the Python interpreter's signals (python.cpp); tools link a serial stand-in.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

namespace rs {

// Calls body(context, begin, end) over [0, n) cut into at most one range per thread, each a
// multiple of `grain` long (but the last). Results must not depend on the cut.
void parallel_for_raw(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t),
                      void* context);

template <class F>
void parallel_for(int64_t n, int64_t grain, F&& f) {
  parallel_for_raw(
      n, grain,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<std::remove_reference_t<F>*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Thrown by long work when the user asked to stop.
struct Cancelled : std::runtime_error {
  Cancelled() : std::runtime_error("reality_stone: cancelled") {}
};

}  // namespace rs
