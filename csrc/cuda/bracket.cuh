// A guess where the kept-th largest key of a layer is: a bracket [lo, hi). Counting the layer's keys proves or disproves it
// (selection.cuh); so whether it is right affects only the speed.
//
// Where the layer's cut is known for scores that differ little, those before a step or a perturbation, the bracket reaches a 32nd of
// an octave to either side of it, 1.6 to 3.1 % (bracket_around): cuts were seen to move by at most 0.7 % in one step of training, and about
// 2.5 % of the scores lie inside (benchmarks/results/cuts-moved.md).
//
// Otherwise it comes from a small sample, four standard deviations of the sample's rank to either side (guess_bracket). The sample has one
// score of each of 4096 equal parts of the layer, at a fixed, irregular place. One block takes it: 8 loads of each of 512 threads, all in
// flight at once. Both ends of the bracket belong to it, so that it also holds a value that many scores share. They are searched together,
// and no closer than to a few of the sample's keys, which is little beside the bracket. A layer of no more elements is its own sample: the
// guess is its key.
#pragma once

#include "radix.cuh"
#include "table.cuh"

namespace s2ap::cuda {

constexpr int kSample = 4096;
constexpr uint32_t kClose = 16;  // keys of the sample within which an end of the bracket may lie

// 0 < kept < n. The cut's key may be any number.
template <class T>
S2AP_DEVICE Progress<KeyOf<T>> bracket_around(int64_t cut_key, uint32_t kept) {
  using Key = KeyOf<T>;
  constexpr Key reach = Key{1} << (Digits<T>::kFractionBits - 5), end = Digits<T>::kEnd;  // a 32nd of an octave
  uint64_t shifted = static_cast<uint64_t>(cut_key) >> Digits<T>::kZeros;
  Key middle = shifted < end ? static_cast<Key>(shifted) : end - 1;
  return {middle > reach ? middle - reach : 0, end - middle > reach ? middle + reach + 1 : end, kept, 0, true};
}

template <class Key>
struct BracketStorage {
  RadixStorage<Key> radix;
  Key sample[kSample];
};

// Counts the keys of the sample that are in the interval, in the block's bins.
template <class Grid, class Key>
S2AP_DEVICE void count_sample(const Grid& grid, BracketStorage<Key>& storage, int size, const Progress<Key>& p) {
  clear_bins(grid, storage.radix);
  grid.block_barrier();
  for_each_element(
      grid, size, [&](int i) { return storage.sample[i]; },
      [&](int, bool valid, Key key) { count(grid, storage.radix.bins, valid && p.holds(key), p.bin(key)); });
  grid.block_barrier();
}

// Block-wide; 0 < kept < n.
template <class T, class Grid, class Reader>
S2AP_DEVICE Progress<KeyOf<T>> guess_bracket(const Grid& grid, BracketStorage<KeyOf<T>>& storage, const Reader& reader, int64_t n,
                                             uint32_t kept) {
  using Key = KeyOf<T>;
  bool sampled = n > kSample;
  int size = sampled ? kSample : static_cast<int>(n);
  uint64_t all = n, part = n / kSample;
  for_each_element(
      grid, size, [&](int i) { return reader.load(sampled ? (i * all / kSample) + (i * 0x9e3779b9u * part >> 32) : i); },
      [&](int i, bool valid, auto raw) {
        if (valid) storage.sample[i] = Digits<T>::of(reader.score(raw));
      });

  double fraction = static_cast<double>(kept) / static_cast<double>(n), mean = size * fraction;
  double margin = 4 * square_root(mean * (1 - fraction)) + 4;
  int lower = static_cast<int>(mean + margin), upper = static_cast<int>(mean - margin);  // ranks of the bracket's ends
  if (!sampled) lower = upper = static_cast<int>(kept);                                  // the product above may have lost it
  bool has_lo = lower <= size, has_hi = upper >= 1;
  auto all_keys = [&](int rank) {
    return Progress<Key>{0, Digits<T>::kEnd, static_cast<uint32_t>(rank), static_cast<uint32_t>(size - rank), false};
  };
  auto is_wide = [&](const Progress<Key>& p) { return !p.is_found() && p.need + p.spare > (sampled ? kClose : 0); };
  Progress<Key> lo = all_keys(has_lo ? lower : upper), hi = all_keys(has_hi ? upper : lower);
  for (;;) {
    bool low = is_wide(lo), high = is_wide(hi), together = lo.lo == hi.lo && lo.hi == hi.hi;
    if (!low && !high) break;
    if (low) {
      count_sample(grid, storage, size, lo);
      split(grid, storage.radix, storage.radix.bins, lo);
    }
    if (high) {
      if (!together) count_sample(grid, storage, size, hi);
      split(grid, storage.radix, storage.radix.bins, hi);
    }
  }
  Key first = has_lo ? lo.lo : 0, end = has_hi ? hi.hi : Digits<T>::kEnd;
  return {first, end, kept, 0, end - first > 1};
}

}  // namespace s2ap::cuda
