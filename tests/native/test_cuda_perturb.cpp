// perturb.cu on the emulated grid against an oracle that stores s + z and sorts: masks, cuts, flips, signs and scales bit for bit.
#include "cuda/perturb.cu"

#include "cuda_cases.h"

using namespace cases;
namespace kernels = s2ap::cuda;

template <class T>
struct Problem {
  std::vector<std::vector<T>> scores, grads, weights;
  std::vector<int64_t> kept;
  std::vector<double> gammas;
  double gamma = 0.05, eps = 1e-12;  // gamma: of the layers to come, each third of them as it is

  void add(std::vector<T> s, std::vector<T> g, int64_t count, Random& random) {
    weights.push_back(numbers<T>(0, static_cast<int64_t>(s.size()), random));
    scores.push_back(std::move(s));
    grads.push_back(std::move(g));
    gammas.push_back(gamma * (gammas.size() % 3 + 1));
    kept.push_back(count);
  }
};

template <class T>
double oracle_scale(const std::vector<T>& s, const std::vector<T>& g, double gamma, double eps) {
  double norm_g = norm(g);
  if (gamma == 0 || norm_g == 0) return 0;
  double scale = gamma * norm(s) / (norm_g + eps);
  return static_cast<Wide<T>>(scale);
}

template <class T>
int sign(T x) {
  return (value(x) > 0) - (value(x) < 0);
}

template <class T>
void check(const Problem<T>& problem, GridSize size, uint64_t seed, bool cooperative, bool same_cuts, const std::string& what) {
  size_t layers = problem.scores.size();
  std::vector<std::vector<T>> masked = problem.weights;
  std::vector<int64_t> cuts_now, new_cuts(layers * 5, -1);
  for (size_t l = 0; l < layers; ++l) {
    CutRow row = cut(problem.scores[l], problem.kept[l]);
    cuts_now.insert(cuts_now.end(), row.column, row.column + 5);
  }
  std::vector<int64_t> cuts_before = cuts_now;
  std::vector<double> scales(layers, -1);
  kernels::PerturbArgs<T> args;
  for (size_t l = 0; l < layers; ++l) {
    args.selection.table.push({problem.scores[l].data(), problem.grads[l].data(), problem.weights[l].data(), masked[l].data(),
                               static_cast<int64_t>(problem.scores[l].size())});
  }
  std::vector<int64_t>& cuts = same_cuts ? cuts_now : new_cuts;
  args.selection.kept = problem.kept.data();
  args.selection.cuts = cuts.data();
  args.cuts_now = cuts_now.data();
  args.gammas = problem.gammas.data();
  args.eps = problem.eps;
  args.scales = scales.data();
  args.squares = nullptr;
  args.straight_through = false;
  args.plan();
  Workspace workspace;
  kernels::for_each_array(args, workspace);
  if (cooperative) {
    emulated::launch(size.blocks, size.threads, seed,
                     [&](const emulated::Grid& grid) { kernels::perturb_phases(grid, args, 0, args.phases()); });
  } else {
    for (int phase = 0; phase < args.phases(); ++phase) {
      emulated::launch(size.blocks, size.threads, seed + phase,
                       [&](const emulated::Grid& grid) { kernels::perturb_phases(grid, args, phase, phase + 1); });
    }
  }
  for (size_t l = 0; !kOnlySharing && l < layers; ++l) {
    const std::vector<T>&s = problem.scores[l], &g = problem.grads[l];
    int64_t n = static_cast<int64_t>(s.size());
    double scale = oracle_scale(s, g, problem.gammas[l], problem.eps);
    EXPECT(same_bits(scales[l], scale), "%s %s, layer %zu, n %lld: scale %.17g, got %.17g", kName<T>, what.c_str(), l, (long long)n, scale,
           scales[l]);
    std::vector<T> moved(n);
    for (int64_t i = 0; i < n; ++i) {
      Wide<T> z = static_cast<Wide<T>>(value(g[i])) * static_cast<Wide<T>>(scale);
      moved[i] = make<T>(static_cast<Wide<T>>(value(s[i])) + z);
    }
    CutRow row = cut(moved, problem.kept[l]);
    std::vector<uint8_t> before = mask_of_keys(keys_of(s), &cuts_before[l * 5]), after = mask_of_keys(keys_of(moved), row.column);
    for (int64_t i = 0; i < n; ++i) {
      row.column[3] += before[i] != after[i];
      row.column[4] += sign(moved[i]) != sign(s[i]);
    }
    for (int column = 0; column < 5; ++column) {
      EXPECT(cuts[l * 5 + column] == row.column[column], "%s %s, layer %zu, n %lld, kept %lld, column %d: %lld, got %lld; grid %u x %u",
             kName<T>, what.c_str(), l, (long long)n, (long long)problem.kept[l], column, (long long)row.column[column],
             (long long)cuts[l * 5 + column], size.blocks, size.threads);
    }
    size_t wrong = first_difference(masked[l], cases::masked(after, problem.weights[l]));
    EXPECT(wrong == masked[l].size(), "%s %s, layer %zu, element %zu of %lld", kName<T>, what.c_str(), l, wrong, (long long)n);
  }
}

template <class T>
void test_kinds(Random& random) {
  const int64_t sizes[] = {1, 33, 4095, 4096, 4097, 9001};
  for (int kind = 0; kind < kKindCount; ++kind) {
    if (kKinds[kind] == std::string("huge")) continue;  // infinite norms; the next test has those
    Problem<T> problem;
    int layer = 0;
    for (int64_t n : sizes) {
      std::vector<T> grads = numbers<T>(layer++ % 2 ? 0 : kind, n, random);
      problem.add(numbers<T>(kind, n, random), std::move(grads), some_count(n, random), random);
    }
    check(problem, kGrids[kind % kGridCount], random(), kind % 3 != 2, kind % 2 == 1, kKinds[kind]);
  }
}

// Norms that are 0, infinite or NaN, and the scale that follows.
void test_edges(Random& random) {
  auto constant = [](int64_t n, float x) { return std::vector<float>(n, x); };
  Problem<float> problem;
  problem.add(numbers<float>(0, 100, random), constant(100, 0), 50, random);  // g = 0: z = 0
  problem.add(constant(100, 0), numbers<float>(0, 100, random), 50, random);  // s = 0: z = 0
  problem.add({}, {}, 0, random);                                             // empty
  problem.add(constant(5000, 3e38f), constant(5000, 1e-30f), 2500, random);   // the scale overflows float32
  problem.add(numbers<float>(0, 100, random), constant(100, -0.0f), 30, random);
  check(problem, kGrids[1], 3, true, false, "edges");
  problem.gammas = {0, 0, 0, 0, 0};
  problem.scores.back()[7] = std::numeric_limits<float>::infinity();  // whose norm times 0 is no number
  check(problem, kGrids[2], 4, true, false, "gamma 0");
  problem.gammas = {0.3, -0.3, 0.3, 0, 0.6};
  problem.eps = 10;
  check(problem, kGrids[3], 5, true, false, "large eps");
}

// Scores that cross the cut and zero in numbers, also among ties.
template <class T>
void test_flips(Random& random) {
  Problem<T> problem;
  problem.gamma = 2;
  for (int kind : {0, 1, 3, 5, 10}) problem.add(numbers<T>(kind, 5000, random), numbers<T>(kind == 1 ? 3 : 0, 5000, random), 2000, random);
  check(problem, kGrids[3], 6, true, false, "flips");
}

// Large layers, perturbed a little, so that the new cuts are in the brackets around the old ones, and by half, so that they are not.
template <class T>
void test_layers_with_a_bracket(Random& random) {
  const int64_t n = 8 * kernels::kSample + 777;
  for (double gamma : {1e-3, 0.5}) {
    Problem<T> problem;
    problem.gamma = gamma;
    problem.add(numbers<T>(0, n, random), numbers<T>(0, n, random), n / 10, random);
    problem.add(numbers<T>(1, 5000, random), numbers<T>(0, 5000, random), 500, random);
    problem.add(numbers<T>(1, n, random), numbers<T>(3, n, random), n / 2, random);
    check(problem, {3, 64}, random(), true, true, "brackets");
    check(problem, {5, 32}, random(), false, false, "brackets");
  }
}

void test_every_grid_and_schedule(Random& random) {
  Problem<float> problem;
  problem.gamma = 0.5;
  for (int64_t n : {0, 3, 5000, 0, 1, 8192, 130}) {
    std::vector<float> grads = numbers<float>(3, n, random);
    problem.add(numbers<float>(1, n, random), std::move(grads), some_count(n, random), random);
  }
  for (GridSize size : kGrids) {
    for (uint64_t seed = 0; seed < 3; ++seed) check(problem, size, seed, true, false, "few values");
  }
}

// The sums of a layer of 40 million elements, from its chunks' sums on: two levels above them.
void test_levels_of_sums(Random& random) {
  kernels::PerturbArgs<float> args;
  auto& table = args.selection.table;
  for (int64_t n : {40000000, 0, 4096, 17000000}) table.push({nullptr, nullptr, nullptr, nullptr, n});
  args.sums.levels = kernels::sum_levels(table);
  EXPECT(args.sums.levels == 3, "got %d", args.sums.levels);
  Workspace workspace;
  for (double*& level : args.sums.level) workspace(level, 2 * table.chunks());
  std::vector<double> partial(2 * table.chunks());
  for (double& x : partial) x = std::exp(std::normal_distribution<double>()(random));
  std::copy(partial.begin(), partial.end(), args.sums.level[0]);
  emulated::launch(3, 64, 1, [&](const emulated::Grid& grid) {
    for (int level = 1; level < args.sums.levels; ++level) {
      if (level > 1) grid.grid_barrier();
      kernels::sum_again(grid, table, args.sums, level);
    }
  });
  for (int layer = 0; layer < table.layers; ++layer) {
    for (int quantity = 0; quantity < 2; ++quantity) {
      auto begin = partial.begin() + quantity * table.chunks();
      double expected = pinned_sum({begin + table.first_chunk[layer], begin + table.first_chunk[layer + 1]});
      EXPECT(kernels::sum_of_squares(table, args.sums, layer, quantity) == expected, "layer %d, quantity %d", layer, quantity);
    }
  }
}

void test_the_workspace_is_small() {
  kernels::PerturbArgs<float> args;
  args.squares = nullptr;
  double share = share_of_workspace<float>(args);
  EXPECT(share < 0.02, "%g of the scores' bytes", share);
  std::printf("workspace: %.2f %% of the scores' bytes\n", 100 * share);
}

int main() {
  Random random(2);
  for_each_type([&]<class T>() { test_kinds<T>(random); });
  test_edges(random);
  for_each_type([&]<class T>() { test_flips<T>(random); });
  for_each_type([&]<class T>() { test_layers_with_a_bracket<T>(random); });
  test_every_grid_and_schedule(random);
  test_levels_of_sums(random);
  test_the_workspace_is_small();
  std::puts("perturb: the kernel agrees with the oracle");
}
