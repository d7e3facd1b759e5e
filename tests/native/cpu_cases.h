// For the tests of the CPU kernels: threads without torch, inputs, and naive oracles that follow s2ap_ext/reference.py and
// share no code with the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cases.h"
#include "cpu/loops.h"

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

// Every instruction set this machine has; for who shares what, one is like another.
inline std::vector<Isa> instruction_sets() {
  if (kOnlySharing) return {best_isa()};
  std::vector<Isa> sets;
  for (Isa isa : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512}) {
    if (isa <= best_isa()) sets.push_back(isa);
  }
  return sets;
}

// f(machine) for every instruction set, with each number of threads.
template <class F>
void for_each_machine(const std::vector<int>& threads, const F& f) {
  for (Isa isa : instruction_sets()) {
    for (int count : threads) {
      if (!kOnlySharing || count > 1) f(machine(isa, count));
    }
  }
}

// A single layer of n elements need not be looked at.
inline bool stays_on_one_thread(int64_t n) { return kOnlySharing && n < kElementsPerThread; }

template <class F>
void for_each_type(const F& f) {
  for_each_type_of<Half, BFloat16>(f);
}

template <class T>
std::string name() {
  if (sizeof(BitsOf<T>) == 8) return "float64";
  if (sizeof(BitsOf<T>) == 4) return "float32";
  return Element<T>::kInfinity == 0x7c00 ? "float16" : "bfloat16";
}

template <class T>
std::vector<BitsOf<T>> stored(const std::vector<double>& values) {
  std::vector<BitsOf<T>> bits(values.size());
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = Element<T>::narrow(static_cast<ComputeOf<T>>(values[i]));
  return bits;
}

template <class T>
double value(BitsOf<T> bits) {
  return static_cast<double>(Element<T>::widen(bits));
}

// The first n of a sequence that is drawn once.
inline std::vector<double> normal(int64_t n, uint64_t seed, double scale = 1) {
  static std::map<uint64_t, std::vector<double>> sequences;
  std::vector<double>& drawn = sequences[seed];
  if (static_cast<int64_t>(drawn.size()) < n) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> distribution;
    drawn.resize(n);
    for (double& v : drawn) v = distribution(random);
  }
  std::vector<double> x(drawn.begin(), drawn.begin() + n);
  for (double& v : x) v *= scale;
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
  std::vector<uint8_t> mask;
  int64_t key = 0, index = 0, nans = 0;
};

// Bits of |x| as float64, which rank as the numbers do; every NaN is one and the same, and ranks above infinity.
inline uint64_t magnitude(double x) { return std::isnan(x) ? uint64_t{0x7ff8000000000000} : std::bit_cast<uint64_t>(std::abs(x)); }

using Ranked = std::vector<std::pair<uint64_t, int64_t>>;  // how large, and the index of what is: of equal ones the last ranks first

// Marks the `kept` largest in a mask of zeros. Returns the index of the least of them.
inline int64_t keep_largest(Ranked& ranked, int64_t kept, std::vector<uint8_t>& mask) {
  const auto cut = ranked.end() - kept;
  std::nth_element(ranked.begin(), cut, ranked.end());
  for (auto place = cut; place != ranked.end(); ++place) mask[place->second] = 1;
  return kept > 0 ? cut->second : 0;
}

template <class T>
Selected oracle_select(const std::vector<BitsOf<T>>& scores, int64_t kept) {
  Selected result;
  result.mask.resize(scores.size());
  Ranked ranked(scores.size());
  for (size_t i = 0; i < scores.size(); ++i) {
    const double x = value<T>(scores[i]);
    ranked[i] = {magnitude(x), i};
    result.nans += std::isnan(x);
  }
  const int64_t cut = keep_largest(ranked, kept, result.mask);
  if (kept == 0) {
    result.key = INT64_MAX;
  } else if (kept < static_cast<int64_t>(scores.size())) {
    result.index = cut;
    const ComputeOf<T> least = std::abs(Element<T>::widen(scores[cut]));
    if (sizeof(least) == 8) {
      result.key = std::bit_cast<int64_t>(static_cast<double>(least));
    } else {
      result.key = std::bit_cast<int32_t>(static_cast<float>(least));
    }
  }
  return result;
}

// What a kernel leaves of a layer.
template <class T>
struct Outcome {
  std::vector<int64_t> row;
  std::vector<BitsOf<T>> masked;
};

template <class T>
Outcome<T> outcome(const Selected& after, const std::vector<BitsOf<T>>& weight, int64_t flips = 0, int64_t signs = 0) {
  Outcome<T> expected{{after.key, after.index, after.nans, flips, signs}, weight};
  for (size_t i = 0; i < weight.size(); ++i) {
    if (!after.mask[i]) expected.masked[i] = 0;
  }
  return expected;
}

inline int64_t count_flips(const Selected& before, const Selected& after) {
  int64_t flips = 0;
  for (size_t i = 0; i < after.mask.size(); ++i) flips += before.mask[i] != after.mask[i];
  return flips;
}

// As many layers of rubbish as there are cases.
template <class T, class Case>
std::vector<std::vector<BitsOf<T>>> unwritten(const std::vector<Case>& all) {
  std::vector<std::vector<BitsOf<T>>> masked;
  for (const Case& c : all) masked.emplace_back(c.scores.size(), BitsOf<T>{0x55});
  return masked;
}

template <class T>
void expect_outcome(const Outcome<T>& expected, const int64_t* row, const std::vector<BitsOf<T>>& masked, const Machine& machine,
                    const std::string& what) {
  const auto where = [&] {
    return name<T>() + ", isa " + std::to_string(static_cast<int>(machine.isa)) + ", " + std::to_string(machine.threads) + " threads, " +
           what;
  };
  for (int column = 0; column < kCutColumns; ++column) {
    EXPECT(row[column] == expected.row[column], "%s: column %d: %lld, not %lld", where().c_str(), column,
           static_cast<long long>(row[column]), static_cast<long long>(expected.row[column]));
  }
  EXPECT(masked == expected.masked, "%s: element %td", where().c_str(),
         std::mismatch(masked.begin(), masked.end(), expected.masked.begin()).first - masked.begin());
}

// The order of reference.sum_of_squares, literally, but for the zeros that fill up the last chunk.
inline double oracle_sum(std::vector<double> partial) {
  while (partial.size() > 1) {
    std::vector<double> sums;
    for (size_t begin = 0; begin < partial.size(); begin += kChunk) {
      double lanes[kLanes] = {};
      for (size_t i = begin; i < std::min<size_t>(begin + kChunk, partial.size()); ++i) lanes[i % kLanes] += partial[i];
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
      }
      sums.push_back(lanes[0]);
    }
    partial = std::move(sums);
  }
  return partial.empty() ? 0 : partial[0];
}

template <class T>
double oracle_sum_of_squares(const std::vector<BitsOf<T>>& x) {
  std::vector<double> squares(x.size());
  for (size_t i = 0; i < x.size(); ++i) squares[i] = value<T>(x[i]) * value<T>(x[i]);
  return oracle_sum(std::move(squares));
}

inline int sign(double x) { return (x > 0) - (x < 0); }

template <class T>
int64_t count_signs(const std::vector<BitsOf<T>>& before, const std::vector<BitsOf<T>>& after) {
  int64_t signs = 0;
  for (size_t i = 0; i < after.size(); ++i) signs += sign(value<T>(before[i])) != sign(value<T>(after[i]));
  return signs;
}

// reference.score_grad.
template <class T>
std::vector<BitsOf<T>> oracle_score_grad(const std::vector<BitsOf<T>>& grad, const std::vector<BitsOf<T>>& weight,
                                         const std::vector<BitsOf<T>>& at) {
  std::vector<BitsOf<T>> formed(at.size());
  for (size_t i = 0; i < at.size(); ++i) {
    const ComputeOf<T> product = Element<T>::widen(Element<T>::narrow(Element<T>::widen(grad[i]) * Element<T>::widen(weight[i])));
    formed[i] = Element<T>::narrow(product * static_cast<ComputeOf<T>>(sign(value<T>(at[i]))));
  }
  return formed;
}

// Perturbation: the scale of the gradient, and where it takes the scores.
template <class T>
ComputeOf<T> oracle_scale(const std::vector<BitsOf<T>>& scores, const std::vector<BitsOf<T>>& grad, double gamma, double eps) {
  const double norm_s = std::sqrt(oracle_sum_of_squares<T>(scores)), norm_g = std::sqrt(oracle_sum_of_squares<T>(grad));
  return static_cast<ComputeOf<T>>(gamma == 0 || norm_g == 0 ? 0 : gamma * norm_s / (norm_g + eps));
}

template <class T>
std::vector<BitsOf<T>> oracle_moved(const std::vector<BitsOf<T>>& scores, const std::vector<BitsOf<T>>& grad, ComputeOf<T> scale) {
  std::vector<BitsOf<T>> moved(scores.size());
  for (size_t i = 0; i < moved.size(); ++i) {
    const ComputeOf<T> z = Element<T>::widen(grad[i]) * scale;
    moved[i] = Element<T>::narrow(Element<T>::widen(scores[i]) + z);
  }
  return moved;
}

inline bool same_number(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

template <class T>
BitsOf<T> add_scaled(BitsOf<T> a, double alpha, BitsOf<T> b, bool fused) {
  using C = ComputeOf<T>;
  const C x = Element<T>::widen(a), y = Element<T>::widen(b), factor = static_cast<C>(alpha);
  if (fused) return Element<T>::narrow(std::fma(factor, y, x));
  const C product = factor * y;
  return Element<T>::narrow(x + product);
}

// One element of SGD; without momentum b is null.
template <class T>
void oracle_update(BitsOf<T>& s, BitsOf<T> g, BitsOf<T>* b, const SgdParameters& p, bool fused) {
  BitsOf<T> d = p.weight_decay != 0 ? add_scaled<T>(g, p.weight_decay, s, fused) : g;
  if (b != nullptr) {
    *b = Element<T>::narrow(Element<T>::widen(*b) * static_cast<ComputeOf<T>>(p.momentum));
    *b = add_scaled<T>(*b, 1 - p.dampening, d, fused);
    d = p.nesterov ? add_scaled<T>(d, p.momentum, *b, fused) : *b;
  }
  s = add_scaled<T>(s, -p.lr, d, fused);
}

}  // namespace cases
