// The CPU update against one element after the other, with and without fused multiply-add.
#include "cpu/update.h"

#include "cpu_cases.h"

using namespace cases;

template <class T>
void test_dtype() {
  const SgdParameters settings[] = {{0.1, 0, 0, 0, false},     {0.1, 0, 0, 5e-4, false},  {0.01, 0.9, 0, 5e-4, false},
                                    {0.1, 0.9, 0.1, 0, false}, {0.1, 0.9, 0, 5e-4, true}, {0, 0.9, 0, 0, false}};
  std::vector<std::vector<BitsOf<T>>> s, g, b;
  for (int64_t n : {0, 1, 15, 16, 17, 1000, 70001}) {
    s.push_back(stored<T>(normal(n, 1)));
    g.push_back(stored<T>(normal(n, 2)));
    b.push_back(stored<T>(normal(n, 3)));
    if (n > 2) s.back()[2] = Element<T>::narrow(ComputeOf<T>(-0.0));
  }
  for (const SgdParameters& p : settings) {
    for (bool fused : {false, true}) {
      auto expected_s = s, expected_b = b;
      for (size_t l = 0; l < s.size(); ++l) {
        for (size_t i = 0; i < s[l].size(); ++i) {
          oracle_update<T>(expected_s[l][i], g[l][i], p.momentum != 0 ? &expected_b[l][i] : nullptr, p, fused);
        }
      }
      for_each_machine({1, 3}, [&](const Machine& machine) {
        auto new_s = s, new_b = b;
        std::vector<UpdateLayer<T>> layers;
        for (size_t l = 0; l < s.size(); ++l) {
          layers.push_back({new_s[l].data(), g[l].data(), p.momentum != 0 ? new_b[l].data() : nullptr, static_cast<int64_t>(s[l].size())});
        }
        update(machine, layers, p, fused);
        EXPECT(new_s == expected_s, "%s, isa %d, fused %d", name<T>().c_str(), static_cast<int>(machine.isa), fused);
        EXPECT(new_b == expected_b, "%s, isa %d, fused %d", name<T>().c_str(), static_cast<int>(machine.isa), fused);
      });
    }
  }
}

int main() {
  for_each_type([&]<class T>() { test_dtype<T>(); });
}
