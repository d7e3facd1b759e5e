// What the CPU kernels run on: an instruction set and some threads. The kernels get it as an argument, so that the same code runs on
// torch's thread pool in the extension and on plain std::threads, at any instruction set, in the native tests.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <fstream>

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define S2AP_X86 1
#endif

namespace s2ap {

// Each is a superset of the one before.
enum class Isa { kPlain, kAvx2, kAvx512 };

inline Isa best_isa() {
#ifdef S2AP_X86
  static const Isa best = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    return avx2 && avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kPlain;
  }();
  return best;
#else
  return Isa::kPlain;
#endif
}

// float32 numbers in a vector register.
inline int64_t lanes(Isa isa) { return isa == Isa::kAvx512 ? 16 : isa == Isa::kAvx2 ? 8 : 4; }

// Bytes of the last-level cache that this machine's cores share; 0 where that is not known. (sysconf counts the caches of all cores on
// some.)
inline int64_t last_cache() {
  static const int64_t bytes = [] {
    int64_t kilobytes = 0;
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kilobytes;  // "32768K"
    return kilobytes * 1024;
  }();
  return bytes;
}

struct Machine {
  Isa isa;
  int threads;
  // Calls work(context) on up to `threads` threads at once, at least on one, and returns when all are done.
  void (*run)(int threads, void (*work)(void*), void* context);
  int64_t last_cache = 0;  // bytes; 0: not known
};

// Whether results are better written past the caches, given the floats that are read and written: where these do not fit the last-level
// cache twice, results take the place of inputs that are still to be read, and every line of them is read from memory before it is written.
// Only vectors that are whole lines are worth it.
inline bool past_caches(const Machine& machine, int64_t floats) {
  return machine.isa == Isa::kAvx512 && machine.last_cache > 0 && 2 * static_cast<int64_t>(sizeof(float)) * floats > machine.last_cache;
}
inline bool is_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

// What was written past the caches is there for other threads before anything that is written later.
inline void order_streams() {
#ifdef S2AP_X86
  __builtin_ia32_sfence();
#endif
}

// Fewer elements than this are not worth waking a thread for.
constexpr int64_t kElementsPerThread = 32768;

// f(i) for every i in [0, count), on as many threads as `elements` elements of work are worth. Threads take the next i when they
// are free: uneven work balances, and f(i) may wait for what f of a smaller i does, since some thread has taken that one already. For
// the same reason f must not throw.
template <class F>
void for_each(const Machine& machine, int64_t count, int64_t elements, const F& f) {
  const int64_t threads = std::min({int64_t{machine.threads}, count, 1 + elements / kElementsPerThread});
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  struct Shared {
    const F& f;
    int64_t count;
    std::atomic<int64_t> next{0};
  } shared{f, count};
  machine.run(
      static_cast<int>(threads),
      [](void* context) noexcept {
        Shared& s = *static_cast<Shared*>(context);
        for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.count;) s.f(i);
      },
      &shared);
}

}  // namespace s2ap
