// The CPU perturbation against a naive one: sums in the specified order, s + z stored and sorted, flips and signs counted one by one.
#include "cpu/perturb.h"

#include "cpu_cases.h"

using namespace cases;

template <class T>
struct Case {
  std::string what;
  std::vector<BitsOf<T>> scores, grad, weight, masked;
  int64_t kept;
};

template <class T>
Case<T> make_case(const std::string& what, const std::vector<double>& scores, const std::vector<double>& grad, int64_t kept) {
  const auto n = static_cast<int64_t>(scores.size());
  return {what + ", n " + std::to_string(n) + ", kept " + std::to_string(kept), stored<T>(scores), stored<T>(grad), stored<T>(normal(n, 7)),
          std::vector<BitsOf<T>>(n, BitsOf<T>{0x55}), kept};
}

template <class T>
void expect_right(std::vector<Case<T>>& all, double gamma, const Machine& machine) {
  const double eps = 1e-12;
  std::vector<PerturbLayer<T>> layers;
  std::vector<int64_t> cuts, new_cuts(all.size() * kCutColumns, -1);
  std::vector<double> scales(all.size(), -1);
  std::vector<Selected> now;
  for (auto& c : all) {
    layers.push_back({c.scores.data(), c.grad.data(), c.weight.data(), c.masked.data(), static_cast<int64_t>(c.scores.size()), c.kept});
    now.push_back(oracle_select<T>(c.scores, c.kept));
    cuts.insert(cuts.end(), {now.back().key, now.back().index, 0, 0, 0});
  }
  perturb(machine, layers, {gamma, eps}, cuts.data(), new_cuts.data(), scales.data());
  for (size_t l = 0; l < all.size(); ++l) {
    const Case<T>& c = all[l];
    const std::string what = name<T>() + ", isa " + std::to_string(static_cast<int>(machine.isa)) + ", " + c.what;
    const double norm_g = oracle_norm<T>(c.grad);
    const auto scale = static_cast<ComputeOf<T>>(norm_g == 0 ? 0 : gamma * oracle_norm<T>(c.scores) / (norm_g + eps));
    EXPECT(scales[l] == scale || (std::isnan(scale) && std::isnan(scales[l])), "%s: scale %a, not %a", what.c_str(), scales[l], double{scale});
    std::vector<BitsOf<T>> moved;
    for (size_t i = 0; i < c.scores.size(); ++i) {
      const ComputeOf<T> z = Element<T>::widen(c.grad[i]) * scale;
      moved.push_back(Element<T>::narrow(Element<T>::widen(c.scores[i]) + z));
    }
    const Selected expected = oracle_select<T>(moved, c.kept);
    int64_t flips = 0, signs = 0;
    for (size_t i = 0; i < moved.size(); ++i) {
      EXPECT(c.masked[i] == (expected.mask[i] ? c.weight[i] : 0), "%s: element %zu", what.c_str(), i);
      flips += expected.mask[i] != now[l].mask[i];
      signs += sign(value<T>(moved[i])) != sign(value<T>(c.scores[i]));
    }
    const int64_t* row = &new_cuts[l * kCutColumns];
    EXPECT(row[kKey] == expected.key && row[kIndex] == expected.index, "%s: cut", what.c_str());
    EXPECT(row[kNans] == expected.nans, "%s: %lld NaN", what.c_str(), static_cast<long long>(row[kNans]));
    EXPECT(row[kFlips] == flips, "%s: %lld flips, not %lld", what.c_str(), static_cast<long long>(row[kFlips]), static_cast<long long>(flips));
    EXPECT(row[kSigns] == signs, "%s: %lld signs, not %lld", what.c_str(), static_cast<long long>(row[kSigns]), static_cast<long long>(signs));
  }
}

template <class T>
void test_dtype() {
  for (Isa isa : instruction_sets()) {
    for (int64_t n : {0, 1, 2, 17, 65, 4097, 16385}) {
      for (const auto& [what, scores] : hard_scores(n, n + 1)) {
        for (int64_t kept : hard_counts(n)) {
          std::vector<Case<T>> one = {make_case<T>(what, scores, normal(n, n + 2, 1e-3), kept)};
          expect_right(one, 0.05, machine(isa, 2));
        }
      }
    }
    for (auto [threads, gamma] : {std::pair(1, 0.5), std::pair(2, 1e-3), std::pair(5, 0.0)}) {
      std::vector<Case<T>> many;
      for (int64_t i = 0; i < 30; ++i) many.push_back(make_case<T>("one of many", normal(i * i * 29, i), normal(i * i * 29, i + 1), 3 * i * i));
      many.push_back(make_case<T>("no gradient", normal(30000, 1), std::vector<double>(30000), 3000));
      many.push_back(make_case<T>("no scores", std::vector<double>(30000), normal(30000, 1), 3000));
      expect_right(many, gamma, machine(isa, threads));
    }
  }
  // Gradients formed inside, and sums of squares that are known already.
  for (Isa isa : instruction_sets()) {
    for (const auto& [what, scores] : hard_scores(40001, 1)) {
      std::vector<Case<T>> formed = {make_case<T>(what, scores, normal(40001, 2, 1e-3), 4000)}, inside = formed;
      formed[0].grad = oracle_score_grad<T>(inside[0].grad, inside[0].weight, inside[0].scores);
      std::vector<int64_t> cuts(kCutColumns), outcome[3];
      const Selected now = oracle_select<T>(inside[0].scores, 4000);
      cuts[kKey] = now.key;
      cuts[kIndex] = now.index;
      double scale[3];
      const double norm = oracle_norm<T>(inside[0].scores), square = norm * norm, four = 4 * oracle_sum(squares<T>(inside[0].scores));
      const Ascent how[] = {{0.5, 1e-12}, {0.5, 1e-12, true}, {0.25, 1e-12, true, &four}};
      for (int k = 0; k < 3; ++k) {
        Case<T>& c = k == 0 ? formed[0] : inside[0];
        outcome[k].resize(kCutColumns);
        const PerturbLayer<T> layer = {c.scores.data(), c.grad.data(), c.weight.data(), c.masked.data(), 40001, 4000};
        perturb<T>(machine(isa, 2), {layer}, how[k], cuts.data(), outcome[k].data(), &scale[k]);
        EXPECT(inside[0].masked == formed[0].masked || k == 0, "%s, %s: masked, way %d", name<T>().c_str(), what.c_str(), k);
        EXPECT(outcome[k] == outcome[0], "%s, %s: cut, way %d", name<T>().c_str(), what.c_str(), k);
        EXPECT(scale[k] == scale[0] || std::isnan(square), "%s, %s: scale, way %d", name<T>().c_str(), what.c_str(), k);
      }
    }
  }
  // Sums of more than a chunk of chunks.
  const int64_t n = kChunk * kChunk + 12345;
  if (sizeof(BitsOf<T>) == 4) {
    const auto x = stored<T>(normal(n, 1));
    std::vector<double> sums;
    for (int64_t i = 0; i < n; i += kChunk) sums.push_back(loops<T>(best_isa()).chunk_of_squares(&x[i], std::min(kChunk, n - i)));
    EXPECT(sum_of_chunks(sums.data(), static_cast<int64_t>(sums.size())) == oracle_sum(squares<T>(x)), "sum of %lld", static_cast<long long>(n));
  }
}

int main() {
  for_each_type([&]<class T>() { test_dtype<T>(); });
}
