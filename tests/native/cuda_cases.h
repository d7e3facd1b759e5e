// Inputs and naive oracles for the tests of the CUDA kernels. The oracles follow s2ap_ext/reference.py and share no code with the
// kernels: they sort, they convert half precision through double, and they are slow.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/number.cuh"
#include "cuda/table.cuh"
#include "emulated_grid.h"

namespace cases {

using s2ap::cuda::BFloat16;
using s2ap::cuda::Float16;

#define EXPECT(condition, ...)                                                      \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: expected %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                            \
      std::fprintf(stderr, "\n");                                                   \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (0)

// f<T>() for each type of elements. ThreadSanitizer looks at who touches what and when, which is alike for types of the same size,
// and it is slow.
template <class F>
void for_each_type(const F& f) {
  f.template operator()<float>();
#ifndef __SANITIZE_THREAD__
  f.template operator()<double>();
  f.template operator()<Float16>();
#endif
  f.template operator()<BFloat16>();
}

// ---- Numbers, through double

template <class T>
double value(T x) {
  return x;
}
inline double decode(uint16_t bits, int exponent_bits, int fraction_bits) {
  int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1), bias = (1 << (exponent_bits - 1)) - 1;
  double fraction = bits & ((1 << fraction_bits) - 1), sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return fraction != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
}
inline double value(Float16 x) { return decode(x.bits, 5, 10); }
inline double value(BFloat16 x) { return decode(x.bits, 8, 7); }

inline uint16_t encode(double x, int exponent_bits, int fraction_bits) {
  int bias = (1 << (exponent_bits - 1)) - 1, all = (1 << exponent_bits) - 1;
  uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return static_cast<uint16_t>(all << fraction_bits | 1 << (fraction_bits - 1));
  int exponent = x == 0 ? 1 - bias : std::max(std::ilogb(x), 1 - bias);
  double units = std::isinf(x) ? 0 : std::nearbyint(std::ldexp(std::fabs(x), fraction_bits - exponent));  // to even
  double rounded = std::ldexp(units, exponent - fraction_bits);
  if (std::isinf(x) || rounded >= std::ldexp(1.0, bias + 1)) return sign | static_cast<uint16_t>(all << fraction_bits);
  if (rounded < std::ldexp(1.0, 1 - bias)) return sign | static_cast<uint16_t>(units);
  exponent = std::ilogb(rounded);
  double fraction = std::ldexp(rounded, fraction_bits - exponent) - (1 << fraction_bits);
  return sign | static_cast<uint16_t>((exponent + bias) << fraction_bits | static_cast<int>(fraction));
}
template <class T>
T make(double x) {
  if constexpr (std::is_same_v<T, Float16>) {
    return {encode(x, 5, 10)};
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return {encode(x, 8, 7)};
  } else {
    return static_cast<T>(x);
  }
}
template <class T>
constexpr const char* kName = sizeof(T) == 8               ? "float64"
                              : sizeof(T) == 4             ? "float32"
                              : std::is_same_v<T, Float16> ? "float16"
                                                           : "bfloat16";
template <class T>
using Wide = std::conditional_t<sizeof(T) == 8, double, float>;

template <class T>
int64_t key(T x) {
  Wide<T> magnitude = std::fabs(static_cast<Wide<T>>(value(x)));
  if constexpr (sizeof(T) > 2) magnitude = std::copysign(x, T{1});  // keeps a NaN's bits
  std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t> bits;
  std::memcpy(&bits, &magnitude, sizeof bits);
  return static_cast<int64_t>(bits);
}

template <class T>
bool same_bits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

// ---- Inputs

using Random = std::mt19937_64;

inline const char* const kKinds[] = {"normal", "few values", "all equal",  "two values", "all but one", "zeros of both signs",
                                     "tiny",   "huge",       "increasing", "decreasing", "one octave",  "late ties"};
constexpr int kKindCount = static_cast<int>(sizeof kKinds / sizeof *kKinds);

// n numbers of one kind. Each kind is hard on something: the ties, the first digit, the last digit, the ends of the range.
template <class T>
std::vector<T> numbers(int kind, int64_t n, Random& random) {
  std::normal_distribution<double> normal;
  double smallest = sizeof(T) == 8 ? 5e-324 : sizeof(T) == 4 ? 1.5e-45 : std::is_same_v<T, Float16> ? 6e-8 : 1e-40;
  double largest = sizeof(T) == 8 ? 1.7e308 : sizeof(T) == 4 || !std::is_same_v<T, Float16> ? 3e38 : 65504;
  std::vector<T> x(n);
  for (int64_t i = 0; i < n; ++i) {
    double v = 0, sign = random() % 2 ? 1 : -1;
    switch (kind) {
      case 0:
        v = normal(random);
        break;
      case 1:
        v = sign * static_cast<double>(random() % 7);
        break;
      case 2:
        v = 0.25;
        break;
      case 3:
        v = sign * (random() % 2 ? 1.0 : 1.5);
        break;
      case 4:
        v = i == n / 2 ? 3 : 2;
        break;
      case 5:
        v = random() % 8 ? sign * 0.0 : normal(random);
        break;
      case 6:
        v = sign * smallest * static_cast<double>(random() % 5);
        break;
      case 7:
        v = random() % 4 ? sign * largest : sign * INFINITY;
        break;
      case 8:
        v = static_cast<double>(i);
        break;
      case 9:
        v = static_cast<double>(n - i);
        break;
      case 10:
        v = sign * (1 + static_cast<double>(random() % (1 << 20)) / (1 << 20));
        break;
      default:
        v = i < n * 3 / 4 ? normal(random) : 1;
        break;
    }
    x[i] = make<T>(v);
  }
  return x;
}

// Counts at and around both ends, and in the middle.
inline int64_t some_count(int64_t n, Random& random) {
  switch (random() % 6) {
    case 0:
      return 0;
    case 1:
      return n;
    case 2:
      return std::min<int64_t>(1, n);
    case 3:
      return std::max<int64_t>(n - 1, 0);
    default:
      return static_cast<int64_t>(random() % (n + 1));
  }
}

// Arrays of a kernel's workspace: exactly as long as asked for, and full of garbage.
class Workspace {
 public:
  template <class V>
  void operator()(V*& pointer, int64_t count) {
    buffers_.emplace_back(count * sizeof(V) + 1);
    std::vector<unsigned char>& buffer = buffers_.back();
    buffer.pop_back();
    for (unsigned char& byte : buffer) byte = static_cast<unsigned char>(random_());
    buffer.shrink_to_fit();
    pointer = reinterpret_cast<V*>(buffer.data());
  }

 private:
  std::vector<std::vector<unsigned char>> buffers_;
  Random random_{99};
};

// ---- Oracles

struct CutRow {
  int64_t column[5] = {};
};

template <class T>
bool is_kept(T score, int64_t i, int64_t cut_key, int64_t cut_index) {
  return key(score) > cut_key || (key(score) == cut_key && i >= cut_index);
}

template <class T>
CutRow cut(const std::vector<T>& scores, int64_t kept) {
  CutRow row;
  int64_t n = static_cast<int64_t>(scores.size());
  for (T s : scores) row.column[2] += std::isnan(value(s));
  if (kept == 0) {
    row.column[0] = std::numeric_limits<int64_t>::max();
  } else if (kept < n) {
    std::vector<int64_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return key(scores[a]) < key(scores[b]); });
    row.column[1] = order[n - kept];
    row.column[0] = key(scores[order[n - kept]]);
  }
  return row;
}

template <class T>
std::vector<T> masked(const std::vector<T>& scores, const std::vector<T>& weights, const CutRow& row) {
  std::vector<T> out(scores.size());
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = is_kept(scores[i], static_cast<int64_t>(i), row.column[0], row.column[1]) ? weights[i] : make<T>(0);
  }
  return out;
}

// The order of summation, word for word as the reference says it.
inline double pinned_sum(std::vector<double> partial) {
  if (partial.empty()) return 0;
  do {
    partial.resize((partial.size() + 4095) / 4096 * 4096);
    std::vector<double> sums;
    for (size_t chunk = 0; chunk < partial.size(); chunk += 4096) {
      double lanes[64] = {};
      for (int row = 0; row < 64; ++row) {
        for (int lane = 0; lane < 64; ++lane) lanes[lane] += partial[chunk + row * 64 + lane];
      }
      for (int half = 32; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
      }
      sums.push_back(lanes[0]);
    }
    partial = sums;
  } while (partial.size() > 1);
  return partial[0];
}

template <class T>
double norm(const std::vector<T>& x) {
  std::vector<double> squares;
  for (T v : x) squares.push_back(value(v) * value(v));
  return std::sqrt(pinned_sum(squares));
}

// ---- Grids

struct GridSize {
  unsigned blocks, threads;
};
inline const GridSize kGrids[] = {{1, 32}, {2, 64}, {3, 96}, {5, 128}, {1, 256}, {13, 32}};
constexpr int kGridCount = static_cast<int>(sizeof kGrids / sizeof *kGrids);

}  // namespace cases
