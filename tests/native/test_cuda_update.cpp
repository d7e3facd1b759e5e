// update.cu on the emulated grid against SGD written down element by element, with the fused multiply-adds of torch's CUDA kernels.
#include "cuda/update.cu"

#include "step_cases.h"

using namespace cases;
namespace kernels = s2ap::cuda;

template <class T>
void check(const Settings& settings, GridSize size, uint64_t seed, Random& random) {
  const int64_t sizes[] = {0, 1, 33, 4096, 0, 4097, 9001};
  std::vector<std::vector<T>> scores, grads, buffers;
  for (int64_t n : sizes) {
    scores.push_back(numbers<T>(0, n, random));
    grads.push_back(numbers<T>(0, n, random));
    buffers.push_back(numbers<T>(5, n, random));
  }
  auto new_scores = scores, new_buffers = buffers;
  kernels::UpdateArgs<T> args;
  for (size_t l = 0; l < scores.size(); ++l) {
    T* buffer = settings.momentum != 0 ? new_buffers[l].data() : nullptr;
    args.table.push({new_scores[l].data(), grads[l].data(), buffer, static_cast<int64_t>(scores[l].size())});
  }
  args.sgd = kernels::Sgd<T>::of(settings.lr, settings.momentum, settings.dampening, settings.weight_decay, settings.nesterov);
  emulated::launch(size.blocks, size.threads, seed, [&](const emulated::Grid& grid) { kernels::update_chunks(grid, args); });

  for (size_t l = 0; l < scores.size(); ++l) {
    for (size_t i = 0; i < scores[l].size(); ++i) {
      T score = scores[l][i], buffer = buffers[l][i];
      sgd(settings, score, grads[l][i], buffer);
      EXPECT(same_bits(new_scores[l][i], score), "%s layer %zu, element %zu: score %g, got %g", kName<T>, l, i, value(score),
             value(new_scores[l][i]));
      EXPECT(same_bits(new_buffers[l][i], buffer), "%s layer %zu, element %zu: momentum %g, got %g", kName<T>, l, i, value(buffer),
             value(new_buffers[l][i]));
    }
  }
}

template <class T>
void test_settings(Random& random) {
  const Settings all[] = {{0.1, 0, 0, 0, false},     {0.1, 0.9, 0, 0, false},  {0.1, 0.9, 0, 5e-4, false}, {0.1, 0.9, 0.3, 5e-4, false},
                          {0.1, 0.9, 0, 5e-4, true}, {1e-3, 0, 0, 0.7, false}, {0, 0.9, 0, 0, true}};
  int grid = 0;
  for (const Settings& settings : all) check<T>(settings, kGrids[grid++ % kGridCount], random(), random);
}

int main() {
  Random random(3);
  for_each_type([&]<class T>() { test_settings<T>(random); });
  std::puts("update: the kernel agrees with the oracle");
}
