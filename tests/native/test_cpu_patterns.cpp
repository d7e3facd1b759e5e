// N:M and grouped selection on the CPU against naive loops over groups and windows: select, perturb and update_select, every dtype,
// instruction set and thread count, layers of a tile, of a unit and of many, among plain layers.
#include "cpu/update_select.h"

#include "cpu_cases.h"

using namespace cases;

int64_t place(const Pattern& p, int64_t i) { return i / p.block % p.size; }

// Bits of |x| as float64; the greater ranks above.
template <class T>
uint64_t magnitude(BitsOf<T> bits) {
  return std::bit_cast<uint64_t>(std::abs(value<T>(bits)));
}

// The places that stay among ranked[0], ranked[1] ...: the `kept` largest, a later one before an equal earlier one.
std::vector<bool> largest(const std::vector<uint64_t>& ranked, int64_t kept) {
  const auto n = static_cast<int64_t>(ranked.size());
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return ranked[a] < ranked[b]; });
  std::vector<bool> stays(n);
  for (int64_t i = n - kept; i < n; ++i) stays[order[i]] = true;
  return stays;
}

template <class T>
Selected oracle_pattern(const std::vector<BitsOf<T>>& scores, int64_t kept, const Pattern& p) {
  if (p.kind == kWeight) return oracle_select<T>(scores, kept);
  const auto n = static_cast<int64_t>(scores.size());
  Selected result;
  result.mask.resize(n);
  for (auto bits : scores) result.nans += std::isnan(value<T>(bits));
  if (p.kind == kWindow) {
    result.index = kept;
    for (int64_t i = 0; i < n; ++i) {
      if (place(p, i) != 0) continue;
      std::vector<uint64_t> window;
      for (int64_t j = 0; j < p.size; ++j) window.push_back(magnitude<T>(scores[i + j * p.block]));
      const std::vector<bool> stays = largest(window, kept);
      for (int64_t j = 0; j < p.size; ++j) result.mask[i + j * p.block] = stays[j];
    }
    return result;
  }
  std::vector<std::vector<double>> groups(p.size);
  for (int64_t i = 0; i < n; ++i) groups[place(p, i)].push_back(std::abs(value<T>(scores[i])));
  std::vector<uint64_t> sums;
  for (const auto& group : groups) {
    const double sum = oracle_sum(group);
    sums.push_back(std::isnan(sum) ? uint64_t{0x7ff8000000000000} : std::bit_cast<uint64_t>(sum));
  }
  const std::vector<bool> stays = largest(sums, kept);
  for (int64_t i = 0; i < n; ++i) result.mask[i] = stays[place(p, i)];
  if (kept == 0) {
    result.key = INT64_MAX;
  } else if (kept < p.size) {
    uint64_t least = UINT64_MAX;
    for (int64_t g = 0; g < p.size; ++g) {
      if (stays[g] && sums[g] < least) {
        least = sums[g];
        result.index = g;
      }
    }
    result.key = static_cast<int64_t>(least);
  }
  return result;
}

template <class T>
struct Case {
  std::string what;
  Pattern pattern;
  std::vector<BitsOf<T>> scores, grad, weight, masked;
  int64_t kept;
};

template <class T>
Case<T> make_case(const std::string& what, const Pattern& p, const std::vector<double>& scores, int64_t kept) {
  const auto n = static_cast<int64_t>(scores.size());
  return {what + ", kind " + std::to_string(p.kind) + ", " + std::to_string(p.size) + " * " + std::to_string(p.block) + " of " +
              std::to_string(n) + ", kept " + std::to_string(kept),
          p,
          stored<T>(scores),
          stored<T>(normal(n, 5)),
          stored<T>(normal(n, 7)),
          std::vector<BitsOf<T>>(n, BitsOf<T>{0x55}),
          kept};
}

template <class T>
void expect_masked(Case<T>& c, const Selected& expected, const int64_t* row, const std::string& what) {
  EXPECT(row[kKey] == expected.key, "%s: key %llx, not %llx", what.c_str(), static_cast<long long>(row[kKey]), static_cast<long long>(expected.key));
  EXPECT(row[kIndex] == expected.index, "%s: index %lld, not %lld", what.c_str(), static_cast<long long>(row[kIndex]), static_cast<long long>(expected.index));
  EXPECT(row[kNans] == expected.nans, "%s: %lld NaN", what.c_str(), static_cast<long long>(row[kNans]));
  for (size_t i = 0; i < c.masked.size(); ++i) {
    EXPECT(c.masked[i] == (expected.mask[i] ? c.weight[i] : 0), "%s: element %zu", what.c_str(), i);
    c.masked[i] = 0x55;
  }
}

// update_select: one step, and the flips against the masks from before it.
template <class T>
void expect_right_step(std::vector<Case<T>>& all, const std::vector<Selected>& before, const std::vector<int64_t>& cuts, const Machine& machine,
                       const std::string& where) {
  const SgdParameters sgd = {0.5, 0, 0, 1e-3, false};
  std::vector<UpdateSelectLayer<T>> layers;
  std::vector<int64_t> new_cuts(cuts.size(), -1);
  std::vector<double> sums(all.size());
  std::vector<std::vector<BitsOf<T>>> stepped;
  for (auto& c : all) {
    const auto n = static_cast<int64_t>(c.scores.size());
    stepped.push_back(c.scores);
    update<T>(machine, {{stepped.back().data(), c.grad.data(), nullptr, n}}, sgd, true);
    layers.push_back({{c.scores.data(), c.grad.data(), nullptr, n}, nullptr, c.weight.data(), c.masked.data(), c.kept, c.pattern});
  }
  update_select(machine, layers, {sgd, true}, cuts.data(), new_cuts.data(), sums.data());
  for (size_t l = 0; l < all.size(); ++l) {
    Case<T>& c = all[l];
    const std::string what = where + "stepped, " + c.what;
    EXPECT(c.scores == stepped[l], "%s: the step", what.c_str());
    const Selected expected = oracle_pattern<T>(c.scores, c.kept, c.pattern);
    const int64_t* row = &new_cuts[l * kCutColumns];
    expect_masked(c, expected, row, what);
    int64_t flips = 0;
    for (size_t i = 0; i < c.scores.size(); ++i) flips += expected.mask[i] != before[l].mask[i];
    EXPECT(row[kFlips] == flips, "%s: %lld flips, not %lld", what.c_str(), static_cast<long long>(row[kFlips]), static_cast<long long>(flips));
  }
}

template <class T>
void expect_right(std::vector<Case<T>>& all, const Machine& machine) {
  const std::string where = name<T>() + ", isa " + std::to_string(static_cast<int>(machine.isa)) + ", ";
  std::vector<SelectLayer<T>> layers;
  std::vector<PerturbLayer<T>> moved_layers;
  for (auto& c : all) {
    const auto n = static_cast<int64_t>(c.scores.size());
    layers.push_back({c.scores.data(), c.weight.data(), c.masked.data(), n, c.kept, c.pattern});
    moved_layers.push_back({c.scores.data(), c.grad.data(), c.weight.data(), c.masked.data(), n, c.kept, c.pattern});
  }
  std::vector<int64_t> cuts(all.size() * kCutColumns, -1), new_cuts = cuts;
  select(machine, layers, cuts.data());
  std::vector<Selected> now;
  for (size_t l = 0; l < all.size(); ++l) {
    now.push_back(oracle_pattern<T>(all[l].scores, all[l].kept, all[l].pattern));
    expect_masked(all[l], now[l], &cuts[l * kCutColumns], where + all[l].what);
  }
  std::vector<double> scales(all.size());
  perturb(machine, moved_layers, {0.3, 1e-12}, cuts.data(), new_cuts.data(), scales.data());
  for (size_t l = 0; l < all.size(); ++l) {
    Case<T>& c = all[l];
    const std::string what = where + "moved, " + c.what;
    std::vector<BitsOf<T>> moved;
    for (size_t i = 0; i < c.scores.size(); ++i) {
      const ComputeOf<T> z = Element<T>::widen(c.grad[i]) * static_cast<ComputeOf<T>>(scales[l]);
      moved.push_back(Element<T>::narrow(Element<T>::widen(c.scores[i]) + z));
    }
    const Selected expected = oracle_pattern<T>(moved, c.kept, c.pattern);
    const int64_t* row = &new_cuts[l * kCutColumns];
    expect_masked(c, expected, row, what);
    int64_t flips = 0, signs = 0;
    for (size_t i = 0; i < moved.size(); ++i) {
      flips += expected.mask[i] != now[l].mask[i];
      signs += sign(value<T>(moved[i])) != sign(value<T>(c.scores[i]));
    }
    EXPECT(row[kFlips] == flips, "%s: %lld flips, not %lld", what.c_str(), static_cast<long long>(row[kFlips]), static_cast<long long>(flips));
    EXPECT(row[kSigns] == signs, "%s: %lld signs, not %lld", what.c_str(), static_cast<long long>(row[kSigns]), static_cast<long long>(signs));
  }
  expect_right_step(all, now, cuts, machine, where);
}

struct Shape {
  Pattern pattern;
  int64_t n;
};

const Shape kSmall[] = {
    {{kWindow, 4, 1}, 4},          {{kWindow, 4, 1}, 4092},      {{kWindow, 8, 1}, 4096},  {{kWindow, 3, 1}, 3 * 1111},
    {{kWindow, 4, 9}, 4 * 9 * 85}, {{kWindow, 8, 9}, 8 * 9 * 7}, {{kWindow, 2, 17}, 34 * 3}, {{kWindow, 32, 7}, 32 * 7 * 11},
    {{kWindow, 5, 3}, 15},         {{kWindow, 1, 3}, 15},        {{kWindow, 7, 300}, 7 * 300 * 3},
    {{kGroup, 16, 27}, 16 * 27},   {{kGroup, 5, 1}, 35},         {{kGroup, 1, 50}, 50},    {{kGroup, 9, 4}, 9 * 4 * 30},
    {{kGroup, 3, 4097}, 3 * 4097}, {{kGroup, 2, 100}, 2 * 100 * 50},
};

const Shape kLarge[] = {
    {{kWindow, 4, 1}, 50004},
    {{kWindow, 8, 9}, 8 * 9 * 700},
    {{kWindow, 32, 1}, 32 * 1000},
    {{kWindow, 4, 513}, 4 * 513 * 20},     // a superblock just larger than a tile
    {{kWindow, 4, 20000}, 4 * 20000 * 2},  // and than a unit
    {{kWindow, 31, 1234}, 31 * 1234},
    {{kGroup, 300, 127}, 300 * 127},
    {{kGroup, 12, 64 * 16}, 3 * 12 * 64 * 16},
    {{kGroup, 6, 6}, 6 * 6 * 800},    // chunks end within runs
    {{kGroup, 1000, 1}, 1000 * 30},
    {{kGroup, 3, 20001}, 3 * 20001},
    {{kGroup, 1, 40000}, 40000},
    {{kWeight, 0, 1}, 40000},
    {{kWeight, 0, 1}, 500},
};

template <class T>
void test_dtype() {
  for (Isa isa : instruction_sets()) {
    for (const auto& [pattern, n] : kSmall) {
      std::vector<Case<T>> all;
      for (int64_t kept = 0; kept <= pattern.size; ++kept) all.push_back(make_case<T>("normal", pattern, normal(n, n), kept));
      for (const auto& [what, scores] : hard_scores(n, n + 1)) all.push_back(make_case<T>(what, pattern, scores, (pattern.size + 1) / 2));
      expect_right(all, machine(isa, 2));
    }
    for (int threads : {1, 2, 5}) {
      std::vector<Case<T>> all;
      for (const auto& [pattern, n] : kLarge) {
        const int64_t most = pattern.kind == kWeight ? n : pattern.size;
        all.push_back(make_case<T>("one of many", pattern, normal(n, n), most / 2));
        for (int64_t kept : {int64_t{0}, most}) all.push_back(make_case<T>("all or none", pattern, normal(n, n), kept));
        if (threads != 5) continue;
        for (const auto& [what, scores] : hard_scores(n, n)) {
          const bool taken = what == "few values" || what == "infinite" || what == "NaN among numbers";
          if (taken) all.push_back(make_case<T>(what, pattern, scores, (most + 2) / 3));
        }
      }
      expect_right(all, machine(isa, threads));
    }
  }
}

// Tiles cover a layer once, in windows that are whole.
void test_tiles() {
  for (const auto* shapes : {&kSmall[0], &kLarge[0]}) {
    for (size_t i = 0; i < (shapes == kSmall ? std::size(kSmall) : std::size(kLarge)); ++i) {
      const auto& [pattern, n] = shapes[i];
      if (pattern.kind == kWeight) continue;
      std::vector<int> seen(n);
      const Tiles tiles(pattern, n);
      for (int64_t t = 0; t < tiles.count(); ++t) {
        EXPECT(tiles[t].number == t && tiles[t].elements.n > 0 && tiles[t].elements.n <= kTile, "tile %d of case %zu", static_cast<int>(t), i);
        int64_t last = -1;
        tiles[t].elements.for_each_piece([&](int64_t index, int64_t, int64_t count) {
          EXPECT(index > last && index + count <= n, "tile %d of case %zu", static_cast<int>(t), i);
          last = index;
          for (int64_t k = index; k < index + count; ++k) ++seen[k];
        });
        EXPECT(pattern.kind == kGroup || tiles[t].elements.n % pattern.size == 0, "tile %d of case %zu", static_cast<int>(t), i);
      }
      EXPECT(std::count(seen.begin(), seen.end(), 1) == n, "case %zu", i);
    }
  }
}

int main() {
  test_tiles();
  for_each_type([&]<class T>() { test_dtype<T>(); });
}
