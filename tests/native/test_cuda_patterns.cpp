// Patterns in select.cu and perturb.cu, and perturb's formed gradients and known squares, on the emulated grid against naive loops.
#include "cuda/perturb.cu"
#include "cuda/select.cu"

#include "step_cases.h"

using namespace cases;
namespace kernels = s2ap::cuda;

struct How {
  bool straight_through = false, squares = false, same_cuts = false, cooperative = true;
};

template <class T>
struct Problem {
  std::vector<std::vector<T>> scores, grads, weights;
  std::vector<Pattern> patterns;
  std::vector<int64_t> kept;
  double gamma = 0.5, eps = 1e-12;

  void add(int kind, int64_t n, const Pattern& pattern, int64_t count, Random& random) {
    scores.push_back(numbers<T>(kind, n, random));
    grads.push_back(numbers<T>(0, n, random));
    weights.push_back(numbers<T>(0, n, random));
    patterns.push_back(pattern);
    kept.push_back(count);
  }
  void add_all(int kind, Random& random) {
    for (const PatternCase& c : kPatternCases) add(kind, c.n, c.pattern, some_count(most_kept(c.pattern, c.n), random), random);
  }
  int64_t clamped(size_t l) const {
    return std::clamp<int64_t>(kept[l], 0, most_kept(patterns[l], static_cast<int64_t>(scores[l].size())));
  }
};

template <class Args, class Phases>
void launch(const Args& args, GridSize size, uint64_t seed, bool cooperative, Phases phases) {
  if (cooperative) {
    emulated::launch(size.blocks, size.threads, seed, [&](const emulated::Grid& grid) { phases(grid, args, 0, args.phases()); });
  } else {
    for (int phase = 0; phase < args.phases(); ++phase) {
      emulated::launch(size.blocks, size.threads, seed + phase, [&](const emulated::Grid& grid) { phases(grid, args, phase, phase + 1); });
    }
  }
}

template <class T>
void expect(const Problem<T>& problem, size_t l, const CutRow& row, const std::vector<uint8_t>& stays, const int64_t* cut,
            const std::vector<T>& masked, const std::string& what) {
  const Pattern& p = problem.patterns[l];
  for (int column = 0; column < 5; ++column) {
    EXPECT(cut[column] == row.column[column], "%s %s, layer %zu (%d, %d * %d of %zu), kept %lld, column %d: %lld, got %lld", kName<T>,
           what.c_str(), l, (int)p.kind, (int)p.size, (int)p.block, masked.size(), (long long)problem.kept[l], column,
           (long long)row.column[column], (long long)cut[column]);
  }
  size_t wrong = first_difference(masked, cases::masked(stays, problem.weights[l]));
  EXPECT(wrong == masked.size(), "%s %s, layer %zu (%d, %d * %d), element %zu of %zu", kName<T>, what.c_str(), l, (int)p.kind, (int)p.size,
         (int)p.block, wrong, masked.size());
}

template <class T>
void check_select(const Problem<T>& problem, GridSize size, uint64_t seed, bool cooperative, const std::string& what) {
  size_t layers = problem.scores.size();
  std::vector<std::vector<T>> masked = problem.weights;
  std::vector<int64_t> cuts(layers * 5, -1);
  kernels::SelectArgs<T> args;
  for (size_t l = 0; l < layers; ++l) {
    args.selection.table.push({problem.scores[l].data(), nullptr, problem.weights[l].data(), masked[l].data(),
                               static_cast<int64_t>(problem.scores[l].size()), problem.patterns[l]});
  }
  args.selection.kept = problem.kept.data();
  args.selection.cuts = cuts.data();
  args.plan();
  Workspace workspace;
  kernels::for_each_array(args, workspace);
  launch(args, size, seed, cooperative, [](const auto&... a) { kernels::select_phases(a...); });
  for (size_t l = 0; !kOnlySharing && l < layers; ++l) {
    CutRow row = cut(problem.scores[l], problem.clamped(l), problem.patterns[l]);
    expect(problem, l, row, mask(problem.scores[l], row.column, problem.patterns[l]), &cuts[l * 5], masked[l], "select " + what);
  }
}

template <class T>
void check_perturb(const Problem<T>& problem, GridSize size, uint64_t seed, const How& how, const std::string& what) {
  size_t layers = problem.scores.size();
  std::vector<std::vector<T>> masked = problem.weights;
  std::vector<int64_t> cuts_now, new_cuts(layers * 5, -1);
  std::vector<double> scales(layers, -1), squares;
  for (size_t l = 0; l < layers; ++l) {
    CutRow row = cut(problem.scores[l], problem.clamped(l), problem.patterns[l]);
    cuts_now.insert(cuts_now.end(), row.column, row.column + 5);
    double root = norm(problem.scores[l]);
    squares.push_back(4 * root * root);  // not what they are, to see that they are used
  }
  std::vector<int64_t> cuts_before = cuts_now;
  std::vector<int64_t>& cuts = how.same_cuts ? cuts_now : new_cuts;
  kernels::PerturbArgs<T> args;
  for (size_t l = 0; l < layers; ++l) {
    args.selection.table.push({problem.scores[l].data(), problem.grads[l].data(), problem.weights[l].data(), masked[l].data(),
                               static_cast<int64_t>(problem.scores[l].size()), problem.patterns[l]});
  }
  args.selection.kept = problem.kept.data();
  args.selection.cuts = cuts.data();
  args.cuts_now = cuts_now.data();
  args.squares = how.squares ? squares.data() : nullptr;
  std::vector<double> gammas;
  for (size_t l = 0; l < layers; ++l) gammas.push_back(problem.gamma * (l % 3 + 1));
  args.gammas = gammas.data();
  args.eps = problem.eps;
  args.straight_through = how.straight_through;
  args.scales = scales.data();
  args.plan();
  Workspace workspace;
  kernels::for_each_array(args, workspace);
  launch(args, size, seed, how.cooperative, [](const auto&... a) { kernels::perturb_phases(a...); });
  for (size_t l = 0; !kOnlySharing && l < layers; ++l) {
    const std::vector<T>& s = problem.scores[l];
    std::vector<T> g = problem.grads[l], moved(s.size());
    for (size_t i = 0; how.straight_through && i < s.size(); ++i) g[i] = cases::score_grad(g[i], problem.weights[l][i], s[i]);
    double norm_s = how.squares ? std::sqrt(squares[l]) : norm(s), norm_g = norm(g);
    double scale = norm_g == 0 ? 0 : static_cast<Wide<T>>(gammas[l] * norm_s / (norm_g + problem.eps));
    EXPECT(same_number(scales[l], scale), "%s %s, layer %zu: scale %.17g, got %.17g", kName<T>, what.c_str(), l, scale, scales[l]);
    for (size_t i = 0; i < s.size(); ++i) moved[i] = cases::perturbed(s[i], g[i], scale);
    CutRow row = cut(moved, problem.clamped(l), problem.patterns[l]);
    std::vector<uint8_t> before = mask(s, &cuts_before[l * 5], problem.patterns[l]), after = mask(moved, row.column, problem.patterns[l]);
    for (size_t i = 0; i < s.size(); ++i) {
      row.column[3] += before[i] != after[i];
      row.column[4] += sign(moved[i]) != sign(s[i]);
    }
    expect(problem, l, row, after, &cuts[l * 5], masked[l], "perturb " + what);
  }
}

template <class T>
void test_kinds(Random& random) {
  for (int kind = 0; kind < kKindCount; ++kind) {
    Problem<T> problem;
    problem.add_all(kind, random);
    GridSize size = kGrids[kind % kGridCount];
    check_select(problem, size, random(), kind % 3 != 2, kKinds[kind]);
    if (kKinds[kind] == std::string("huge")) continue;  // infinite norms make NaN, whose keys are anyone's
    How how{kind % 2 == 0, kind % 4 < 2, kind % 3 == 1, kind % 3 != 2};
    check_perturb(problem, size, random(), how, kKinds[kind]);
  }
}

template <class T>
void test_formed_gradients_and_known_squares(Random& random) {
  for (How how : {How{true, false}, How{true, true}, How{false, true}}) {
    Problem<T> problem;
    for (int kind : {0, 1, 3, 5, 6, 10}) problem.add(kind, 5000, {}, 2000, random);
    problem.add(2, 0, {}, 0, random);
    problem.add(0, 100, {}, 50, random);
    std::fill(problem.grads.back().begin(), problem.grads.back().end(), make<T>(0));
    check_perturb(problem, kGrids[3], random(), how, "plain");
  }
}

void test_every_grid_and_schedule(Random& random) {
  Problem<float> problem;
  problem.add_all(1, random);
  for (GridSize size : kGrids) {
    for (uint64_t seed = 0; seed < 2; ++seed) {
      check_select(problem, size, seed, true, "few values");
      check_perturb(problem, size, seed, {seed == 0, seed == 1}, "few values");
    }
  }
}

// Of every pattern all counts around the ends, also those out of range, which are clamped.
void test_counts(Random& random) {
  for (const PatternCase& c : kPatternCases) {
    if (c.n > 5000) continue;
    Problem<float> problem;
    int64_t most = most_kept(c.pattern, c.n);
    for (int64_t count : {int64_t{-5}, int64_t{0}, int64_t{1}, most - 1, most, most + 1, std::numeric_limits<int64_t>::max()}) {
      problem.add(1, c.n, c.pattern, count, random);
    }
    check_select(problem, kGrids[1], 1, true, "counts");
    check_perturb(problem, kGrids[1], 1, {true}, "counts");
  }
}

template <class T>
void test_nan_is_counted_and_ranks_first(Random& random) {
  Problem<T> problem;
  problem.add_all(0, random);
  for (auto& scores : problem.scores) {
    for (int i = 0; i < 3; ++i) scores[random() % scores.size()] = make<T>(i % 2 ? NAN : -NAN);
  }
  check_select(problem, kGrids[2], 1, true, "nan");
}

// The levels of the sums of two groups of 40 million elements, from their chunks' sums on: too many elements to be told apart one by one.
void test_levels_of_sums(Random& random) {
  kernels::Table<kernels::Layer<float>> table;
  table.push({nullptr, nullptr, nullptr, nullptr, 5000, {}});
  table.push({nullptr, nullptr, nullptr, nullptr, 80000000, {s2ap::kGroup, 2, 40000000}});
  table.push({nullptr, nullptr, nullptr, nullptr, 300, {s2ap::kGroup, 3, 100}});
  kernels::Groups groups;
  groups.take(table, 2);
  EXPECT(groups.levels == 3, "got %d", groups.levels);
  EXPECT(kernels::selection_and_pattern_phases<Float16>(groups) >= 5, "the sums, the cut and the masks take five phases");
  Workspace workspace;
  kernels::for_each_array(groups, workspace);
  std::vector<double> partial(2 * groups.chunks);
  for (double& x : partial) x = std::exp(std::normal_distribution<double>()(random));
  std::copy(partial.begin(), partial.end(), groups.level[0]);
  emulated::launch(3, 64, 1, [&](const emulated::Grid& grid) {
    for (int level = 1; level < groups.levels; ++level) {
      if (level > 1) grid.grid_barrier();
      kernels::sum_groups_again(grid, table, groups, level);
    }
  });
  for (int layer = 1; layer < table.layers; ++layer) {
    for (int quantity = 0; quantity < 2; ++quantity) {
      for (int64_t group = 0; group < table.rows[layer].pattern.size; ++group) {
        int64_t each = kernels::Groups::chunks_of_group(table.rows[layer]);
        auto begin = partial.begin() + quantity * groups.chunks + groups.first_chunk[layer] + group * each;
        double expected = pinned_sum({begin, begin + each});
        kernels::GroupMask mask(groups, table, layer, quantity, {});
        EXPECT(mask.key(group) == key(expected), "layer %d, quantity %d, group %d", layer, quantity, (int)group);
      }
    }
  }
}

int main() {
  Random random(4);
  for_each_type([&]<class T>() { test_kinds<T>(random); });
  for_each_type([&]<class T>() { test_formed_gradients_and_known_squares<T>(random); });
  test_every_grid_and_schedule(random);
  test_counts(random);
  for_each_type([&]<class T>() { test_nan_is_counted_and_ranks_first<T>(random); });
  test_levels_of_sums(random);
  std::puts("patterns: the kernels agree with naive loops");
}
