// The brackets of selection.cuh on the emulated grid, from a sample and around a cut that is known: that ordinary layers take them and read
// each score once, that whatever misleads them or overflows a list costs reads and never a bit, on many grids and schedules, in one
// cooperative launch and phase by phase.
#include <atomic>
#include <optional>

#include "cuda/selection.cuh"
#include "cuda_cases.h"

using namespace cases;
namespace kernels = s2ap::cuda;

// Scores as they are, and how often they were read.
template <class T>
struct CountingReader {
  using Raw = T;
  static constexpr bool kFlips = false, kNotes = false;
  const T* scores;
  std::atomic<int64_t>* reads;

  Raw load(int64_t i) const {
    reads->fetch_add(1, std::memory_order_relaxed);
    return scores[i];
  }
  kernels::Compute<T> score(Raw raw) const { return kernels::widen(raw); }
  void tally(Raw, kernels::Compute<T>, kernels::Tally&) const {}
};

template <class T>
struct Args {
  kernels::Selection<T> selection;
  mutable std::atomic<int64_t> reads{0};

  CountingReader<T> reader(int layer) const { return {selection.table.rows[layer].scores, &reads}; }
};

// How a layer's search went.
struct Course {
  bool listed = false;  // its bracket held, and was not a single key
  int passes = 0;
  int64_t reads = 0, inside = 0;  // in elements
  int64_t overflows = 0;          // lists
};

// Selects in one layer and compares with the oracle. With a cut's key the bracket lies around it.
template <class T>
Course check(const std::vector<T>& scores, int64_t kept, GridSize size, uint64_t seed, bool cooperative, const std::string& what,
             std::optional<int64_t> known = {}) {
  Random random(seed);
  int64_t n = static_cast<int64_t>(scores.size());
  std::vector<T> weights = numbers<T>(0, n, random), masked = weights;
  std::vector<int64_t> row(5, -1);
  Args<T> args;
  auto& s = args.selection;
  s.table.push({scores.data(), nullptr, weights.data(), masked.data(), n, {}});
  s.kept = &kept;
  s.cuts = row.data();
  Workspace workspace;
  kernels::for_each_array(s, workspace);
  auto phases = [&](const emulated::Grid& grid, int first, int last) {
    auto& storage = grid.shared<kernels::SelectionStorage<T>>();
    kernels::run_phases(
        grid, first, last, [&](int phase) { return kernels::is_idle(s, phase - 1); },
        [&](int phase) {
          if (phase > 0) return kernels::selection_phase(grid, args, storage, phase - 1);
          kernels::prepare(grid, s);
          if (known) return kernels::guess_around(grid, s, [&](int) { return *known; });
          kernels::guess(grid, s, storage, [&](int layer) { return args.reader(layer); });
        });
  };
  const int all = 1 + kernels::kSelectionPhases<T>;
  for (int phase = 0; phase < (cooperative ? 1 : all); ++phase) {
    emulated::launch(size.blocks, size.threads, seed + phase,
                     [&](const emulated::Grid& grid) { phases(grid, phase, cooperative ? all : phase + 1); });
  }
  if (!kOnlySharing) {
    CutRow expected_row = cut(scores, kept);
    for (int column = 0; column < 5; ++column) {
      EXPECT(row[column] == expected_row.column[column], "%s %s, kept %lld of %lld, column %d: %lld, got %lld; grid %u x %u", kName<T>,
             what.c_str(), (long long)kept, (long long)n, column, (long long)expected_row.column[column], (long long)row[column],
             size.blocks, size.threads);
    }
    size_t wrong = first_difference(masked, cases::masked(mask_of_keys(keys_of(scores), expected_row.column), weights));
    EXPECT(wrong == masked.size(), "%s %s, element %zu", kName<T>, what.c_str(), wrong);
  }
  Course course;
  course.listed = kernels::progress(s, 0, kernels::kPasses<T>)->listed;
  course.passes = 2;
  while (course.passes < kernels::kPasses<T> && s.wanted[course.passes] != 0) ++course.passes;
  course.reads = args.reads;
  for (int64_t chunk = 0; chunk < s.table.chunks(); ++chunk) {
    course.inside += s.inside[chunk];
    course.overflows += course.listed && s.inside[chunk] > kernels::kListed;
  }
  return course;
}

// The reads that a search which goes as planned has beside one for each score: the sample, and two of the chunk with the tie.
constexpr int64_t kExtraReads = kernels::kSample + 2 * s2ap::kChunk;

template <class T>
void test_ordinary_layers_read_each_score_once(Random& random) {
  const int64_t n = 40000;
  for (double fraction : {0.1, 0.5, 0.01}) {
    std::vector<T> scores = numbers<T>(0, n, random);
    Course course = check(scores, static_cast<int64_t>(fraction * n), {3, 64}, random(), true, "normal");
    EXPECT(course.listed && course.overflows == 0, "%s, %g kept", kName<T>, fraction);
    EXPECT(course.inside < n / 12, "%s, %g kept: %lld inside", kName<T>, fraction, (long long)course.inside);
    EXPECT(sizeof(T) == 8 || course.passes <= 3, "%s, %g kept: %d passes", kName<T>, fraction, course.passes);
    // Half-precision scores have many ties, in many chunks.
    EXPECT(sizeof(T) == 2 || course.reads <= n + kExtraReads, "%s, %g kept: %lld reads", kName<T>, fraction, (long long)course.reads);
  }
}

void test_two_passes_are_enough_for_a_tenth(Random& random) {
  Course course = check(numbers<float>(0, 100000, random), 10000, {5, 128}, 1, true, "two passes");
  EXPECT(course.passes == 2, "got %d", course.passes);
  EXPECT(course.inside < 100000 / 20, "got %lld", (long long)course.inside);
}

// What is sampled is small, or large, or all of one kind: the bracket is somewhere else.
template <class T>
void test_a_misled_sample_costs_reads_only(Random& random) {
  const int64_t n = 40001, part = n / kernels::kSample;
  for (double at_sample : {0.0, 100.0}) {
    std::vector<T> scores = numbers<T>(0, n, random);
    for (int64_t i = 0; i < kernels::kSample; ++i) {
      uint32_t scattered = static_cast<uint32_t>(i) * 0x9e3779b9u;
      scores[i * n / kernels::kSample + static_cast<int64_t>(static_cast<uint64_t>(scattered) * part >> 32)] =
          make<T>(at_sample * (1 + i % 3));
    }
    Course course = check(scores, n / 2, {3, 64}, random(), at_sample != 0, "misled sample");
    EXPECT(!course.listed && course.reads > n * 3, "%s, %g: %lld reads", kName<T>, at_sample, (long long)course.reads);
  }
}

// A bracket of one key proves itself, and has nothing to list.
template <class T>
void test_equal_scores_are_read_twice(Random& random) {
  const int64_t n = 40960;
  Course course = check(numbers<T>(2, n, random), n / 2, {3, 64}, random(), true, "all equal");
  EXPECT(!course.listed && course.passes == 2, "%d passes", course.passes);
  EXPECT(course.reads <= 2 * n + kernels::kSample + 3 * n, "%lld reads", (long long)course.reads);  // the ties that go are looked at again
}

// They are guessed exactly, and so are done after the fewest passes; layers a bit larger are sampled.
template <class T>
void test_small_layers_are_their_own_sample(Random& random) {
  Course largest = check(numbers<T>(0, 49, random), 1, {2, 96}, random(), true, "one of 49");  // 49 * (1.0 / 49) < 1
  EXPECT(!largest.listed && largest.passes == 2, "%s, 1 of 49: %d passes", kName<T>, largest.passes);
  for (int kind = 0; kind < kKindCount; ++kind) {
    for (int64_t n : {int64_t{2}, int64_t{33}, int64_t{1000}, int64_t{kernels::kSample - 1}, int64_t{kernels::kSample}}) {
      const int64_t kept = 1 + static_cast<int64_t>(random() % static_cast<uint64_t>(n - 1));
      Course course = check(numbers<T>(kind, n, random), kept, kGrids[random() % kGridCount], random(), random() % 2 != 0, kKinds[kind]);
      EXPECT(!course.listed && course.passes == 2, "%s, %lld of %lld: %d passes", kName<T>, (long long)kept, (long long)n, course.passes);
    }
    const int64_t n = kernels::kSample + 1 + static_cast<int64_t>(random() % (2 * kernels::kSample));
    check(numbers<T>(kind, n, random), n / 10, kGrids[random() % kGridCount], random(), true, kKinds[kind]);
  }
}

// The cut of scores that differ by a hundredth from those that are ranked now.
template <class T>
void test_a_known_cut_saves_the_sample(Random& random) {
  const int64_t n = 40000;
  for (double fraction : {0.1, 0.5, 0.01}) {
    const int64_t kept = static_cast<int64_t>(fraction * n);
    std::vector<T> scores = numbers<T>(0, n, random), moved = scores;
    for (T& x : moved) x = make<T>(value(x) * 1.01);
    const int64_t known = cut(scores, kept).column[0];
    Course course = check(moved, kept, {3, 64}, random(), true, "known cut", known);
    EXPECT(course.listed && course.overflows == 0, "%s, %g kept", kName<T>, fraction);
    EXPECT(course.inside < n / 16, "%s, %g kept: %lld inside", kName<T>, fraction, (long long)course.inside);
    EXPECT(sizeof(T) == 8 || course.passes == 2, "%s, %g kept: %d passes", kName<T>, fraction, course.passes);
    EXPECT(sizeof(T) == 2 || course.reads <= n + 2 * s2ap::kChunk, "%s, %g kept: %lld reads", kName<T>, fraction, (long long)course.reads);
  }
}

// A cut of quite other scores, the cuts that no element has, and numbers that are no keys.
template <class T>
void test_a_wrong_cut_costs_reads_only(Random& random) {
  const int64_t largest = std::numeric_limits<int64_t>::max();
  const int64_t known[] = {0, 1, key(make<T>(1e-3)), key(make<T>(1e3)), key(make<T>(INFINITY)), s2ap::kKeepNone, largest - 1, -1, -largest};
  for (int64_t cut_key : known) {
    for (int64_t n : {int64_t{7}, int64_t{20001}}) {
      const int kind = static_cast<int>(random() % kKindCount);
      check(numbers<T>(kind, n, random), some_count(n, random), kGrids[random() % kGridCount], random(), random() % 2 != 0, kKinds[kind],
            cut_key);
    }
  }
  Course course = check(numbers<T>(0, 20000, random), 5000, {3, 64}, 1, true, "far cut", key(make<T>(1e3)));
  EXPECT(!course.listed && course.reads > 3 * 20000, "%s: %lld reads", kName<T>, (long long)course.reads);
}

// One chunk, and then one chunk after the other, of scores that are all inside the bracket.
template <class T>
void test_a_full_list_costs_its_chunk_only(Random& random) {
  const int64_t n = 65536;
  std::vector<T> scores = numbers<T>(0, n, random);
  for (int64_t i = 8192; i < 12288; ++i) scores[i] = make<T>(1.6449 + 1e-3 * static_cast<double>(i % 64));
  Course course = check(scores, n / 8, {3, 64}, random(), true, "full list");
  EXPECT(course.listed && course.overflows == 1, "%s: %lld overflows", kName<T>, (long long)course.overflows);
  course = check(numbers<T>(8, n, random), n / 3, {5, 64}, random(), false, "increasing");
  EXPECT(sizeof(T) == 2 || (course.listed && course.overflows > 0), "%s: %lld overflows", kName<T>, (long long)course.overflows);
}

// All inputs that are hard on something, in layers that are sampled.
template <class T>
void test_kinds(Random& random) {
  for (int kind = 0; kind < kKindCount; ++kind) {
    const int64_t n = 8 * kernels::kSample + static_cast<int64_t>(random() % 3000);
    const int64_t kept = random() % 2 ? n / 10 : some_count(n, random);
    check(numbers<T>(kind, n, random), kept, kGrids[random() % kGridCount], random(), random() % 3 != 0, kKinds[kind]);
  }
}

template <class T>
void test_counts_near_the_ends(Random& random) {
  const int64_t n = 8 * kernels::kSample;
  for (int64_t kept : {int64_t{1}, int64_t{100}, n - 100, n - 1}) {
    const int kind = random() % 2 ? 0 : 5;
    check(numbers<T>(kind, n, random), kept, {2, 96}, random(), true, std::string("few or many of ") + kKinds[kind]);
  }
}

template <class T>
void test_nan_ranks_first_and_is_counted(Random& random) {
  std::vector<T> scores = numbers<T>(0, 40000, random);
  for (int i = 0; i < 5000; ++i) scores[random() % scores.size()] = make<T>(NAN);
  for (int64_t kept : {1000, 20000}) check(scores, kept, {3, 64}, random(), true, "nan");
}

void test_every_grid_and_schedule(Random& random) {
  std::vector<float> scores = numbers<float>(0, 33000, random), few = numbers<float>(1, 33000, random);
  for (GridSize size : kGrids) {
    check(scores, 3300, size, 0, true, "normal");
    check(scores, 3300, size, 1, false, "normal");
    check(few, 9000, size, 2, true, "few values");
  }
}

void test_more_chunks_than_a_block_counts_at_once(Random& random) {
  Course course = check(numbers<float>(0, (kernels::kBatch + 3) * s2ap::kChunk - 5, random), 30000, {1, 64}, 1, true, "one block");
  EXPECT(course.listed && course.overflows == 0, "%lld overflows", (long long)course.overflows);
}

template <class T>
void test_all(Random& random) {
  test_ordinary_layers_read_each_score_once<T>(random);
  test_a_misled_sample_costs_reads_only<T>(random);
  test_a_known_cut_saves_the_sample<T>(random);
  test_a_wrong_cut_costs_reads_only<T>(random);
  test_equal_scores_are_read_twice<T>(random);
  test_small_layers_are_their_own_sample<T>(random);
  test_a_full_list_costs_its_chunk_only<T>(random);
  test_kinds<T>(random);
  test_counts_near_the_ends<T>(random);
  test_nan_ranks_first_and_is_counted<T>(random);
}

int main() {
  Random random(7);
  for_each_type([&]<class T>() { test_all<T>(random); });
  test_two_passes_are_enough_for_a_tenth(random);
  test_every_grid_and_schedule(random);
  test_more_chunks_than_a_block_counts_at_once(random);
  std::puts("bracket: taken where it holds, and never trusted");
}
