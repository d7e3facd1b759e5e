// What the CPU and the CUDA kernels agree on: the columns of a cut, the fixed summation order, and the chunks that a
// list of layers is cut into so that layers of any size balance over threads or blocks. The specification is
// s2ap_ext/reference.py.
#pragma once

#include <cstdint>

namespace s2ap {

// One row of `cuts` (int64) per layer. An element stays iff (key, index) >= (cut key, cut index).
enum CutColumn : int { kKey = 0, kIndex = 1, kNans = 2, kFlips = 3, kSigns = 4, kCutColumns = 5 };
constexpr int64_t kKeepNone = INT64_MAX;  // a cut key that no element reaches

// The fixed order of sums: chunks of kChunk elements, kLanes running sums per chunk, then halving folds.
constexpr int64_t kChunk = 4096;
constexpr int kLanes = 64;

}  // namespace s2ap
