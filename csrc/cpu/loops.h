// The inner loops of the CPU kernels, each compiled for three instruction sets and chosen when the program runs (so one binary is
// right for every machine and fast on new ones). Everything else is ordinary code around them, which knows them by pointer only: the loops
// themselves, in loops_body.h, are much to compile, and loops.cpp does it once for all kernels.
#pragma once

#include <cstdint>

#include "../plan.h"
#include "element.h"
#include "machine.h"

namespace s2ap {

struct SweepCounts {
  int64_t above = 0;   // magnitudes >= hi
  int64_t inside = 0;  // magnitudes in [lo, hi)
};

struct PerturbCounts {
  int64_t nans = 0;
  int64_t flips = 0;
  int64_t signs = 0;

  PerturbCounts& operator+=(const PerturbCounts& other) {
    nans += other.nans;
    flips += other.flips;
    signs += other.signs;
    return *this;
  }
};

struct SgdParameters {
  double lr, momentum, dampening, weight_decay;
  bool nesterov;
};

// The compaction stores whole vectors: this many bytes past the last element may be overwritten.
constexpr int64_t kStoreSlack = 64;

// A tile: elements of a layer with a pattern whose mask is made at once (pattern.h).
constexpr int64_t kTile = 2048;

// Which elements stay: those with a magnitude >= bound, or those that have all ones in `mask`, the others having 0.
template <class Bits>
struct Keep {
  Bits bound = 0;
  const Bits* mask = nullptr;

  Keep(Bits bound) : bound(bound) {}
  Keep(const Bits* mask) : mask(mask) {}
};

// Loops over elements of type T. Inputs named x are bits of either sign; their magnitudes are taken on the way.
template <class T>
struct Loops {
  using Bits = BitsOf<T>;
  // Counts, and appends the magnitudes in [lo, hi) to `inside` in order. `inside` may be x itself.
  SweepCounts (*sweep)(const Bits* x, int64_t n, Bits lo, Bits hi, Bits* inside);
  // Counts magnitudes >= bound.
  int64_t (*count_at_least)(const Bits* x, int64_t n, Bits bound);
  // masked = keep ? w : 0. Returns the number of NaN among x.
  int64_t (*apply)(const Bits* x, const Bits* w, Bits* masked, int64_t n, Keep<Bits> keep);
  // The mask of whole windows (plan.h, Pattern) of x, n <= kTile elements, each of which keeps its `kept` largest.
  void (*window_keep)(const Bits* x, int64_t n, int64_t size, int64_t block, int64_t kept, Bits* mask);
  // Bit i of `bits` is |x[i]| >= bound; the last byte is filled up with zeros.
  void (*keep_bits)(const Bits* x, int64_t n, Bits bound, uint8_t* bits);
  // Counts the bits in which the first n of a and of b differ; those that fill up the last byte are the same in both.
  int64_t (*count_different)(const uint8_t* a, const uint8_t* b, int64_t n);
  // formed = (grad * w) * sign(at), every operation rounded.
  void (*form)(const Bits* grad, const Bits* w, const Bits* at, Bits* formed, int64_t n);
  // moved = s + scale * g, every operation rounded.
  void (*move)(const Bits* s, const Bits* g, ComputeOf<T> scale, Bits* moved, int64_t n);
  // As apply with x = moved; compares the mask with that of s, which is of the same form, and the signs with those of s.
  PerturbCounts (*apply_moved)(const Bits* moved, const Bits* s, const Bits* w, Bits* masked, int64_t n, Keep<Bits> keep,
                               Keep<Bits> keep_now);
  // The sums of squares and of magnitudes of up to kChunk elements, in the order of reference.sum_of_squares.
  double (*chunk_of_squares)(const Bits* x, int64_t n);
  double (*chunk_of_magnitudes)(const Bits* x, int64_t n);
  // One SGD step; b is null without momentum. `fused`: a + alpha * b is rounded once, as torch does where the CPU can.
  void (*update)(Bits* s, const Bits* g, Bits* b, int64_t n, const SgdParameters& p, bool fused);
};

// The loops for an element type, compiled in loops.cpp.
template <class T>
const Loops<T>& loops(Isa isa);

}  // namespace s2ap
