// update_select.cu on the emulated grid against SGD, a sort and sums written down element by element: scores, momentum, masks, cuts, flips
// and sums of squares bit for bit, for plain layers and patterns.
#include "cuda/update_select.cu"

#include "step_cases.h"

using namespace cases;
namespace kernels = s2ap::cuda;

struct How {
  bool straight_through = false, ascent = false, same_cuts = false, cooperative = true;
};

template <class T>
struct Problem {
  std::vector<std::vector<T>> scores, grads, ascent, buffers, weights;
  std::vector<double> scales;
  std::vector<Pattern> patterns;
  std::vector<int64_t> kept;

  void add(int kind, int64_t n, const Pattern& pattern, int64_t count, Random& random) {
    scores.push_back(numbers<T>(kind, n, random));
    grads.push_back(numbers<T>(0, n, random));
    ascent.push_back(numbers<T>(0, n, random));
    buffers.push_back(numbers<T>(5, n, random));
    weights.push_back(numbers<T>(0, n, random));
    scales.push_back(static_cast<float>(static_cast<double>(random() % 1000) / 500));
    patterns.push_back(pattern);
    kept.push_back(count);
  }
};

template <class T>
void check(const Problem<T>& problem, const Settings& settings, GridSize size, uint64_t seed, const How& how, const std::string& what) {
  size_t layers = problem.scores.size();
  bool has_momentum = settings.momentum != 0;
  auto scores = problem.scores, buffers = problem.buffers, masked = problem.weights;
  std::vector<int64_t> cuts_now, new_cuts(layers * 5, -1);
  for (size_t l = 0; l < layers; ++l) {
    // The count changes as well: one more stayed before.
    int64_t before = std::min(problem.kept[l] + 1, most_kept(problem.patterns[l], static_cast<int64_t>(scores[l].size())));
    CutRow row = cut(problem.scores[l], before, problem.patterns[l]);
    cuts_now.insert(cuts_now.end(), row.column, row.column + 5);
  }
  std::vector<int64_t> cuts_before = cuts_now;
  std::vector<int64_t>& cuts = how.same_cuts ? cuts_now : new_cuts;
  std::vector<double> squares(layers, -1);
  kernels::UpdateSelectArgs<T> args;
  for (size_t l = 0; l < layers; ++l) {
    args.steps[l] = {scores[l].data(), has_momentum ? buffers[l].data() : nullptr, how.ascent ? problem.ascent[l].data() : nullptr};
    args.selection.table.push({scores[l].data(), problem.grads[l].data(), problem.weights[l].data(), masked[l].data(),
                               static_cast<int64_t>(scores[l].size()), problem.patterns[l]});
  }
  args.selection.kept = problem.kept.data();
  args.selection.cuts = cuts.data();
  args.sgd = kernels::Sgd<T>::of(settings.lr, settings.momentum, settings.dampening, settings.weight_decay, settings.nesterov);
  args.straight_through = how.straight_through;
  args.scales = how.ascent ? problem.scales.data() : nullptr;
  args.cuts_now = cuts_now.data();
  args.squares = squares.data();
  args.plan();
  Workspace workspace;
  kernels::for_each_array(args, workspace);
  if (how.cooperative) {
    emulated::launch(size.blocks, size.threads, seed,
                     [&](const emulated::Grid& grid) { kernels::update_select_phases(grid, args, 0, args.phases()); });
  } else {
    for (int phase = 0; phase < args.phases(); ++phase) {
      emulated::launch(size.blocks, size.threads, seed + phase,
                       [&](const emulated::Grid& grid) { kernels::update_select_phases(grid, args, phase, phase + 1); });
    }
  }
  for (size_t l = 0; !kOnlySharing && l < layers; ++l) {
    const Pattern& pattern = problem.patterns[l];
    std::vector<T> s = problem.scores[l], buffer = problem.buffers[l];
    std::vector<double> terms(s.size());
    for (size_t i = 0; i < s.size(); ++i) {
      T grad = problem.grads[l][i], weight = problem.weights[l][i], at = s[i];
      if (how.ascent) at = cases::perturbed(s[i], cases::score_grad(problem.ascent[l][i], weight, s[i]), problem.scales[l]);
      if (how.straight_through) grad = cases::score_grad(grad, weight, at);
      sgd(settings, s[i], grad, buffer[i]);
      terms[i] = value(s[i]) * value(s[i]);
    }
    size_t wrong = first_difference(scores[l], s);
    EXPECT(wrong == s.size(), "%s %s, layer %zu, element %zu: score %g, got %g", kName<T>, what.c_str(), l, wrong, value(s[wrong]),
           value(scores[l][wrong]));
    wrong = first_difference(buffers[l], buffer);
    EXPECT(wrong == s.size(), "%s %s, layer %zu, element %zu: momentum %g, got %g", kName<T>, what.c_str(), l, wrong, value(buffer[wrong]),
           value(buffers[l][wrong]));
    double square = pinned_sum(terms);
    EXPECT(same_bits(squares[l], square), "%s %s, layer %zu of %zu: square %.17g, got %.17g", kName<T>, what.c_str(), l, s.size(), square,
           squares[l]);
    CutRow row = cut(s, problem.kept[l], pattern);
    std::vector<uint8_t> before = mask(problem.scores[l], &cuts_before[l * 5], pattern), after = mask(s, row.column, pattern);
    for (size_t i = 0; i < s.size(); ++i) row.column[3] += before[i] != after[i];
    for (int column = 0; column < 5; ++column) {
      EXPECT(cuts[l * 5 + column] == row.column[column], "%s %s, layer %zu (%d, %d * %d of %zu), kept %lld, column %d: %lld, got %lld",
             kName<T>, what.c_str(), l, (int)pattern.kind, (int)pattern.size, (int)pattern.block, s.size(), (long long)problem.kept[l],
             column, (long long)row.column[column], (long long)cuts[l * 5 + column]);
    }
    wrong = first_difference(masked[l], cases::masked(after, problem.weights[l]));
    EXPECT(wrong == s.size(), "%s %s, layer %zu (%d, %d * %d), element %zu of %zu", kName<T>, what.c_str(), l, (int)pattern.kind,
           (int)pattern.size, (int)pattern.block, wrong, s.size());
  }
}

const Settings kSettings[] = {{0.1, 0, 0, 0, false},        {0.1, 0.9, 0, 0, false},   {0.1, 0.9, 0, 5e-4, false},
                              {0.1, 0.9, 0.3, 5e-4, false}, {0.1, 0.9, 0, 5e-4, true}, {0, 0.9, 0, 0, true}};
constexpr int kSettingsCount = static_cast<int>(sizeof kSettings / sizeof *kSettings);

// Every kind of scores with a step of every sort; plain layers and patterns by turns, since patterns add a phase.
template <class T>
void test_kinds(Random& random) {
  const int64_t sizes[] = {1, 33, 0, 4095, 4096, 4097, 9001};
  for (int kind = 0; kind < kKindCount; ++kind) {
    if (kKinds[kind] == std::string("huge")) continue;  // infinity - infinity makes NaN, whose keys are anyone's
    Problem<T> problem;
    for (int64_t n : sizes) problem.add(kind, n, {}, some_count(n, random), random);
    for (int i = kind % 2 ? 0 : kPatternCaseCount; i < kPatternCaseCount; ++i) {
      const PatternCase& c = kPatternCases[i];
      problem.add(kind, c.n, c.pattern, some_count(most_kept(c.pattern, c.n), random), random);
    }
    How how{kind % 3 != 0, kind % 3 == 2, kind % 4 < 2, kind % 5 != 4};
    check(problem, kSettings[kind % kSettingsCount], kGrids[kind % kGridCount], random(), how, kKinds[kind]);
  }
}

// Scores that cross the cut and zero in numbers, also among ties.
template <class T>
void test_flips(Random& random) {
  for (How how : {How{}, How{true, false}, How{true, true}}) {
    Problem<T> problem;
    for (int kind : {0, 1, 3, 5, 10}) problem.add(kind, 5000, {}, 2000, random);
    problem.add(1, 4000, {s2ap::kWindow, 4, 1}, 2, random);
    problem.add(1, 4000, {s2ap::kGroup, 40, 20}, 20, random);
    check(problem, {0.7, 0.9, 0, 0, false}, kGrids[3], random(), how, "flips");
    check(problem, {0, 0, 0, 0, false}, kGrids[4], random(), how, "no step");
  }
}

// Large layers, with a pattern beside them or not: without, passes may be left out. After a small step the new cuts are in the brackets
// around the old ones, after a large one not.
template <class T>
void test_layers_with_a_bracket(Random& random) {
  const int64_t n = 8 * kernels::kSample + 777;
  for (bool patterned : {false, true}) {
    Problem<T> problem;
    problem.add(0, n, {}, n / 10, random);
    problem.add(10, 5000, {}, 500, random);
    problem.add(3, n, {}, n / 2, random);
    if (patterned) problem.add(0, 4000, {s2ap::kWindow, 4, 1}, 2, random);
    check(problem, {1e-3, 0, 0, 0, false}, {2, 96}, random(), {false, false, !patterned, patterned}, "brackets");
    check(problem, kSettings[2], {3, 64}, random(), {true, true, patterned, !patterned}, "brackets");
  }
}

void test_every_grid_and_schedule(Random& random) {
  Problem<float> problem;
  for (int64_t n : {0, 3, 5000, 0, 1, 8192, 130}) problem.add(1, n, {}, some_count(n, random), random);
  for (const PatternCase& c : kPatternCases) problem.add(1, c.n, c.pattern, some_count(most_kept(c.pattern, c.n), random), random);
  for (GridSize size : kGrids) {
    for (uint64_t seed = 0; seed < 2; ++seed) check(problem, kSettings[3], size, seed, {true, true, seed == 1}, "few values");
  }
}

// As many layers as a launch takes; its arguments then still fit what CUDA passes by value.
void test_as_many_layers_as_a_launch_takes(Random& random) {
  static_assert(sizeof(kernels::UpdateSelectArgs<double>) + 2 * sizeof(int) <= 32764);
  Problem<float> problem;
  for (int layer = 0; layer < kernels::kMaxLayers; ++layer) {
    int64_t n = static_cast<int64_t>(random() % 9);
    problem.add(1, n, {}, some_count(n, random), random);
  }
  check(problem, kSettings[2], {3, 64}, 1, {true, true}, "many layers");
}

void test_the_workspace_is_small() {
  kernels::UpdateSelectArgs<float> args;
  double share = share_of_workspace<float>(args);
  EXPECT(share < 0.05, "%g of the scores' bytes", share);
  std::printf("workspace: %.2f %% of the scores' bytes\n", 100 * share);
}

int main() {
  Random random(5);
  for_each_type([&]<class T>() { test_kinds<T>(random); });
  for_each_type([&]<class T>() { test_flips<T>(random); });
  for_each_type([&]<class T>() { test_layers_with_a_bracket<T>(random); });
  test_every_grid_and_schedule(random);
  test_as_many_layers_as_a_launch_takes(random);
  test_the_workspace_is_small();
  std::puts("update_select: the kernel agrees with the oracle");
}
