// The four element types as the CPU kernels see them: bits to rank, and how to compute with them.
//
// Selection never does arithmetic: it ranks the bits of |s| (without the sign bit) as unsigned integers of the element's own width. Half
// precision orders by its own 15 bits just as by those of the float32 it widens to, so 16-bit scores are swept as 16-bit
// integers; only the threshold is widened, for the KEY column of a cut (csrc/key.h).
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../key.h"

#define S2AP_INLINE inline __attribute__((always_inline))
#define S2AP_LAMBDA __attribute__((always_inline))

namespace s2ap {

// condition ? yes : no, without a branch.
template <class Bits>
S2AP_INLINE Bits choose(bool condition, Bits yes, Bits no) {
  const Bits mask = static_cast<Bits>(-static_cast<Bits>(condition));
  return static_cast<Bits>((yes & mask) | (no & ~mask));
}

struct Half {};
struct BFloat16 {};

// Bits:     the unsigned integer of the element's width.
// Compute:  the type of arithmetic.
// widen:    bits -> Compute, exact.
// narrow:   Compute -> bits, rounded to nearest even.
// kInfinity: bits of infinity; magnitudes above it are NaN.
template <class T>
struct Element;

template <>
struct Element<float> {
  using Bits = uint32_t;
  using Compute = float;
  static constexpr Bits kInfinity = KeyTraits<uint32_t>::kInfinityKey;
  static S2AP_INLINE float widen(Bits bits) { return std::bit_cast<float>(bits); }
  static S2AP_INLINE Bits narrow(float x) { return std::bit_cast<Bits>(x); }
};

template <>
struct Element<double> {
  using Bits = uint64_t;
  using Compute = double;
  static constexpr Bits kInfinity = KeyTraits<uint64_t>::kInfinityKey;
  static S2AP_INLINE double widen(Bits bits) { return std::bit_cast<double>(bits); }
  static S2AP_INLINE Bits narrow(double x) { return std::bit_cast<Bits>(x); }
};

template <>
struct Element<BFloat16> {
  using Bits = uint16_t;
  using Compute = float;
  static constexpr Bits kInfinity = 0x7f80;
  static S2AP_INLINE float widen(Bits bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
  static S2AP_INLINE Bits narrow(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<Bits>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
};

template <>
struct Element<Half> {
  using Bits = uint16_t;
  using Compute = float;
  static constexpr Bits kInfinity = 0x7c00;
  // Both directions are free of branches, so that loops over them vectorise, without the F16C instructions too.
  static S2AP_INLINE float widen(Bits bits) {
    const uint32_t magnitude = bits & 0x7fffu;
    const uint32_t normal = (magnitude << 13) + (112u << 23);                           // exponent bias 15 -> 127
    const uint32_t special = (magnitude << 13) | 0x7f800000u;                           // infinity and NaN
    const float tiny = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;  // 0 and subnormal
    const uint32_t wide = choose(magnitude < 0x400u, std::bit_cast<uint32_t>(tiny), choose(magnitude < 0x7c00u, normal, special));
    return std::bit_cast<float>(wide | (uint32_t{bits} & 0x8000u) << 16);
  }
  static S2AP_INLINE Bits narrow(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    // Adding 0.5 leaves a multiple of 2^-24, half precision's smallest step, rounded to nearest even.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    const uint32_t tiny = std::bit_cast<uint32_t>(shifted) - 0x3f000000u;
    const uint32_t special = 0x7c00u + choose(magnitude > 0x7f800000u, uint32_t{0x200}, uint32_t{0});  // NaN
    const uint32_t narrow = choose(magnitude < 0x38800000u, tiny, choose(magnitude < 0x47800000u, normal, special));
    return static_cast<Bits>(narrow | ((bits >> 16) & 0x8000u));
  }
};

template <class T>
using BitsOf = typename Element<T>::Bits;
template <class T>
using ComputeOf = typename Element<T>::Compute;

template <class Bits>
inline constexpr Bits kMagnitude = static_cast<Bits>(std::numeric_limits<Bits>::max() >> 1);  // all but the sign
template <class Bits>
inline constexpr Bits kBeyond = static_cast<Bits>(kMagnitude<Bits> + 1);  // above every magnitude

// The KEY column's value of a magnitude.
template <class T>
inline int64_t cut_key(BitsOf<T> magnitude) {
  return static_cast<int64_t>(key_of(Element<T>::widen(magnitude)));
}

// The smallest magnitude whose key is >= `key`; kBeyond if there is none. The inverse of cut_key, for any key.
template <class T>
inline BitsOf<T> magnitude_at_least(int64_t key) {
  using Bits = BitsOf<T>;
  Bits low = 0, high = kBeyond<Bits>;
  while (low < high) {
    const Bits middle = static_cast<Bits>(low + (high - low) / 2);
    if (cut_key<T>(middle) >= key) {
      high = middle;
    } else {
      low = static_cast<Bits>(middle + 1);
    }
  }
  return low;
}

}  // namespace s2ap
