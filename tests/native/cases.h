// What the tests of the CPU kernels and of the CUDA kernels share.
#pragma once

#include <cstdio>
#include <cstdlib>

#define EXPECT(condition, ...)                                                      \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: expected %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                            \
      std::fprintf(stderr, "\n");                                                   \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (0)

namespace cases {

// Under ThreadSanitizer, which is slow, only who touches what and when is of interest. What one thread does by itself is nothing to it, and
// results are compared under the other sanitizers.
#ifdef __SANITIZE_THREAD__
constexpr bool kOnlySharing = true;
#else
constexpr bool kOnlySharing = false;
#endif

// f<T>() for each type of elements. Sharing is alike for types of the same size.
template <class Half, class BFloat16, class F>
void for_each_type_of(const F& f) {
  f.template operator()<float>();
  if constexpr (!kOnlySharing) {
    f.template operator()<double>();
    f.template operator()<Half>();
  }
  f.template operator()<BFloat16>();
}

}  // namespace cases
