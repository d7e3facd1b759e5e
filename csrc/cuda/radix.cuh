// The rank-th largest of many keys, by histograms: an interval that holds it is split into at most 2048 bins, the keys in each are counted,
// and a walk over the counts from the top finds the bin that holds it, which is the next interval. From all keys on, that is a radix
// search: 3 histograms for float, 6 for double, 2 for half precision. From a narrow bracket around the key on, it is one or two.
//
// All counts are integers, so their sums do not depend on the order in which threads and blocks arrive.
#pragma once

#include <type_traits>

#include "number.cuh"

namespace s2ap::cuda {

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;

// The significant bits of the keys. Those of half-precision scores are those of the widened floats, whose last bits are 0.
template <class T>
struct Digits {
  static constexpr int kZeros = sizeof(T) > 2 ? 0 : std::is_same_v<T, Float16> ? 13 : 16;
  static constexpr int kBits = KeyTraits<KeyOf<T>>::kBits - kZeros;
  static constexpr int kCount = (kBits + kDigitBits - 1) / kDigitBits;
  static constexpr KeyOf<T> kEnd = KeyOf<T>{1} << kBits;  // beyond all
  static constexpr KeyOf<T> kInfinity = KeyTraits<KeyOf<T>>::kInfinityKey >> kZeros;
  static constexpr int kFractionBits = sizeof(T) == 8 ? 52 : sizeof(T) == 4 ? 23 : std::is_same_v<T, Float16> ? 10 : 7;

  // What is searched among. Every NaN is beyond kInfinity.
  static S2AP_HD KeyOf<T> of(Compute<T> score) { return key_of(score) >> kZeros; }
};

// How far a search has come. Of the elements with a key in [lo, hi), need stay and spare go.
template <class Key>
struct Progress {
  Key lo, hi;
  uint32_t need, spare;
  bool listed;  // whether the elements in [lo, hi) are in lists (selection.cuh)

  S2AP_HD bool is_empty() const { return lo == hi; }
  S2AP_HD bool is_found() const { return hi - lo <= 1; }
  S2AP_HD bool holds(Key key) const { return key - lo < hi - lo; }  // unsigned: what is below lo wraps around
  // How many bits of a key its bin does not tell. Not of an empty interval.
  S2AP_DEVICE int shift() const {
    int bits = bit_length(hi - 1 - lo);
    return bits > kDigitBits ? bits - kDigitBits : 0;
  }
  S2AP_DEVICE uint32_t bin(Key key) const { return static_cast<uint32_t>((key - lo) >> shift()); }
};

template <class Key>
struct RadixStorage {
  uint32_t bins[kBins + 1];         // and one for what is above the interval
  alignas(16) Progress<Key> found;  // or a wide load of it would take a bin along, which a race checker sees as a race
  ScanStorage scan;
};

// Block-wide. No barrier is needed before it where the thread that uses a bin's count is the one that clears it here.
template <class Grid, class Key>
S2AP_DEVICE void clear_bins(const Grid& grid, RadixStorage<Key>& storage) {
  for (int bin = static_cast<int>(grid.thread()); bin <= kBins; bin += static_cast<int>(grid.threads())) storage.bins[bin] = 0;
}

// Counts `bin` of the active lanes. Lanes that agree with the first active one are counted in one go: were all scores equal,
// the 32 atomics would otherwise queue up at one address.
template <class Grid>
S2AP_DEVICE void count(const Grid& grid, uint32_t* bins, bool active, uint32_t bin) {
  uint32_t actives = grid.ballot(active);
  if (actives == 0) return;
  unsigned leader = first_bit(actives);
  uint32_t leading = grid.shuffle(bin, leader);  // by all lanes, so not after a short-circuiting &&
  bool same = active && bin == leading;
  uint32_t group = grid.ballot(same);
  if (grid.lane() == leader) {
    grid.atomic_add(bins + bin, count_bits(group));
  } else if (active && !same) {
    grid.atomic_add(bins + bin, 1);
  }
}

// Goes from the interval to the bin that holds its need-th largest key; `bins` has the counts. False, and nothing else, if there are
// fewer keys in it, or need is 0. Block-wide; every thread gets the result.
template <class Grid, class Key>
S2AP_DEVICE bool split(const Grid& grid, RadixStorage<Key>& storage, const uint32_t* bins, Progress<Key>& p) {
  int shift = p.shift(), count = static_cast<int>((p.hi - 1 - p.lo) >> shift) + 1;
  int each = (count + static_cast<int>(grid.threads()) - 1) / static_cast<int>(grid.threads());
  int top = count - 1 - static_cast<int>(grid.thread()) * each;  // this thread's highest bin
  uint32_t mine = 0;
  for (int bin = top; bin > top - each && bin >= 0; --bin) mine += bins[bin];
  Scan scan = block_scan(grid, storage.scan, mine);
  if (p.need == 0 || p.need > scan.total) return false;
  uint32_t above = scan.before;
  if (above < p.need && p.need - above <= mine) {
    int bin = top;
    for (; above + bins[bin] < p.need; --bin) above += bins[bin];
    uint32_t need = p.need - above;
    Key lo = p.lo + (static_cast<Key>(bin) << shift), hi = lo + (Key{1} << shift);
    storage.found = {lo, hi < p.hi ? hi : p.hi, need, bins[bin] - need, p.listed};
  }
  grid.block_barrier();
  p = storage.found;
  return true;
}

}  // namespace s2ap::cuda
