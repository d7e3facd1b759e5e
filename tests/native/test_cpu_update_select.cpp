// The CPU update_select against the update followed by a stable sort; flips counted one by one, sums in the specified order.
#include "cpu/update_select.h"

#include "cpu_cases.h"

using namespace cases;

template <class T>
struct Case {
  using Tensor = std::vector<BitsOf<T>>;
  std::string what;
  Tensor scores, grad, ascent_grad, buffer, weight, masked;
  double scale;
  int64_t kept;
};

template <class T>
Case<T> make_case(const std::string& what, const std::vector<double>& scores, int64_t kept) {
  const auto n = static_cast<int64_t>(scores.size());
  const auto random = [&](uint64_t seed) { return stored<T>(normal(n, seed + n)); };
  return {what + ", n " + std::to_string(n) + ", kept " + std::to_string(kept), stored<T>(scores), random(1), random(2), random(3), random(4),
          random(5), 0.75, kept};
}

enum class Gradient { kGiven, kFormed, kFormedAscended };

template <class T>
void expect_right(std::vector<Case<T>> all, const SgdParameters& sgd, Gradient gradient, const Machine& machine) {
  std::vector<UpdateSelectLayer<T>> layers;
  std::vector<int64_t> cuts, new_cuts(all.size() * kCutColumns, -1);
  std::vector<double> scales, sums(all.size(), -1);
  std::vector<Selected> before;
  std::vector<Case<T>> expected = all;
  for (size_t l = 0; l < all.size(); ++l) {
    Case<T>& c = all[l];
    const auto n = static_cast<int64_t>(c.scores.size());
    const bool ascended = gradient == Gradient::kFormedAscended;
    layers.push_back({{c.scores.data(), c.grad.data(), sgd.momentum != 0 ? c.buffer.data() : nullptr, n},
                      ascended ? c.ascent_grad.data() : nullptr, c.weight.data(), c.masked.data(), c.kept});
    before.push_back(oracle_select<T>(c.scores, c.kept));
    cuts.insert(cuts.end(), {before.back().key, before.back().index, 0, 0, 0});
    scales.push_back(c.scale);

    Case<T>& e = expected[l];
    std::vector<BitsOf<T>> at = e.scores;
    if (ascended) {
      const auto first = oracle_score_grad<T>(e.ascent_grad, e.weight, e.scores);
      for (size_t i = 0; i < at.size(); ++i) {
        const ComputeOf<T> z = Element<T>::widen(first[i]) * static_cast<ComputeOf<T>>(e.scale);
        at[i] = Element<T>::narrow(Element<T>::widen(e.scores[i]) + z);
      }
    }
    if (gradient != Gradient::kGiven) e.grad = oracle_score_grad<T>(e.grad, e.weight, at);
    update<T>(machine, {{e.scores.data(), e.grad.data(), sgd.momentum != 0 ? e.buffer.data() : nullptr, n}}, sgd, true);
  }
  update_select(machine, layers, {sgd, true, gradient != Gradient::kGiven, scales.data()}, cuts.data(), new_cuts.data(), sums.data());
  for (size_t l = 0; l < all.size(); ++l) {
    const Case<T>&c = all[l], &e = expected[l];
    const std::string what = name<T>() + ", isa " + std::to_string(static_cast<int>(machine.isa)) + ", " + c.what;
    EXPECT(c.scores == e.scores && c.buffer == e.buffer, "%s: the step", what.c_str());
    const Selected after = oracle_select<T>(e.scores, c.kept);
    int64_t flips = 0;
    for (size_t i = 0; i < c.scores.size(); ++i) {
      EXPECT(c.masked[i] == (after.mask[i] ? c.weight[i] : 0), "%s: element %zu", what.c_str(), i);
      flips += after.mask[i] != before[l].mask[i];
    }
    const int64_t* row = &new_cuts[l * kCutColumns];
    EXPECT(row[kKey] == after.key && row[kIndex] == after.index && row[kNans] == after.nans && row[kSigns] == 0, "%s: cut", what.c_str());
    EXPECT(row[kFlips] == flips, "%s: %lld flips, not %lld", what.c_str(), static_cast<long long>(row[kFlips]), static_cast<long long>(flips));
    const double sum = oracle_sum(squares<T>(e.scores));
    EXPECT(sums[l] == sum || (std::isnan(sum) && std::isnan(sums[l])), "%s: sum of squares %a, not %a", what.c_str(), sums[l], sum);
  }
}

template <class T>
void test_dtype() {
  const SgdParameters none = {0.1, 0, 0, 0, false}, all = {0.1, 0.9, 0.1, 5e-4, false}, frozen = {0, 0.9, 0, 0, false};
  for (Isa isa : instruction_sets()) {
    for (int64_t n : {0, 1, 2, 17, 4097, 33001}) {
      for (const auto& [what, scores] : hard_scores(n, n + 1)) {
        for (int64_t kept : hard_counts(n)) {
          expect_right<T>({make_case<T>(what, scores, kept)}, n % 2 ? all : none, static_cast<Gradient>(kept % 3), machine(isa, 2));
        }
        expect_right<T>({make_case<T>(what + ", no step", scores, n / 3)}, frozen, Gradient::kGiven, machine(isa, 2));
      }
    }
    for (int threads : {1, 2, 5}) {
      std::vector<Case<T>> many;
      for (int64_t i = 0; i < 30; ++i) many.push_back(make_case<T>("one of many", normal(i * i * 29, i), 3 * i * i));
      expect_right(many, all, Gradient::kFormedAscended, machine(isa, threads));
    }
  }
}

int main() {
  for_each_type([&]<class T>() { test_dtype<T>(); });
}
