// The CPU selection against a sort: every dtype, instruction set and thread count, hard inputs, many layers at once.
#include "cpu/select.h"

#include "cpu_cases.h"

using namespace cases;

template <class T>
struct Case {
  std::string what;
  std::vector<BitsOf<T>> scores, weight;
  int64_t kept;
  Outcome<T> expected;
};

template <class T>
Case<T> make_case(const std::string& what, const std::vector<double>& scores, int64_t kept) {
  const auto n = static_cast<int64_t>(scores.size());
  Case<T> c = {what + ", n " + std::to_string(n) + ", kept " + std::to_string(kept), stored<T>(scores), stored<T>(normal(n, 7)), kept, {}};
  c.expected = outcome<T>(oracle_select<T>(c.scores, kept), c.weight);
  return c;
}

template <class T>
void expect_right(const std::vector<Case<T>>& all, const std::vector<int>& threads) {
  for_each_machine(threads, [&](const Machine& machine) {
    auto masked = unwritten<T>(all);
    std::vector<SelectLayer<T>> layers;
    for (size_t l = 0; l < all.size(); ++l) {
      const Case<T>& c = all[l];
      layers.push_back({c.scores.data(), c.weight.data(), masked[l].data(), static_cast<int64_t>(c.scores.size()), c.kept});
    }
    std::vector<int64_t> cuts(all.size() * kCutColumns, -1);
    select(machine, layers, cuts.data());
    for (size_t l = 0; l < all.size(); ++l) expect_outcome(all[l].expected, &cuts[l * kCutColumns], masked[l], machine, all[l].what);
  });
}

// Scores that are large only where the sample does not look, or only where it does.
std::vector<double> hostile(int64_t n, bool looks_large) {
  std::vector<double> scores = normal(n, 11, 0.01);
  for (double& s : scores) s = std::abs(s) + (looks_large ? 0 : 10);
  const SamplePlan plan(n);
  for (int64_t i = 0; i < plan.runs; ++i) {
    for (int64_t j = 0; j < SamplePlan::kRun; ++j) scores[plan.begin(i) + j] += looks_large ? 10 : -9.9;
  }
  return scores;
}

template <class T>
void test_dtype() {
  // One layer at a time: sizes around vectors, blocks, chunks and units.
  for (int64_t n : {0, 1, 2, 3, 16, 17, 65, 257, 4097, 16385}) {
    if (stays_on_one_thread(n)) continue;
    for (const auto& [what, scores] : hard_scores(n, n + 1)) {
      for (int64_t kept : hard_counts(n)) expect_right<T>({make_case<T>(what, scores, kept)}, {2});
    }
  }
  for (int64_t n : {20000, 40000}) {
    if (stays_on_one_thread(n)) continue;
    for (bool looks_large : {false, true}) {
      for (int64_t kept : hard_counts(n)) expect_right<T>({make_case<T>("hostile to the sample", hostile(n, looks_large), kept)}, {2});
    }
  }
  // Many layers of all sizes in one call, in several batches.
  std::vector<Case<T>> many;
  for (int64_t i = 0; i < 40; ++i) many.push_back(make_case<T>("one of many", normal(i * i * 17, i), i * i));
  for (const auto& [what, scores] : hard_scores(33333, 3)) many.push_back(make_case<T>(what, scores, 3333));
  expect_right(many, {1, 2, 5});
}

int main() {
  for_each_type([&]<class T>() { test_dtype<T>(); });
}
