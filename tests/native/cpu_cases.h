// For the tests of the CPU kernels: threads without torch, inputs, and naive oracles that follow s2ap_ext/reference.py and
// share no code with the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/element.h"
#include "cpu/machine.h"
#include "plan.h"

#define EXPECT(condition, ...)                                                      \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: expected %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                            \
      std::fprintf(stderr, "\n");                                                   \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (0)

namespace cases {

using namespace s2ap;

inline Machine machine(Isa isa, int threads) {
  return {isa, threads, [](int count, void (*work)(void*), void* context) {
            std::vector<std::thread> others;
            for (int i = 1; i < count; ++i) others.emplace_back(work, context);
            work(context);
            for (auto& thread : others) thread.join();
          }};
}

// Every instruction set this machine has.
inline std::vector<Isa> instruction_sets() {
  std::vector<Isa> sets;
#ifdef __SANITIZE_THREAD__
  sets.push_back(best_isa());  // for threads it makes no difference
#else
  for (Isa isa : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512}) {
    if (isa <= best_isa()) sets.push_back(isa);
  }
#endif
  return sets;
}

// f<T>() for each type of elements. ThreadSanitizer looks at who touches what and when, which is alike for types of the same size,
// and it is slow.
template <class F>
void for_each_type(const F& f) {
  f.template operator()<float>();
#ifndef __SANITIZE_THREAD__
  f.template operator()<double>();
  f.template operator()<Half>();
#endif
  f.template operator()<BFloat16>();
}

template <class T>
std::string name() {
  if (sizeof(BitsOf<T>) == 8) return "float64";
  if (sizeof(BitsOf<T>) == 4) return "float32";
  return Element<T>::kInfinity == 0x7c00 ? "float16" : "bfloat16";
}

template <class T>
std::vector<BitsOf<T>> stored(const std::vector<double>& values) {
  std::vector<BitsOf<T>> bits;
  for (double x : values) bits.push_back(Element<T>::narrow(static_cast<ComputeOf<T>>(x)));
  return bits;
}

template <class T>
double value(BitsOf<T> bits) {
  return static_cast<double>(Element<T>::widen(bits));
}

inline std::vector<double> normal(int64_t n, uint64_t seed, double scale = 1) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> distribution(0, scale);
  std::vector<double> x(n);
  for (double& v : x) v = distribution(random);
  return x;
}

// The distributions that are hard on a selection.
inline std::vector<std::pair<std::string, std::vector<double>>> hard_scores(int64_t n, uint64_t seed) {
  const std::vector<double> x = normal(n, seed);
  std::vector<std::pair<std::string, std::vector<double>>> all;
  const auto add = [&](const char* what, auto f) {
    std::vector<double> y(n);
    for (int64_t i = 0; i < n; ++i) y[i] = f(i, x[i]);
    all.emplace_back(what, std::move(y));
  };
  add("normal", [](int64_t, double v) { return v; });
  add("equal", [](int64_t, double) { return 1.0; });
  add("equal magnitudes", [](int64_t, double v) { return v < 0 ? -2.0 : 2.0; });
  add("zeros of both signs", [](int64_t, double v) { return v < 0 ? -0.0 : 0.0; });
  add("two values, 90 %", [](int64_t, double v) { return v > 1.2816 ? 1.5 : 0.5; });
  add("two values, 50 %", [](int64_t, double v) { return v > 0 ? 1.5 : 0.5; });
  add("all but one equal, one larger", [&](int64_t i, double) { return i == n / 3 ? 2.0 : 1.0; });
  add("all but one equal, one smaller", [&](int64_t i, double) { return i == n / 3 ? 0.5 : 1.0; });
  add("few values", [](int64_t, double v) { return std::round(2 * v); });
  add("denormal", [](int64_t, double v) { return v * 1e-41; });
  add("infinite", [](int64_t, double v) { return v > 1 ? INFINITY : v < -1 ? -INFINITY : v; });
  add("wide", [](int64_t, double v) { return std::exp(10 * v); });
  add("NaN among numbers", [](int64_t i, double v) { return i % 97 == 5 ? NAN : v; });
  all.push_back(all[0]);
  all.back().first = "ascending";
  std::sort(all.back().second.begin(), all.back().second.end(), [](double a, double b) { return std::abs(a) < std::abs(b); });
  all.push_back(all.back());
  all.back().first = "descending";
  std::reverse(all.back().second.begin(), all.back().second.end());
  return all;
}

inline std::vector<int64_t> hard_counts(int64_t n) {
  std::vector<int64_t> counts = {0, 1, n / 10, n / 2, n - 1, n};
  if (n > 10000) counts = {n / 10, n / 2, n - 1};
  std::erase_if(counts, [&](int64_t kept) { return kept < 0 || kept > n; });
  std::sort(counts.begin(), counts.end());
  counts.erase(std::unique(counts.begin(), counts.end()), counts.end());
  return counts;
}

struct Selected {
  std::vector<bool> mask;
  int64_t key = 0, index = 0, nans = 0;
};

// By a stable sort of the magnitudes; NaN ranks above infinity.
template <class T>
Selected oracle_select(const std::vector<BitsOf<T>>& scores, int64_t kept) {
  const auto n = static_cast<int64_t>(scores.size());
  const auto rank = [&](int64_t i) { return std::abs(value<T>(scores[i])); };
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return !std::isnan(rank(a)) && (std::isnan(rank(b)) || rank(a) < rank(b));
  });
  Selected result;
  result.mask.resize(n);
  for (int64_t i = n - kept; i < n; ++i) result.mask[order[i]] = true;
  for (int64_t i = 0; i < n; ++i) result.nans += std::isnan(rank(i));
  if (kept == 0) {
    result.key = INT64_MAX;
  } else if (kept < n) {
    result.index = order[n - kept];
    const ComputeOf<T> cut = std::abs(Element<T>::widen(scores[result.index]));
    if (sizeof(cut) == 8) {
      result.key = std::bit_cast<int64_t>(static_cast<double>(cut));
    } else {
      result.key = std::bit_cast<int32_t>(static_cast<float>(cut));
    }
  }
  return result;
}

// The order of reference.sum_of_squares, literally.
inline double oracle_sum(std::vector<double> partial) {
  while (partial.size() > 1) {
    partial.resize((partial.size() + kChunk - 1) / kChunk * kChunk);
    std::vector<double> sums;
    for (size_t chunk = 0; chunk < partial.size(); chunk += kChunk) {
      std::vector<double> lanes(kLanes);
      for (int64_t i = 0; i < kChunk; ++i) lanes[i % kLanes] += partial[chunk + i];
      while (lanes.size() > 1) {
        const size_t half = lanes.size() / 2;
        for (size_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
        lanes.resize(half);
      }
      sums.push_back(lanes[0]);
    }
    partial = sums;
  }
  return partial.empty() ? 0 : partial[0];
}

template <class T>
std::vector<double> squares(const std::vector<BitsOf<T>>& x) {
  std::vector<double> all;
  for (auto bits : x) all.push_back(value<T>(bits) * value<T>(bits));
  return all;
}

template <class T>
double oracle_norm(const std::vector<BitsOf<T>>& x) {
  return std::sqrt(oracle_sum(squares<T>(x)));
}

inline int sign(double x) { return (x > 0) - (x < 0); }

// reference.score_grad.
template <class T>
std::vector<BitsOf<T>> oracle_score_grad(const std::vector<BitsOf<T>>& grad, const std::vector<BitsOf<T>>& weight,
                                         const std::vector<BitsOf<T>>& at) {
  std::vector<BitsOf<T>> formed;
  for (size_t i = 0; i < at.size(); ++i) {
    const ComputeOf<T> product = Element<T>::widen(Element<T>::narrow(Element<T>::widen(grad[i]) * Element<T>::widen(weight[i])));
    formed.push_back(Element<T>::narrow(product * static_cast<ComputeOf<T>>(sign(value<T>(at[i])))));
  }
  return formed;
}

}  // namespace cases
