// The fibers of cuda_runtime.h.
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t kStack = size_t{256} << 10;
constexpr size_t kLargest = 256;  // bytes a lane brings to a collective

enum class State { ready, block, warp, done };

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  State state;
  unsigned mask;
  int collectives;
  std::vector<Copy> open;  // copies of no group yet
  std::deque<std::vector<Copy>> groups;
  dim3 index;
};

struct Warp {
  alignas(64) unsigned char values[2][32 * kLargest];
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> order;
  std::vector<unsigned char> shared;
  ucontext_t scheduler;
  const std::function<void()>* body = nullptr;
  int current = 0, count = 0;
};

thread_local Machine machine;

void enter() {
  (*machine.body)();
  machine.fibers[machine.current].state = State::done;
  swapcontext(&machine.fibers[machine.current].context, &machine.scheduler);
}

void wait(State state) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = state;
  swapcontext(&fiber.context, &machine.scheduler);
}

// 0 forwards, 1 backwards, others shuffle: EMULATED_ORDER, read at every launch.
void set_order() {
  machine.order.resize(machine.count);
  for (int i = 0; i < machine.count; ++i) machine.order[i] = i;
  const char* text = std::getenv("EMULATED_ORDER");
  const int choice = text ? std::atoi(text) : 0;
  if (choice == 1) std::reverse(machine.order.begin(), machine.order.end());
  if (choice < 2) return;
  unsigned state = static_cast<unsigned>(choice);
  for (int i = machine.count - 1; i > 0; --i) {
    state = state * 1664525u + 1013904223u;
    std::swap(machine.order[i], machine.order[(state >> 8) % (i + 1)]);
  }
}

void run_ready() {
  for (int i : machine.order) {
    Fiber& fiber = machine.fibers[i];
    if (fiber.state != State::ready) continue;
    machine.current = i;
    threadIdx = fiber.index;
    swapcontext(&machine.scheduler, &fiber.context);
  }
}

// Lets on the warps whose named lanes all wait, and the block once nothing else can run.
bool release() {
  bool released = false, any_block = false, any_warp = false;
  for (int first = 0; first < machine.count; first += 32) {
    const int last = std::min(first + 32, machine.count);
    for (int i = first; i < last; ++i) {
      Fiber& fiber = machine.fibers[i];
      any_block |= fiber.state == State::block;
      if (fiber.state != State::warp) continue;
      any_warp = true;
      bool all = true;
      for (int j = first; j < last; ++j)
        if (fiber.mask >> (j - first) & 1)
          all &= machine.fibers[j].state == State::warp && machine.fibers[j].mask == fiber.mask;
      if (!all) continue;
      for (int j = first; j < last; ++j)
        if (fiber.mask >> (j - first) & 1) machine.fibers[j].state = State::ready;
      released = true;
    }
  }
  if (released) return true;
  if (any_warp) {
    std::fprintf(stderr, "emulated kernel: lanes of a warp wait for others that never come\n");
    std::abort();
  }
  if (!any_block) return false;
  for (Fiber& fiber : machine.fibers)
    if (fiber.state == State::block) fiber.state = State::ready;
  return true;
}

void run_block(dim3 block) {
  for (int i = 0; i < machine.count; ++i) {
    Fiber& fiber = machine.fibers[i];
    if (!fiber.stack) fiber.stack = std::make_unique<unsigned char[]>(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.state = State::ready;
    fiber.collectives = 0;
    fiber.open.clear();
    fiber.groups.clear();
    const auto n = static_cast<unsigned>(i);
    fiber.index = {n % block.x, n / block.x % block.y, n / block.x / block.y};
    makecontext(&fiber.context, enter, 0);
  }
  do run_ready();
  while (release());
}

}  // namespace

void launch(dim3 grid, dim3 block, size_t shared, const std::function<void()>& thread) {
  machine.count = static_cast<int>(block.x * block.y * block.z);
  if (machine.fibers.size() < static_cast<size_t>(machine.count))
    machine.fibers.resize(static_cast<size_t>(machine.count));
  machine.warps.resize(static_cast<size_t>(machine.count + 31) / 32);
  machine.body = &thread;
  blockDim = block;
  gridDim = grid;
  set_order();
  const bool backwards = !machine.order.empty() && machine.order[0] != 0;
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (unsigned n = 0; n < blocks; ++n) {
    const unsigned b = backwards ? blocks - 1 - n : n;
    blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    machine.shared.assign(shared + 128, 0xFF);
    run_block(block);
    const unsigned char* guard = dynamic_shared() + shared;
    if (std::any_of(guard, guard + 64, [](unsigned char byte) { return byte != 0xFF; })) {
      std::fprintf(stderr, "emulated kernel: wrote behind its dynamic shared memory\n");
      std::abort();
    }
  }
}

unsigned char* dynamic_shared() {
  const auto at = reinterpret_cast<uintptr_t>(machine.shared.data());
  return machine.shared.data() + (64 - at % 64) % 64;
}

void block_barrier() { wait(State::block); }
void warp_barrier(unsigned mask) {
  const int first = machine.current / 32 * 32, lanes = std::min(32, machine.count - first);
  machine.fibers[machine.current].mask = lanes == 32 ? mask : mask & ((1u << lanes) - 1);
  wait(State::warp);
}
int lane() { return machine.current % 32; }

void start_copy(void* to, const void* from, int bytes) {
  machine.fibers[machine.current].open.push_back({to, from, bytes});
}
void commit_copies() {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
void wait_copies(size_t pending) {
  auto& groups = machine.fibers[machine.current].groups;
  for (; groups.size() > pending; groups.pop_front())
    for (const Copy& copy : groups.front())
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
}

unsigned char* exchange_buffer(size_t bytes) {
  if (bytes > kLargest) {
    std::fprintf(stderr, "emulated kernel: %zu bytes are too many for a collective\n", bytes);
    std::abort();
  }
  return machine.warps[machine.current / 32]
      .values[machine.fibers[machine.current].collectives++ % 2];
}

}  // namespace emulation
