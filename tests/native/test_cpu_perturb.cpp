// The CPU perturbation against a naive one: sums in the specified order, s + z stored and sorted, flips and signs counted one by one.
#include "cpu/perturb.h"

#include <array>
#include <limits>

#include "cpu_cases.h"

using namespace cases;

template <class T>
struct Case {
  std::string what;
  std::vector<BitsOf<T>> scores, grad, weight;
  int64_t kept;
  double gamma;
  Selected now;
  double scale;
  Outcome<T> expected;
};

constexpr double kEps = 1e-12;

template <class T>
Case<T> make_case(const std::string& what, const std::vector<BitsOf<T>>& scores, const std::vector<BitsOf<T>>& grad, int64_t kept,
                  double gamma) {
  const auto n = static_cast<int64_t>(scores.size());
  Case<T> c = {
      what + ", n " + std::to_string(n) + ", kept " + std::to_string(kept), scores, grad, stored<T>(normal(n, 7)), kept, gamma, {}, 0, {}};
  c.now = oracle_select<T>(c.scores, kept);
  c.scale = oracle_scale<T>(c.scores, c.grad, gamma, kEps);
  const auto moved = oracle_moved<T>(c.scores, c.grad, static_cast<ComputeOf<T>>(c.scale));
  const Selected after = oracle_select<T>(moved, kept);
  c.expected = outcome<T>(after, c.weight, count_flips(c.now, after), count_signs<T>(c.scores, moved));
  return c;
}

template <class T>
void expect_right(const std::vector<Case<T>>& all, const std::vector<int>& threads) {
  for_each_machine(threads, [&](const Machine& machine) {
    auto masked = unwritten<T>(all);
    std::vector<PerturbLayer<T>> layers;
    std::vector<int64_t> cuts, new_cuts(all.size() * kCutColumns, -1);
    std::vector<double> gammas, scales(all.size(), -1);
    for (size_t l = 0; l < all.size(); ++l) {
      const Case<T>& c = all[l];
      const auto n = static_cast<int64_t>(c.scores.size());
      layers.push_back({c.scores.data(), c.grad.data(), c.weight.data(), masked[l].data(), n, c.kept});
      cuts.insert(cuts.end(), {c.now.key, c.now.index, 0, 0, 0});
      gammas.push_back(c.gamma);
    }
    perturb(machine, layers, {gammas.data(), kEps}, cuts.data(), new_cuts.data(), scales.data());
    for (size_t l = 0; l < all.size(); ++l) {
      EXPECT(same_number(scales[l], all[l].scale), "%s: scale %a, not %a", all[l].what.c_str(), scales[l], all[l].scale);
      expect_outcome(all[l].expected, &new_cuts[l * kCutColumns], masked[l], machine, all[l].what);
    }
  });
}

// Gradients formed inside, and sums of squares that are known already.
template <class T>
void test_ways(const std::string& what, const std::vector<double>& hard) {
  const auto n = static_cast<int64_t>(hard.size());
  const auto scores = stored<T>(hard), grad = stored<T>(normal(n, 2, 1e-3)), weight = stored<T>(normal(n, 7));
  const Case<T> formed = make_case<T>(what, scores, oracle_score_grad<T>(grad, weight, scores), 4000, 0.5);
  const double half = 0.5, quarter = 0.25, four = 4 * oracle_sum_of_squares<T>(scores);
  const int64_t cuts[kCutColumns] = {formed.now.key, formed.now.index};
  for_each_machine({2}, [&](const Machine& machine) {
    for (const Ascent& how : {Ascent{&half, kEps}, Ascent{&half, kEps, true}, Ascent{&quarter, kEps, true, &four}}) {
      std::vector<BitsOf<T>> masked(n, 0x55);
      int64_t row[kCutColumns];
      double scale;
      const auto* given = how.straight_through ? grad.data() : formed.grad.data();
      perturb<T>(machine, {{scores.data(), given, weight.data(), masked.data(), n, 4000}}, how, cuts, row, &scale);
      EXPECT(same_number(scale, formed.scale), "%s, %s, gamma %g: scale", name<T>().c_str(), what.c_str(), *how.gammas);
      expect_outcome(formed.expected, row, masked, machine, what + ", gamma " + std::to_string(*how.gammas));
    }
  });
}

template <class T>
void test_dtype() {
  const auto random = [](int64_t n, uint64_t seed, double scale = 1) { return stored<T>(normal(n, seed, scale)); };
  for (int64_t n : {0, 1, 2, 17, 65, 4097, 16385}) {
    if (stays_on_one_thread(n)) continue;
    for (const auto& [what, scores] : hard_scores(n, n + 1)) {
      for (int64_t kept : hard_counts(n)) expect_right<T>({make_case<T>(what, stored<T>(scores), random(n, n + 2, 1e-3), kept, 0.05)}, {2});
    }
  }
  for (int threads : {1, 2, 5}) {
    std::vector<Case<T>> many;
    for (int64_t i = 0; i < 30; ++i) {
      const double gamma = std::array{0.5, 1e-3, 0.0}[i % 3];
      many.push_back(make_case<T>("one of many", random(i * i * 29, i), random(i * i * 29, i + 1), 3 * i * i, gamma));
    }
    many.push_back(make_case<T>("no gradient", random(30000, 1), std::vector<BitsOf<T>>(30000), 3000, 0.5));
    many.push_back(make_case<T>("no scores", std::vector<BitsOf<T>>(30000), random(30000, 1), 3000, 0.5));
    for (double gamma : {-0.5, std::nan(""), 0.0}) {
      const double largest = std::numeric_limits<double>::infinity();
      auto scores = random(30000, 1);
      if (gamma == 0) scores[7] = stored<T>({largest})[0];  // whose norm times 0 is no number
      many.push_back(make_case<T>("gamma " + std::to_string(gamma), scores, random(30000, 2), 3000, gamma));
    }
    expect_right(many, {threads});
  }
  for (const auto& [what, scores] : hard_scores(40001, 1)) test_ways<T>(what, scores);
}

// More chunks than a chunk has elements.
void test_levels_of_sums() {
  std::vector<double> sums = normal(kChunk + 3, 1);
  const double expected = oracle_sum(sums);
  EXPECT(sum_of_chunks(sums.data(), kChunk + 3) == expected, "not %a", expected);
}

int main() {
  for_each_type([&]<class T>() { test_dtype<T>(); });
  test_levels_of_sums();
}
