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

// What a layer's `kept` counts (reference.Pattern). Element i has the place (i / block) % size. kWeight: elements of the layer; kGroup:
// sets of all elements of one place, ranked by sum|s|; kWindow: elements among `size` ones that differ only in their place.
enum PatternKind : int { kWeight = 0, kGroup = 1, kWindow = 2 };
constexpr int kPatternNumbers = 3;  // kind, size, block: what `patterns` has for each layer
constexpr int kLargestWindow = 32;

struct Pattern {
  int64_t kind = kWeight, size = 0, block = 1;
};

}  // namespace s2ap
