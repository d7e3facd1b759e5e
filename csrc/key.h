// The ranking key: float -> ordered integer, on the host and on the device.
//
// key(s) is the bit pattern of |s| as float32 (float64 for float64 scores), read as an integer. Non-negative IEEE floats order like their
// bits, so keys order like |s|; equal magnitudes give equal keys and -0.0 gives the key of 0.0. Half-precision scores are
// widened to float32 first, which is exact. Every NaN has a key above kInfinityKey. The specification is
// s2ap_ext/reference.py, function keys().
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define S2AP_HD __host__ __device__ __forceinline__
#else
#define S2AP_HD inline
#endif

namespace s2ap {

S2AP_HD uint32_t key_of(float s) {
  uint32_t bits;
  memcpy(&bits, &s, sizeof bits);
  return bits & 0x7fffffffu;
}

S2AP_HD uint64_t key_of(double s) {
  uint64_t bits;
  memcpy(&bits, &s, sizeof bits);
  return bits & 0x7fffffffffffffffull;
}

template <class Key>
struct KeyTraits;
template <>
struct KeyTraits<uint32_t> {
  static constexpr uint32_t kInfinityKey = 0x7f800000u;
  static constexpr int kBits = 31;
};
template <>
struct KeyTraits<uint64_t> {
  static constexpr uint64_t kInfinityKey = 0x7ff0000000000000ull;
  static constexpr int kBits = 63;
};

}  // namespace s2ap
