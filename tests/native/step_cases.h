// Naive oracles for what the fused steps add: patterns, gradients formed from those of the masked weights, SGD. As in cuda_cases.h, they
// follow s2ap_ext/reference.py and share no code with the kernels.
#pragma once

#include <array>

#include "cuda_cases.h"

namespace cases {

using s2ap::Pattern;

// ---- Patterns

inline int64_t place(const Pattern& pattern, int64_t i) { return i / pattern.block % pattern.size; }

inline int64_t most_kept(const Pattern& pattern, int64_t n) { return pattern.kind == s2ap::kWeight ? n : pattern.size; }

// The bits of sum|s| of each group, as keys.
template <class T>
std::vector<int64_t> group_keys(const std::vector<T>& scores, const Pattern& pattern) {
  std::vector<std::vector<double>> members(pattern.size);
  for (size_t i = 0; i < scores.size(); ++i) members[place(pattern, static_cast<int64_t>(i))].push_back(std::fabs(value(scores[i])));
  std::vector<int64_t> keys;
  for (const std::vector<double>& group : members) {
    double sum = pinned_sum(group);
    keys.push_back(std::isnan(sum) ? 0x7ff8000000000000 : key(sum));
  }
  return keys;
}

template <class T>
CutRow cut(const std::vector<T>& scores, int64_t kept, const Pattern& pattern) {
  if (pattern.kind == s2ap::kWeight) return cut(scores, kept);
  CutRow row;
  if (pattern.kind == s2ap::kWindow) {
    row.column[1] = kept;
  } else {
    row = cut_of_keys(group_keys(scores, pattern), kept);
  }
  row.column[2] = count_nans(scores);
  return row;
}

template <class T>
std::vector<uint8_t> mask(const std::vector<T>& scores, const int64_t* row, const Pattern& pattern) {
  if (pattern.kind == s2ap::kWeight) return mask_of_keys(keys_of(scores), row);
  int64_t n = static_cast<int64_t>(scores.size());
  std::vector<uint8_t> mask(n);
  if (pattern.kind == s2ap::kGroup) {
    std::vector<uint8_t> groups = mask_of_keys(group_keys(scores, pattern), row);
    for (int64_t i = 0; i < n; ++i) mask[i] = groups[place(pattern, i)];
  } else {
    std::vector<int64_t> keys = keys_of(scores);
    std::vector<std::pair<int64_t, int64_t>> window(pattern.size);
    for (int64_t first = 0; first < n; first += pattern.size * pattern.block) {
      for (int64_t offset = 0; offset < pattern.block; ++offset) {
        for (int64_t j = 0; j < pattern.size; ++j) {
          int64_t i = first + j * pattern.block + offset;
          window[j] = {keys[i], i};
        }
        std::nth_element(window.begin(), window.end() - row[1], window.end());
        for (int64_t j = pattern.size - row[1]; j < pattern.size; ++j) mask[window[j].second] = 1;
      }
    }
  }
  return mask;
}

struct PatternCase {
  Pattern pattern;
  int64_t n;
};
// Neighbours, input channels, more windows than one chunk; output channels, heads, columns, groups of several chunks, one group.
inline const PatternCase kPatternCases[] = {
    {{s2ap::kWindow, 4, 1}, 4100},         {{s2ap::kWindow, 4, 9}, 4 * 9 * 130},
    {{s2ap::kWindow, 32, 7}, 32 * 7 * 23}, {{s2ap::kWindow, 3, 1}, 3},
    {{s2ap::kWindow, 8, 1}, 9000},         {{s2ap::kGroup, 16, 27}, 16 * 27},
    {{s2ap::kGroup, 12, 64}, 12 * 64 * 6}, {{s2ap::kGroup, 3, 4100}, 3 * 4100},
    {{s2ap::kGroup, 2, 50}, 2 * 50 * 90},  {{s2ap::kGroup, 50, 1}, 5000},
    {{s2ap::kGroup, 1, 500}, 500},         {{s2ap::kWeight, 0, 1}, 5000},
};
constexpr int kPatternCaseCount = static_cast<int>(sizeof kPatternCases / sizeof *kPatternCases);

// ---- Gradients and steps

template <class T>
int sign(T x) {
  return (value(x) > 0) - (value(x) < 0);
}

template <class T>
T score_grad(T grad, T weight, T at) {
  T product = make<T>(static_cast<Wide<T>>(value(grad)) * static_cast<Wide<T>>(value(weight)));
  return make<T>(static_cast<Wide<T>>(value(product)) * static_cast<Wide<T>>(sign(at)));
}

template <class T>
T perturbed(T score, T grad, double scale) {
  Wide<T> z = static_cast<Wide<T>>(value(grad)) * static_cast<Wide<T>>(scale);
  return make<T>(static_cast<Wide<T>>(value(score)) + z);
}

struct Settings {
  double lr, momentum, dampening, weight_decay;
  bool nesterov;
};

template <class T>
T fused(double a, T b, T c) {  // c + a * b, rounded once to T's precision of computing and once to T
  Wide<T> scalar = static_cast<Wide<T>>(a);
  return make<T>(std::fma(scalar, static_cast<Wide<T>>(value(b)), static_cast<Wide<T>>(value(c))));
}

// One element of SGD, with the fused multiply-adds of torch's CUDA kernels.
template <class T>
void sgd(const Settings& settings, T& score, T grad, T& buffer) {
  T d = grad;
  if (settings.weight_decay != 0) d = fused<T>(settings.weight_decay, score, d);
  if (settings.momentum != 0) {
    buffer = make<T>(static_cast<Wide<T>>(value(buffer)) * static_cast<Wide<T>>(settings.momentum));
    buffer = fused<T>(1 - settings.dampening, d, buffer);
    d = settings.nesterov ? fused<T>(settings.momentum, buffer, d) : buffer;
  }
  score = fused<T>(-settings.lr, d, score);
}

// Equal bits; NaN is NaN, since its bits are anyone's.
template <class T>
bool same_number(const T& a, const T& b) {
  return same_bits(a, b) || (std::isnan(value(a)) && std::isnan(value(b)));
}

}  // namespace cases
