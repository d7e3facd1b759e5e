// The CPU update_select against the update followed by a sort; flips counted one by one, sums in the specified order.
#include "cpu/update_select.h"

#include "cpu_cases.h"

using namespace cases;

enum class Gradient { kGiven, kFormed, kFormedAscended };

template <class T>
struct Case {
  using Tensor = std::vector<BitsOf<T>>;
  std::string what;
  Tensor scores, grad, ascent_grad, buffer, weight;
  int64_t kept;
  Selected before;
  Tensor new_scores, new_buffer;
  double sum;
  Outcome<T> expected;
};

constexpr double kScale = 0.75;

template <class T>
Case<T> make_case(const std::string& what, const std::vector<double>& scores, int64_t kept, const SgdParameters& sgd, Gradient gradient) {
  const auto n = static_cast<int64_t>(scores.size());
  const auto random = [&](uint64_t seed) { return stored<T>(normal(n, seed)); };
  Case<T> c = {what + ", n " + std::to_string(n) + ", kept " + std::to_string(kept),
               stored<T>(scores),
               random(101),
               random(102),
               random(103),
               random(104),
               kept,
               oracle_select<T>(stored<T>(scores), kept),
               {},
               {},
               0,
               {}};
  std::vector<BitsOf<T>> at = c.scores, grad = c.grad;
  if (gradient == Gradient::kFormedAscended) {
    at = oracle_moved<T>(c.scores, oracle_score_grad<T>(c.ascent_grad, c.weight, c.scores), kScale);
  }
  if (gradient != Gradient::kGiven) grad = oracle_score_grad<T>(c.grad, c.weight, at);
  c.new_scores = c.scores;
  c.new_buffer = c.buffer;
  for (int64_t i = 0; i < n; ++i) {
    oracle_update<T>(c.new_scores[i], grad[i], sgd.momentum != 0 ? &c.new_buffer[i] : nullptr, sgd, true);
  }
  c.sum = oracle_sum_of_squares<T>(c.new_scores);
  const Selected after = oracle_select<T>(c.new_scores, kept);
  c.expected = outcome<T>(after, c.weight, count_flips(c.before, after));
  return c;
}

template <class T>
void expect_right(const std::vector<Case<T>>& all, const SgdParameters& sgd, Gradient gradient, const std::vector<int>& threads) {
  const std::vector<double> scales(all.size(), kScale);
  for_each_machine(threads, [&](const Machine& machine) {
    auto masked = unwritten<T>(all);
    std::vector<std::vector<BitsOf<T>>> scores, buffers;
    std::vector<UpdateSelectLayer<T>> layers;
    std::vector<int64_t> cuts, new_cuts(all.size() * kCutColumns, -1);
    std::vector<double> sums(all.size(), -1);
    for (size_t l = 0; l < all.size(); ++l) {
      const Case<T>& c = all[l];
      scores.push_back(c.scores);
      buffers.push_back(c.buffer);
      layers.push_back(
          {{scores[l].data(), c.grad.data(), sgd.momentum != 0 ? buffers[l].data() : nullptr, static_cast<int64_t>(c.scores.size())},
           gradient == Gradient::kFormedAscended ? c.ascent_grad.data() : nullptr,
           c.weight.data(),
           masked[l].data(),
           c.kept});
      cuts.insert(cuts.end(), {c.before.key, c.before.index, 0, 0, 0});
    }
    const UpdateSelect how = {sgd, true, gradient != Gradient::kGiven, scales.data()};
    update_select(machine, layers, how, cuts.data(), new_cuts.data(), sums.data());
    for (size_t l = 0; l < all.size(); ++l) {
      const Case<T>& c = all[l];
      EXPECT(scores[l] == c.new_scores && buffers[l] == c.new_buffer, "%s, isa %d, %s: the step", name<T>().c_str(),
             static_cast<int>(machine.isa), c.what.c_str());
      EXPECT(same_number(sums[l], c.sum), "%s, isa %d, %s: sum of squares %a, not %a", name<T>().c_str(), static_cast<int>(machine.isa),
             c.what.c_str(), sums[l], c.sum);
      expect_outcome(c.expected, &new_cuts[l * kCutColumns], masked[l], machine, c.what);
    }
  });
}

template <class T>
void test_dtype() {
  const SgdParameters none = {0.1, 0, 0, 0, false}, all = {0.1, 0.9, 0.1, 5e-4, false}, frozen = {0, 0.9, 0, 0, false};
  const auto test = [&](const std::string& what, const std::vector<double>& scores, int64_t kept, const SgdParameters& sgd, Gradient how) {
    expect_right<T>({make_case<T>(what, scores, kept, sgd, how)}, sgd, how, {2});
  };
  for (int64_t n : {0, 1, 2, 17, 4097, 33001}) {
    if (stays_on_one_thread(n)) continue;
    for (const auto& [what, scores] : hard_scores(n, n + 1)) {
      for (int64_t kept : hard_counts(n)) test(what, scores, kept, n % 2 ? all : none, static_cast<Gradient>(kept % 3));
      test(what + ", no step", scores, n / 3, frozen, Gradient::kGiven);
    }
  }
  std::vector<Case<T>> many;
  for (int64_t i = 0; i < 30; ++i) {
    many.push_back(make_case<T>("one of many", normal(i * i * 29, i), 3 * i * i, all, Gradient::kFormedAscended));
  }
  expect_right(many, all, Gradient::kFormedAscended, {1, 2, 5});
}

int main() {
  for_each_type([&]<class T>() { test_dtype<T>(); });
}
