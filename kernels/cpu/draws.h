// Random bits for a tile on the CPU: blocks.h's draws, as many at a time as a vector has lanes.
#pragma once

#include <utility>

#include "../blocks.h"
#include "intrinsics.h"

namespace warpstep {
namespace {

// A vector register of the instruction set's. Of each lane the lower half counts, and the upper
// half may be anything: so SIMD multiplications of 32 by 32 bits have it.
#if defined(__AVX512F__)
constexpr std::int64_t kLanes = 8;
#elif defined(__AVX2__)
constexpr std::int64_t kLanes = 4;
#else
constexpr std::int64_t kLanes = 2;
#endif
typedef std::uint64_t Lanes __attribute__((vector_size(kLanes * sizeof(std::uint64_t))));

// Spelled, because compilers multiply all 64 bits of such vectors, at several times the cost.
WARPSTEP_FN Lanes product_of(Lanes a, std::uint32_t by) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(by)));
#elif defined(__AVX2__)
  return reinterpret_cast<Lanes>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(by)));
#elif defined(__x86_64__)
  return reinterpret_cast<Lanes>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(by)));
#elif defined(__aarch64__)
  return reinterpret_cast<Lanes>(vmull_n_u32(vmovn_u64(reinterpret_cast<uint64x2_t>(a)), by));
#else
  return (a & 0xffffffffu) * by;
#endif
}

// Keys as every lane takes them.
struct LaneKeys {
  Lanes words[kRounds][2];

  explicit LaneKeys(const Keys& keys) {
    for (std::uint32_t round = 0; round < kRounds; ++round) {
      for (int i = 0; i < 2; ++i) words[round][i] = Lanes{} + keys.words[round][i];
    }
  }
};

// Random bits for as many as kMost elements, 16 each.
template <std::int64_t kMost>
class TileDraws {
 public:
  // Those of elements [first, first + count) of the whole tensor.
  const std::uint16_t* fill(const Draw& from, std::int64_t first, std::int64_t count) {
    const std::int64_t past = first % kDrawn;
    const std::int64_t draws = (past + count + kDrawn - 1) / kDrawn;
    Lanes index;
    for (std::int64_t k = 0; k < kLanes; ++k) {
      index[k] = static_cast<std::uint64_t>(first / kDrawn + k);
    }
    for (std::int64_t i = 0; i < draws; i += kLanes, index += kLanes) {
      Lanes words[] = {index, index >> 32, Lanes{} + from.step, Lanes{} + from.operand};
      philox(words, from.keys, product_of);
      const Lanes pairs[] = {(words[0] & 0xffffffffu) | words[1] << 32,
                             (words[2] & 0xffffffffu) | words[3] << 32};
      store_in_turn(pairs, words_ + i * 2);
    }
    return reinterpret_cast<const std::uint16_t*>(words_) + past;  // little-endian: formats.h
  }

 private:
  // Lanes of the one and the other in turn, from `first` on. Compilers make it one shuffle.
  template <std::size_t... kLane>
  static Lanes in_turn(const Lanes& a, const Lanes& b, int first, std::index_sequence<kLane...>) {
    return Lanes{(kLane % 2 == 0 ? a : b)[first + kLane / 2]...};
  }
  static void store_in_turn(const Lanes (&pairs)[2], std::uint64_t* to) {
    constexpr auto kAll = std::make_index_sequence<kLanes>{};
    const Lanes first = in_turn(pairs[0], pairs[1], 0, kAll);
    const Lanes second = in_turn(pairs[0], pairs[1], kLanes / 2, kAll);
    std::memcpy(to, &first, sizeof(first));
    std::memcpy(to + kLanes, &second, sizeof(second));
  }

  // With an element's share of a draw before the tile, and of a vector after it.
  alignas(64) std::uint64_t words_[(kMost / kDrawn + 1 + kLanes) * 2];
};

}  // namespace
}  // namespace warpstep
