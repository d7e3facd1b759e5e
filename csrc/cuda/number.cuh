// The dtypes of the scores, and arithmetic whose every rounding is spelled out, so that no compiler flag can change a bit.
// Half precision is computed in float32 and rounded once, where a result is stored.
#pragma once

#include "grid.cuh"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#else
#include <cmath>
#endif

namespace s2ap::cuda {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
S2AP_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// ---- Widening is exact.

S2AP_HD float widen(float x) { return x; }
S2AP_HD double widen(double x) { return x; }
S2AP_HD float widen(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
S2AP_HD float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(bit_cast<__half>(x.bits));
#else
  // 2^112 is the ratio of the two formats' smallest exponents; the product is exact, and makes denormals normal.
  float magnitude = bit_cast<float>(static_cast<uint32_t>(x.bits & 0x7fff) << 13) * 0x1p112f;
  uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;  // infinity and NaN
  return bit_cast<float>(bit_cast<uint32_t>(magnitude) | special | static_cast<uint32_t>(x.bits & 0x8000) << 16);
#endif
}

// ---- Rounding to the stored dtype, to nearest even.

template <class T>
struct Number {  // float, double
  using Compute = T;
  static S2AP_HD T round(T x) { return x; }
};
template <>
struct Number<BFloat16> {
  using Compute = float;
  static S2AP_HD BFloat16 round(float x) {
    uint32_t bits = bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};
template <>
struct Number<Float16> {
  using Compute = float;
  static S2AP_HD Float16 round(float x) {
#if defined(__CUDA_ARCH__)
    return {bit_cast<uint16_t>(__float2half_rn(x))};
#else
    uint32_t magnitude = key_of(x), sign = bit_cast<uint32_t>(x) >> 16 & 0x8000, half;
    if (magnitude > 0x7f800000u) {
      half = 0x7e00;  // NaN
    } else if (magnitude >= 0x47800000u) {
      half = 0x7c00;  // 65536 and above
    } else if (magnitude < 0x38800000u) {
      // Denormal as float16. The spacing of floats above 0.5 is that of denormals, so the sum rounds as it should.
      half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
    } else {
      half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    }
    return {static_cast<uint16_t>(sign | half)};
#endif
  }
};

template <class T>
using Compute = typename Number<T>::Compute;
template <class T>
using KeyOf = decltype(key_of(Compute<T>{}));

// ---- One rounding per function.

#if defined(__CUDA_ARCH__)
S2AP_HD float add(float a, float b) { return __fadd_rn(a, b); }
S2AP_HD float multiply(float a, float b) { return __fmul_rn(a, b); }
S2AP_HD float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
S2AP_HD double add(double a, double b) { return __dadd_rn(a, b); }
S2AP_HD double multiply(double a, double b) { return __dmul_rn(a, b); }
S2AP_HD double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
S2AP_HD double divide(double a, double b) { return __ddiv_rn(a, b); }
S2AP_HD double square_root(double a) { return __dsqrt_rn(a); }
#else  // compiled with -ffp-contract=off
S2AP_HD float add(float a, float b) { return a + b; }
S2AP_HD float multiply(float a, float b) { return a * b; }
S2AP_HD float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
S2AP_HD double add(double a, double b) { return a + b; }
S2AP_HD double multiply(double a, double b) { return a * b; }
S2AP_HD double multiply_add(double a, double b, double c) { return std::fma(a, b, c); }
S2AP_HD double divide(double a, double b) { return a / b; }
S2AP_HD double square_root(double a) { return std::sqrt(a); }
#endif

}  // namespace s2ap::cuda
