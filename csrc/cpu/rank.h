// Ranks among magnitudes: cuts, the rank-th largest of some numbers and where its ties are cut, and the sample that a guess is made from.
#pragma once

#include <algorithm>
#include <cstring>

#include "loops.h"

namespace s2ap {

// The cut of a layer, in terms of magnitudes.
template <class Bits>
struct Cut {
  Bits before = kBeyond<Bits>;  // bound for elements in front of `index`
  Bits from = kBeyond<Bits>;    // bound from `index` on
  int64_t index = 0;
};

// The cut that a row of `cuts` describes.
template <class T>
Cut<BitsOf<T>> cut_of_row(const int64_t* row) {
  const int64_t key = row[kKey];
  return {key == kKeepNone ? kBeyond<BitsOf<T>> : magnitude_at_least<T>(key + 1), magnitude_at_least<T>(key), row[kIndex]};
}

// Calls f(from, size, bound) for the elements [begin, begin + n) in front of and behind the cut's index, `from` counted from begin.
template <class Bits, class F>
void in_parts(const Cut<Bits>& cut, int64_t begin, int64_t n, const F& f) {
  const int64_t front = std::clamp(cut.index, begin, begin + n) - begin;
  if (front > 0) f(0, front, cut.before);
  if (front < n) f(front, n - front, cut.from);
}

template <class Bits>
struct Rank {
  Bits magnitude;  // the rank-th largest
  int64_t above;   // how many are larger
};

// The rank-th largest (1 is the largest) of n magnitudes that all lie in [lo, hi), by bisection on the bits. Every pass is a
// counting loop; once a quarter is left it is compacted into `scratch`, which holds n / 4 elements and kStoreSlack bytes.
template <class T>
Rank<BitsOf<T>> rank_largest(const Loops<T>& loop, const BitsOf<T>* x, int64_t n, int64_t rank, BitsOf<T> lo, BitsOf<T> hi,
                             BitsOf<T>* scratch) {
  int64_t above = 0, inside = n;  // magnitudes >= hi, and in [lo, hi), of all
  int64_t beyond = 0;             // magnitudes >= hi among the n that x has now
  while (hi - lo > 1) {
    if (inside <= n / 4) {
      n = loop.sweep(x, n, lo, hi, scratch).inside;
      x = scratch;
      beyond = 0;
    }
    const BitsOf<T> middle = static_cast<BitsOf<T>>(lo + (hi - lo) / 2);
    const int64_t at_least = loop.count_at_least(x, n, middle), upper = at_least - beyond;
    if (rank <= above + upper) {
      lo = middle;
      inside = upper;
    } else {
      hi = middle;
      above += upper;
      inside -= upper;
      beyond = at_least;
    }
  }
  return {lo, above};
}

template <class T>
int64_t count_equal(const Loops<T>& loop, const BitsOf<T>* x, int64_t n, BitsOf<T> magnitude) {
  return loop.count_at_least(x, n, magnitude) - loop.count_at_least(x, n, static_cast<BitsOf<T>>(magnitude + 1));
}

// The index of the rank-th last of the elements with this magnitude.
template <class T>
int64_t index_of_tie(const Loops<T>& loop, const BitsOf<T>* x, int64_t n, BitsOf<T> magnitude, int64_t rank) {
  constexpr int64_t kStep = 256;
  for (int64_t end = n; end > 0;) {
    const int64_t begin = (end - 1) / kStep * kStep;
    const int64_t here = count_equal(loop, x + begin, end - begin, magnitude);
    if (here >= rank) {
      for (int64_t i = end - 1;; --i) {
        if ((x[i] & kMagnitude<BitsOf<T>>) == magnitude && --rank == 0) return i;
      }
    }
    rank -= here;
    end = begin;
  }
  return 0;
}

// Where the sample of a layer of n elements is: runs of neighbours (a quarter of the cache misses of single elements), one at a
// fixed, irregular place in each of `runs` equal parts.
struct SamplePlan {
  static constexpr int64_t kRun = 4;
  int64_t runs, part;

  explicit SamplePlan(int64_t n) : runs(std::clamp<int64_t>(n / 32, 2048, 16384) / kRun), part(n / runs) {}
  int64_t size() const { return runs * kRun; }
  int64_t begin(int64_t i) const {
    const uint64_t scattered = (static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15ull) >> 40;  // 24 bits
    return i * part + static_cast<int64_t>((scattered * static_cast<uint64_t>(part - kRun + 1)) >> 24);
  }
};

// Copies the sampled elements of x to `sample`.
template <class Bits>
void gather(const SamplePlan& plan, const Bits* x, Bits* sample) {
  constexpr int64_t kAhead = 16;
  for (int64_t i = 0; i < plan.runs; ++i) {
    __builtin_prefetch(x + plan.begin(std::min(i + kAhead, plan.runs - 1)));
    memcpy(sample + i * SamplePlan::kRun, x + plan.begin(i), SamplePlan::kRun * sizeof(Bits));
  }
}

}  // namespace s2ap
