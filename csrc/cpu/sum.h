// Sums in the one order of reference.sum_of_squares: chunks of 4096 elements (loops.h), then the chunks' sums in the same way.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../plan.h"

namespace s2ap {

// The sum of the chunks' sums, which are overwritten.
inline double sum_of_chunks(double* sums, int64_t n) {
  while (n > 1) {
    const int64_t chunks = (n + kChunk - 1) / kChunk;
    for (int64_t c = 0; c < chunks; ++c) {
      double lanes[kLanes] = {};
      const int64_t begin = c * kChunk, end = std::min(n, begin + kChunk);
      for (int64_t i = begin; i < end; ++i) lanes[(i - begin) % kLanes] += sums[i];
      for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
      }
      sums[c] = lanes[0];
    }
    n = chunks;
  }
  return n == 0 ? 0 : sums[0];
}

}  // namespace s2ap
