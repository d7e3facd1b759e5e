// The emulated grid itself: its primitives, its schedules, and that it reports kernels that would hang a GPU.
#include "emulated_grid.h"

#include <set>

#include "cuda/grid.cuh"
#include "cuda_cases.h"

using emulated::Grid;

std::string deadlock_of(unsigned blocks, unsigned threads, const emulated::Machine::Kernel& kernel) {
  try {
    emulated::launch(blocks, threads, 1, kernel);
  } catch (const emulated::Deadlock& deadlock) {
    return deadlock.what();
  }
  return "";
}

void expect_report(const std::string& report, std::initializer_list<const char*> words) {
  for (const char* word : words) EXPECT(report.find(word) != std::string::npos, "\"%s\" in \"%s\"", word, report.c_str());
}

void test_divergent_barriers_are_reported() {
  expect_report(deadlock_of(2, 64,
                            [](const Grid& grid) {
                              if (grid.warp() == 0 || grid.block() == 1) grid.block_barrier();
                            }),
                {"deadlock", "block 0 thread 0", "block barrier", "test_emulated_grid.cpp:", "96 of 128 threads have returned"});
  expect_report(deadlock_of(3, 32,
                            [](const Grid& grid) {
                              if (grid.block() != 1) grid.grid_barrier();
                            }),
                {"grid barrier", "32 of 96 threads have returned"});
  expect_report(deadlock_of(1, 32,
                            [](const Grid& grid) {
                              if (grid.lane() != 5) grid.ballot(true);
                            }),
                {"warp exchange", "1 of 32 threads have returned"});
  // Both branches wait, but at two barriers.
  expect_report(deadlock_of(1, 64,
                            [](const Grid& grid) {
                              if (grid.warp() == 0) {
                                grid.block_barrier();
                              } else {
                                grid.block_barrier();
                              }
                            }),
                {"thread 0 on", "thread 32 on", "0 of 64 threads have returned"});
  // The machine works again afterwards.
  EXPECT(deadlock_of(2, 64, [](const Grid& grid) { grid.grid_barrier(); }).empty(), "no deadlock");
}

void test_primitives() {
  std::vector<int> failures(5 * 96);
  emulated::launch(5, 96, 7, [&](const Grid& grid) {
    int& failed = failures[grid.block() * grid.threads() + grid.thread()];
    failed += grid.ballot(grid.lane() % 3 == 0) != 0x49249249u;
    failed += grid.shuffle(grid.thread() * 0.5, (grid.lane() + 1) % 32) != (grid.warp() * 32 + (grid.lane() + 1) % 32) * 0.5;
    failed += s2ap::cuda::warp_sum(grid, static_cast<int>(grid.lane())) != 496;
    auto& storage = grid.shared<s2ap::cuda::ScanStorage>();
    for (int round = 0; round < 3; ++round) {
      s2ap::cuda::Scan scan = s2ap::cuda::block_scan(grid, storage, grid.thread() + 1);
      failed += scan.before != grid.thread() * (grid.thread() + 1) / 2 || scan.total != 96 * 97 / 2;
    }
  });
  for (int failed : failures) EXPECT(failed == 0, "%d", failed);
}

void test_atomics_and_grid_barrier() {
  uint32_t count = 0;
  int64_t sum = 100;
  std::vector<uint32_t> seen(3 * 64);
  emulated::launch(3, 64, 1, [&](const Grid& grid) {
    grid.atomic_add(&count, 1);
    grid.atomic_add(&sum, grid.thread() % 2 ? -1 : 2);
    grid.grid_barrier();
    seen[grid.block() * 64 + grid.thread()] = count;
  });
  for (uint32_t value : seen) EXPECT(value == 192, "%u", value);
  EXPECT(sum == 100 + 96, "%lld", (long long)sum);
}

void test_seeds_give_different_orders_and_the_same_seed_the_same() {
  auto order = [](uint64_t seed) {
    std::vector<unsigned> arrivals;
    emulated::launch(2, 32, seed, [&](const Grid& grid) {
      emulated::Unseen unseen;  // the race is the point
      arrivals.push_back(grid.block() * 32 + grid.thread());
    });
    return arrivals;
  };
  std::set<std::vector<unsigned>> orders;
  for (uint64_t seed = 0; seed < 10; ++seed) orders.insert(order(seed));
  EXPECT(orders.size() == 10, "%zu", orders.size());
  EXPECT(order(3) == order(3), "the same order");
}

void test_shared_storage_is_per_block_and_starts_as_garbage() {
  struct Storage {
    uint32_t value;
  };
  std::vector<uint32_t> before(4 * 32), after(4 * 32);
  emulated::launch(4, 32, 1, [&](const Grid& grid) {
    Storage& storage = grid.shared<Storage>();
    unsigned id = grid.block() * 32 + grid.thread();
    before[id] = storage.value;
    grid.block_barrier();
    if (grid.thread() == 9) storage.value = grid.block();
    grid.block_barrier();
    after[id] = storage.value;
  });
  for (unsigned id = 0; id < before.size(); ++id) EXPECT(before[id] == 0xcdcdcdcd && after[id] == id / 32, "thread %u", id);
}

int main() {
  test_divergent_barriers_are_reported();
  test_primitives();
  test_atomics_and_grid_barrier();
  test_seeds_give_different_orders_and_the_same_seed_the_same();
  test_shared_storage_is_per_block_and_starts_as_garbage();
  std::puts("emulated grid: primitives, schedules and deadlock reports are right");
}
