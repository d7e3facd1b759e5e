// select.cu on the emulated grid against a stable sort: all dtypes, many grids and schedules, in one cooperative launch and phase by phase,
// into memory that is aligned as the dtype is and no better.
#include "cuda/select.cu"

#include "cuda_cases.h"

using namespace cases;
namespace kernels = s2ap::cuda;

template <class T>
struct Problem {
  std::vector<std::vector<T>> scores, weights;
  std::vector<int64_t> kept;

  void add(std::vector<T> s, int64_t count, Random& random) {
    weights.push_back(numbers<T>(0, static_cast<int64_t>(s.size()), random));
    scores.push_back(std::move(s));
    kept.push_back(count);
  }
};

template <class T>
void check(const Problem<T>& problem, GridSize size, uint64_t seed, bool cooperative, bool odd, const std::string& what) {
  size_t layers = problem.scores.size();
  std::vector<std::vector<T>> masked(layers);
  for (size_t l = 0; l < layers; ++l) masked[l].assign(problem.scores[l].size() + odd, make<T>(-77));
  std::vector<int64_t> cuts(layers * 5, -1);
  kernels::SelectArgs<T> args;
  for (size_t l = 0; l < layers; ++l) {
    args.selection.table.push({problem.scores[l].data(), nullptr, problem.weights[l].data(), masked[l].data() + odd,
                               static_cast<int64_t>(problem.scores[l].size())});
  }
  args.selection.kept = problem.kept.data();
  args.selection.cuts = cuts.data();
  args.plan();
  Workspace workspace;
  kernels::for_each_array(args, workspace);
  if (cooperative) {
    emulated::launch(size.blocks, size.threads, seed,
                     [&](const emulated::Grid& grid) { kernels::select_phases(grid, args, 0, args.phases()); });
  } else {
    for (int phase = 0; phase < args.phases(); ++phase) {
      emulated::launch(size.blocks, size.threads, seed + phase,
                       [&](const emulated::Grid& grid) { kernels::select_phases(grid, args, phase, phase + 1); });
    }
  }
  for (size_t l = 0; !kOnlySharing && l < layers; ++l) {
    int64_t n = static_cast<int64_t>(problem.scores[l].size()), kept = std::clamp<int64_t>(problem.kept[l], 0, n);
    CutRow row = cut(problem.scores[l], kept);
    for (int column = 0; column < 5; ++column) {
      EXPECT(cuts[l * 5 + column] == row.column[column],
             "%s %s, layer %zu of %zu, n %lld, kept %lld, column %d: %lld, got %lld; grid %u x %u", kName<T>, what.c_str(), l, layers,
             (long long)n, (long long)kept, column, (long long)row.column[column], (long long)cuts[l * 5 + column], size.blocks,
             size.threads);
    }
    std::vector<uint8_t> stays = mask_of_keys(keys_of(problem.scores[l]), row.column);
    if (odd) {
      EXPECT(same_bits(masked[l][0], make<T>(-77)), "%s %s, layer %zu: the element in front", kName<T>, what.c_str(), l);
      masked[l].erase(masked[l].begin());
    }
    size_t wrong = first_difference(masked[l], cases::masked(stays, problem.weights[l]));
    EXPECT(wrong == masked[l].size(), "%s %s, layer %zu, element %zu of %lld", kName<T>, what.c_str(), l, wrong, (long long)n);
  }
}

template <class T>
void test_kinds(Random& random) {
  const int64_t sizes[] = {1, 2, 33, 100, 4095, 4096, 4097, 9001};
  for (int kind = 0; kind < kKindCount; ++kind) {
    Problem<T> problem;
    for (int64_t n : sizes) problem.add(numbers<T>(kind, n, random), some_count(n, random), random);
    check(problem, kGrids[kind % kGridCount], random(), kind % 3 != 2, kind % 2 == 1, kKinds[kind]);
  }
}

template <class T>
void test_many_small_cases(Random& random) {
  for (int round = 0; round < 12; ++round) {
    Problem<T> problem;
    for (int layer = 0; layer < 9; ++layer) {
      int64_t n = static_cast<int64_t>(random() % 70);
      problem.add(numbers<T>(static_cast<int>(random() % kKindCount), n, random), some_count(n, random), random);
    }
    check(problem, kGrids[round % kGridCount], random(), round % 2, false, "small");
  }
}

void test_every_grid_and_schedule(Random& random) {
  Problem<float> problem;
  for (int64_t n : {0, 3, 5000, 0, 1, 8192, 130}) problem.add(numbers<float>(1, n, random), some_count(n, random), random);
  for (GridSize size : kGrids) {
    for (uint64_t seed = 0; seed < 3; ++seed) check(problem, size, seed, true, false, "few values");
  }
}

void test_counts_out_of_range_are_clamped(Random& random) {
  Problem<float> problem;
  for (int64_t count : {-5, 11, 1 << 30}) problem.add(numbers<float>(0, 10, random), count, random);
  problem.kept.back() = std::numeric_limits<int64_t>::max();
  check(problem, kGrids[1], 1, true, false, "counts out of range");
}

template <class T>
void test_nan_is_counted(Random& random) {
  Problem<T> problem;
  for (int64_t count : {0, 7, 3000, 5000}) {
    std::vector<T> s = numbers<T>(0, 5000, random);
    for (int i = 0; i < 9; ++i) s[random() % s.size()] = make<T>(NAN);
    problem.add(s, count, random);
  }
  check(problem, kGrids[2], 1, true, false, "nan");
}

void test_as_many_layers_as_a_launch_takes(Random& random) {
  Problem<float> problem;
  for (int layer = 0; layer < kernels::kMaxLayers; ++layer) {
    int64_t n = static_cast<int64_t>(random() % 9);
    problem.add(numbers<float>(1, n, random), some_count(n, random), random);
  }
  check(problem, {3, 64}, 1, true, false, "many layers");
}

void test_one_long_layer(Random& random) {
  for (int kind : {0, 2, 11}) {
    Problem<float> problem;
    problem.add(numbers<float>(kind, 50000, random), 5000, random);
    check(problem, {7, 64}, 1, true, false, kKinds[kind]);
  }
}

void test_the_workspace_is_small() {
  kernels::SelectArgs<float> args;
  double share = share_of_workspace<float>(args);
  EXPECT(share < 0.02, "%g of the scores' bytes", share);
  std::printf("workspace: %.2f %% of the scores' bytes\n", 100 * share);
}

int main() {
  Random random(1);
  for_each_type([&]<class T>() { test_kinds<T>(random); });
  for_each_type([&]<class T>() { test_many_small_cases<T>(random); });
  test_every_grid_and_schedule(random);
  test_counts_out_of_range_are_clamped(random);
  for_each_type([&]<class T>() { test_nan_is_counted<T>(random); });
  test_as_many_layers_as_a_launch_takes(random);
  test_one_long_layer(random);
  test_the_workspace_is_small();
  std::puts("select: the kernel agrees with a stable sort");
}
