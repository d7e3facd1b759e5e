// The CPU selection against a stable sort: every dtype, instruction set and thread count, hard inputs, many layers at once.
#include "cpu/select.h"

#include "cpu_cases.h"

using namespace cases;

template <class T>
struct Case {
  std::string what;
  std::vector<BitsOf<T>> scores, weight, masked;
  int64_t kept;
};

template <class T>
Case<T> make_case(const std::string& what, const std::vector<double>& scores, int64_t kept) {
  const auto n = static_cast<int64_t>(scores.size());
  return {what + ", n " + std::to_string(n) + ", kept " + std::to_string(kept), stored<T>(scores), stored<T>(normal(n, 7)),
          std::vector<BitsOf<T>>(n, BitsOf<T>{0x55}), kept};
}

template <class T>
void expect_right(std::vector<Case<T>>& all, const Machine& machine) {
  std::vector<SelectLayer<T>> layers;
  for (auto& c : all) layers.push_back({c.scores.data(), c.weight.data(), c.masked.data(), static_cast<int64_t>(c.scores.size()), c.kept});
  std::vector<int64_t> cuts(all.size() * kCutColumns, -1);
  select(machine, layers, cuts.data());
  for (size_t l = 0; l < all.size(); ++l) {
    const Case<T>& c = all[l];
    const std::string what = name<T>() + ", isa " + std::to_string(static_cast<int>(machine.isa)) + ", " + c.what;
    const Selected expected = oracle_select<T>(c.scores, c.kept);
    const int64_t* row = &cuts[l * kCutColumns];
    EXPECT(row[kKey] == expected.key, "%s: key %lld, not %lld", what.c_str(), static_cast<long long>(row[kKey]), static_cast<long long>(expected.key));
    EXPECT(row[kIndex] == expected.index, "%s: index %lld, not %lld", what.c_str(), static_cast<long long>(row[kIndex]), static_cast<long long>(expected.index));
    EXPECT(row[kNans] == expected.nans && row[kFlips] == 0 && row[kSigns] == 0, "%s: counts", what.c_str());
    for (size_t i = 0; i < c.scores.size(); ++i) {
      EXPECT(c.masked[i] == (expected.mask[i] ? c.weight[i] : 0), "%s: element %zu", what.c_str(), i);
    }
  }
}

// Scores that are large only where the sample does not look, or only where it does.
template <class T>
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
  for (Isa isa : instruction_sets()) {
    // One layer at a time: sizes around vectors, blocks, chunks and units.
    for (int64_t n : {0, 1, 2, 3, 16, 17, 65, 257, 4097, 16385}) {
      for (const auto& [what, scores] : hard_scores(n, n + 1)) {
        for (int64_t kept : hard_counts(n)) {
          std::vector<Case<T>> one = {make_case<T>(what, scores, kept)};
          expect_right(one, machine(isa, 2));
        }
      }
    }
    for (int64_t n : {20000, 40000}) {
      for (bool looks_large : {false, true}) {
        for (int64_t kept : hard_counts(n)) {
          std::vector<Case<T>> one = {make_case<T>("hostile to the sample", hostile<T>(n, looks_large), kept)};
          expect_right(one, machine(isa, 2));
        }
      }
    }
    // Many layers of all sizes in one call, in several batches.
    for (int threads : {1, 2, 5}) {
      std::vector<Case<T>> many;
      for (int64_t i = 0; i < 40; ++i) many.push_back(make_case<T>("one of many", normal(i * i * 17, i), i * i));
      for (const auto& [what, scores] : hard_scores(33333, 3)) many.push_back(make_case<T>(what, scores, 3333));
      expect_right(many, machine(isa, threads));
    }
  }
}

int main() {
  for_each_type([&]<class T>() { test_dtype<T>(); });
}
