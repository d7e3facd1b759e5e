// The CPU update against one element after the other, with and without fused multiply-add.
#include "cpu/update.h"

#include "cpu_cases.h"

using namespace cases;

template <class T>
BitsOf<T> add_scaled(BitsOf<T> a, double alpha, BitsOf<T> b, bool fused) {
  using C = ComputeOf<T>;
  const C x = Element<T>::widen(a), y = Element<T>::widen(b), factor = static_cast<C>(alpha);
  if (fused) return Element<T>::narrow(std::fma(factor, y, x));
  const C product = factor * y;
  return Element<T>::narrow(x + product);
}

template <class T>
void oracle(BitsOf<T>& s, BitsOf<T> g, BitsOf<T>* b, const SgdParameters& p, bool fused) {
  BitsOf<T> d = p.weight_decay != 0 ? add_scaled<T>(g, p.weight_decay, s, fused) : g;
  if (b != nullptr) {
    *b = Element<T>::narrow(Element<T>::widen(*b) * static_cast<ComputeOf<T>>(p.momentum));
    *b = add_scaled<T>(*b, 1 - p.dampening, d, fused);
    d = p.nesterov ? add_scaled<T>(d, p.momentum, *b, fused) : *b;
  }
  s = add_scaled<T>(s, -p.lr, d, fused);
}

template <class T>
void test_dtype() {
  const SgdParameters settings[] = {{0.1, 0, 0, 0, false}, {0.1, 0, 0, 5e-4, false}, {0.01, 0.9, 0, 5e-4, false},
                                    {0.1, 0.9, 0.1, 0, false}, {0.1, 0.9, 0, 5e-4, true}, {0, 0.9, 0, 0, false}};
  for (Isa isa : instruction_sets()) {
    for (const SgdParameters& p : settings) {
      for (bool fused : {false, true}) {
        for (int threads : {1, 3}) {
          std::vector<std::vector<BitsOf<T>>> s, g, b;
          std::vector<UpdateLayer<T>> layers;
          for (int64_t n : {0, 1, 15, 16, 17, 1000, 70001}) {
            s.push_back(stored<T>(normal(n, 1)));
            g.push_back(stored<T>(normal(n, 2)));
            b.push_back(stored<T>(normal(n, 3)));
            if (n > 2) s.back()[2] = Element<T>::narrow(ComputeOf<T>(-0.0));
          }
          auto expected_s = s, expected_b = b;
          for (size_t l = 0; l < s.size(); ++l) {
            layers.push_back({s[l].data(), g[l].data(), p.momentum != 0 ? b[l].data() : nullptr, static_cast<int64_t>(s[l].size())});
            for (size_t i = 0; i < s[l].size(); ++i) {
              oracle<T>(expected_s[l][i], g[l][i], p.momentum != 0 ? &expected_b[l][i] : nullptr, p, fused);
            }
          }
          update(machine(isa, threads), layers, p, fused);
          EXPECT(s == expected_s, "%s, isa %d, fused %d", name<T>().c_str(), static_cast<int>(isa), fused);
          EXPECT(b == expected_b, "%s, isa %d, fused %d", name<T>().c_str(), static_cast<int>(isa), fused);
        }
      }
    }
  }
}

int main() {
  for_each_type([&]<class T>() { test_dtype<T>(); });
}
