// N:M and grouped selection on the CPU against naive loops over groups and windows: select, perturb and update_select, every dtype,
// instruction set and thread count, layers of a tile, of a unit and of many, among plain layers.
#include "cpu/update_select.h"

#include "cpu_cases.h"

using namespace cases;

int64_t place(const Pattern& p, int64_t i) { return i / p.block % p.size; }

template <class T>
Selected oracle_pattern(const std::vector<BitsOf<T>>& scores, int64_t kept, const Pattern& p) {
  if (p.kind == kWeight) return oracle_select<T>(scores, kept);
  const auto n = static_cast<int64_t>(scores.size());
  Selected result;
  result.mask.resize(n);
  std::vector<double> magnitudes(n);
  for (int64_t i = 0; i < n; ++i) {
    magnitudes[i] = std::abs(value<T>(scores[i]));
    result.nans += std::isnan(magnitudes[i]);
  }
  if (p.kind == kWindow) {
    result.index = kept;
    Ranked window(p.size);
    for (int64_t first = 0; first < n; ++first) {
      if (place(p, first) != 0) continue;
      for (int64_t j = 0, i = first; j < p.size; ++j, i += p.block) window[j] = {magnitude(magnitudes[i]), i};
      keep_largest(window, kept, result.mask);
    }
    return result;
  }
  std::vector<std::vector<double>> groups(p.size);
  for (int64_t i = 0; i < n; ++i) groups[place(p, i)].push_back(magnitudes[i]);
  Ranked sums(p.size);
  for (int64_t g = 0; g < p.size; ++g) sums[g] = {magnitude(oracle_sum(groups[g])), g};
  const Ranked all = sums;
  std::vector<uint8_t> stays(p.size);
  const int64_t cut = keep_largest(sums, kept, stays);
  for (int64_t i = 0; i < n; ++i) result.mask[i] = stays[place(p, i)];
  if (kept == 0) {
    result.key = INT64_MAX;
  } else if (kept < p.size) {
    result.key = static_cast<int64_t>(all[cut].first);
    result.index = cut;
  }
  return result;
}

template <class T>
struct Case {
  std::string what;
  Pattern pattern;
  std::vector<BitsOf<T>> scores, grad, weight;
  int64_t kept;
  double scale;
  std::vector<BitsOf<T>> stepped;
  Outcome<T> selected, moved, updated;  // what select, perturb and update_select leave
};

constexpr SgdParameters kSgd = {0.5, 0, 0, 1e-3, false};
constexpr double kGamma = 0.3, kEps = 1e-12;

template <class T>
Case<T> make_case(const std::string& what, const Pattern& p, const std::vector<double>& scores, int64_t kept) {
  const auto n = static_cast<int64_t>(scores.size());
  Case<T> c = {what + ", kind " + std::to_string(p.kind) + ", " + std::to_string(p.size) + " * " + std::to_string(p.block) + " of " +
                   std::to_string(n) + ", kept " + std::to_string(kept),
               p,
               stored<T>(scores),
               stored<T>(normal(n, 5)),
               stored<T>(normal(n, 7)),
               kept,
               0,
               {},
               {},
               {},
               {}};
  const Selected now = oracle_pattern<T>(c.scores, kept, p);
  c.selected = outcome<T>(now, c.weight);

  c.scale = oracle_scale<T>(c.scores, c.grad, kGamma, kEps);
  const auto moved = oracle_moved<T>(c.scores, c.grad, static_cast<ComputeOf<T>>(c.scale));
  const Selected there = oracle_pattern<T>(moved, kept, p);
  c.moved = outcome<T>(there, c.weight, count_flips(now, there), count_signs<T>(c.scores, moved));

  c.stepped = c.scores;
  for (int64_t i = 0; i < n; ++i) oracle_update<T>(c.stepped[i], c.grad[i], nullptr, kSgd, true);
  const Selected after = oracle_pattern<T>(c.stepped, kept, p);
  c.updated = outcome<T>(after, c.weight, count_flips(now, after));
  return c;
}

template <class T>
void expect_right(const std::vector<Case<T>>& all, const std::vector<int>& threads) {
  for_each_machine(threads, [&](const Machine& machine) {
    std::vector<std::vector<BitsOf<T>>> masked[] = {unwritten<T>(all), unwritten<T>(all), unwritten<T>(all)}, stepped;
    std::vector<SelectLayer<T>> layers;
    std::vector<PerturbLayer<T>> moved_layers;
    std::vector<UpdateSelectLayer<T>> stepped_layers;
    for (size_t l = 0; l < all.size(); ++l) {
      const Case<T>& c = all[l];
      const auto n = static_cast<int64_t>(c.scores.size());
      stepped.push_back(c.scores);
      layers.push_back({c.scores.data(), c.weight.data(), masked[0][l].data(), n, c.kept, c.pattern});
      moved_layers.push_back({c.scores.data(), c.grad.data(), c.weight.data(), masked[1][l].data(), n, c.kept, c.pattern});
      stepped_layers.push_back(
          {{stepped[l].data(), c.grad.data(), nullptr, n}, nullptr, c.weight.data(), masked[2][l].data(), c.kept, c.pattern});
    }
    std::vector<int64_t> cuts(all.size() * kCutColumns, -1), moved_cuts = cuts, new_cuts = cuts;
    std::vector<double> gammas(all.size(), kGamma), scales(all.size()), sums(all.size());
    select(machine, layers, cuts.data());
    perturb(machine, moved_layers, {gammas.data(), kEps}, cuts.data(), moved_cuts.data(), scales.data());
    update_select(machine, stepped_layers, {kSgd, true}, cuts.data(), new_cuts.data(), sums.data());
    for (size_t l = 0; l < all.size(); ++l) {
      const Case<T>& c = all[l];
      expect_outcome(c.selected, &cuts[l * kCutColumns], masked[0][l], machine, c.what);
      EXPECT(same_number(scales[l], c.scale), "%s, %s: scale %a, not %a", name<T>().c_str(), c.what.c_str(), scales[l], c.scale);
      expect_outcome(c.moved, &moved_cuts[l * kCutColumns], masked[1][l], machine, "moved, " + c.what);
      EXPECT(stepped[l] == c.stepped, "%s, %s: the step", name<T>().c_str(), c.what.c_str());
      expect_outcome(c.updated, &new_cuts[l * kCutColumns], masked[2][l], machine, "stepped, " + c.what);
    }
  });
}

struct Shape {
  Pattern pattern;
  int64_t n;
};

const Shape kSmall[] = {
    {{kWindow, 4, 1}, 4},
    {{kWindow, 4, 1}, 4092},
    {{kWindow, 8, 1}, 4096},
    {{kWindow, 3, 1}, 3 * 1111},
    {{kWindow, 4, 9}, 4 * 9 * 85},
    {{kWindow, 8, 9}, 8 * 9 * 7},
    {{kWindow, 2, 17}, 34 * 3},
    {{kWindow, 32, 7}, 32 * 7 * 11},
    {{kWindow, 5, 3}, 15},
    {{kWindow, 1, 3}, 15},
    {{kWindow, 7, 300}, 7 * 300 * 3},
    {{kGroup, 16, 27}, 16 * 27},
    {{kGroup, 5, 1}, 35},
    {{kGroup, 1, 50}, 50},
    {{kGroup, 9, 4}, 9 * 4 * 30},
    {{kGroup, 3, 4097}, 3 * 4097},
    {{kGroup, 2, 100}, 2 * 100 * 50},
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
    {{kGroup, 6, 6}, 6 * 6 * 800},  // chunks end within runs
    {{kGroup, 1000, 1}, 1000 * 30},
    {{kGroup, 3, 20001}, 3 * 20001},
    {{kGroup, 1, 40000}, 40000},
    {{kWeight, 0, 1}, 40000},
    {{kWeight, 0, 1}, 500},
};

template <class T>
void test_dtype() {
  std::vector<Case<T>> many;
  for (const auto& [pattern, n] : kSmall) {
    many.push_back(make_case<T>("one of many", pattern, normal(n, n), (pattern.size + 1) / 2));
    if (kOnlySharing) continue;
    std::vector<Case<T>> all;
    for (int64_t kept = 0; kept <= pattern.size; ++kept) all.push_back(make_case<T>("normal", pattern, normal(n, n), kept));
    for (const auto& [what, scores] : hard_scores(n, n + 1)) all.push_back(make_case<T>(what, pattern, scores, (pattern.size + 1) / 2));
    expect_right(all, {2});
  }
  for (const auto& [pattern, n] : kLarge) {
    const int64_t most = pattern.kind == kWeight ? n : pattern.size;
    for (int64_t kept : {int64_t{0}, most / 2, most}) many.push_back(make_case<T>("one of many", pattern, normal(n, n), kept));
  }
  expect_right(many, {1, 2, 5});
  std::vector<Case<T>> hard;
  for (const auto& [pattern, n] : kLarge) {
    const int64_t most = pattern.kind == kWeight ? n : pattern.size;
    for (const auto& [what, scores] : hard_scores(n, n)) {
      const bool taken = what == "few values" || what == "infinite" || what == "NaN among numbers";
      if (taken) hard.push_back(make_case<T>(what, pattern, scores, (most + 2) / 3));
    }
  }
  expect_right(hard, {5});
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
        EXPECT(tiles[t].number == t && tiles[t].elements.n > 0 && tiles[t].elements.n <= kTile, "tile %d of case %zu", static_cast<int>(t),
               i);
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
