// Where the windows of a trellis tile's states lie in its bytes, as tables of byte permutes.
#pragma once

#include <cstdint>

#include "integers.h"

namespace rs {
namespace {

// Byte of a tile where the q-th byte of its ring is, first bit most significant.
template <int K>
constexpr uint8_t ring_byte(int q) {
  return static_cast<uint8_t>(q % (16 * K) ^ 1);
}

// Where 64 bits hold the windows of four states, by pairs of neighbours of which each has 32 bits:
// `bytes` fetches them and `cut` says where in the 64 bits each byte of the states starts.
struct Cut {
  Bytes bytes, cut;
};

// The ring's 32 bits around states n and n+1 into 32-bit lane `lane`; both states start in them.
template <int K>
constexpr void fetch_pair(Bytes& bytes, int lane, int n) {
  for (int t = 0; t < 4; ++t) bytes.at[4 * lane + t] = ring_byte<K>(K * n / 8 + 3 - t);
}
// Lane `to` (16 bits) becomes state n + half of the pair fetched into 32-bit lane `lane`.
template <int K>
constexpr void cut_state(Bytes& cut, int to, int lane, int n, int half) {
  const int at = 32 * (lane % 2) + 16 - K * n % 8 - K * half;
  cut.at[2 * to] = static_cast<uint8_t>(at);
  cut.at[2 * to + 1] = static_cast<uint8_t>(at + 8);
}

}  // namespace
}  // namespace rs
