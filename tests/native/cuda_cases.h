// Inputs and naive oracles for the tests of the CUDA kernels. The oracles follow s2ap_ext/reference.py and share no code with the
// kernels: they sort, they convert half precision through double, and they are slow.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cases.h"
#include "cuda/number.cuh"
#include "cuda/table.cuh"
#include "emulated_grid.h"

namespace cases {

using s2ap::cuda::BFloat16;
using s2ap::cuda::Float16;

template <class F>
void for_each_type(const F& f) {
  for_each_type_of<Float16, BFloat16>(f);
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
std::vector<int64_t> keys_of(const std::vector<T>& scores) {
  std::vector<int64_t> keys(scores.size());
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = key(scores[i]);
  return keys;
}

template <class T>
bool same_bits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

// The index of the first element that differs; their number if none does.
template <class T>
size_t first_difference(const std::vector<T>& a, const std::vector<T>& b) {
  size_t i = a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0 ? a.size() : 0;
  while (i < a.size() && same_bits(a[i], b[i])) ++i;
  return i;
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

// The bytes of a launch's workspace for the layers of a ResNet-18, relative to those of the scores. The arguments are full otherwise.
template <class T, class Args>
double share_of_workspace(Args& args) {
  int64_t scores = 0;
  auto push = [&](int64_t n) {
    args.selection.table.push({nullptr, nullptr, nullptr, nullptr, n, {}});
    scores += n;
  };
  push(3 * 64 * 9);
  for (int i = 0; i < 4; ++i) push(64 * 64 * 9);
  for (int64_t width : {128, 256, 512}) {
    push(width / 2 * width);
    push(width / 2 * width * 9);
    for (int i = 0; i < 3; ++i) push(width * width * 9);
  }
  push(512 * 10);
  args.plan();
  int64_t bytes = 0;
  for_each_array(args, [&](auto*& pointer, int64_t count) { bytes += count * static_cast<int64_t>(sizeof *pointer); });
  return static_cast<double>(bytes) / static_cast<double>(scores * static_cast<int64_t>(sizeof(T)));
}

// ---- Oracles

struct CutRow {
  int64_t column[5] = {};
};

// The cut that keeps the `kept` largest of the keys, the later of equal ones.
inline CutRow cut_of_keys(const std::vector<int64_t>& keys, int64_t kept) {
  CutRow row;
  if (kept == 0) {
    row.column[0] = std::numeric_limits<int64_t>::max();
  } else if (kept < static_cast<int64_t>(keys.size())) {
    std::vector<std::pair<int64_t, int64_t>> all(keys.size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = {keys[i], i};
    std::nth_element(all.begin(), all.end() - kept, all.end());
    std::tie(row.column[0], row.column[1]) = *(all.end() - kept);
  }
  return row;
}

// What stays of elements or groups with these keys.
inline std::vector<uint8_t> mask_of_keys(const std::vector<int64_t>& keys, const int64_t* row) {
  std::vector<uint8_t> mask(keys.size());
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = keys[i] > row[0] || (keys[i] == row[0] && static_cast<int64_t>(i) >= row[1]);
  return mask;
}

template <class T>
int64_t count_nans(const std::vector<T>& scores) {
  return std::count_if(scores.begin(), scores.end(), [](T s) { return std::isnan(value(s)); });
}

template <class T>
CutRow cut(const std::vector<T>& scores, int64_t kept) {
  CutRow row = cut_of_keys(keys_of(scores), kept);
  row.column[2] = count_nans(scores);
  return row;
}

template <class T>
std::vector<T> masked(const std::vector<uint8_t>& mask, const std::vector<T>& weights) {
  std::vector<T> out(weights.size());
  for (size_t i = 0; i < out.size(); ++i) out[i] = mask[i] ? weights[i] : T{};
  return out;
}

// The order of summation, word for word as the reference says it, but for the zeros that fill up the last chunk.
inline double pinned_sum(std::vector<double> partial) {
  if (partial.empty()) return 0;
  do {
    std::vector<double> sums;
    for (size_t begin = 0; begin < partial.size(); begin += 4096) {
      double lanes[64] = {};
      for (size_t i = begin; i < std::min<size_t>(begin + 4096, partial.size()); ++i) lanes[i % 64] += partial[i];
      for (int half = 32; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
      }
      sums.push_back(lanes[0]);
    }
    partial = std::move(sums);
  } while (partial.size() > 1);
  return partial[0];
}

template <class T>
double norm(const std::vector<T>& x) {
  std::vector<double> squares(x.size());
  for (size_t i = 0; i < x.size(); ++i) squares[i] = value(x[i]) * value(x[i]);
  return std::sqrt(pinned_sum(std::move(squares)));
}

// ---- Grids

struct GridSize {
  unsigned blocks, threads;
};
inline const GridSize kGrids[] = {{1, 32}, {2, 64}, {3, 96}, {5, 128}, {1, 256}, {13, 32}};
constexpr int kGridCount = static_cast<int>(sizeof kGrids / sizeof *kGrids);

}  // namespace cases
