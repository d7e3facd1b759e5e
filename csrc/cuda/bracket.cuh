// A guess where the kept-th largest key of a layer is: a bracket [lo, hi) from a small sample, four standard deviations of the sample's
// rank to either side. Counting the layer's keys proves or disproves it (selection.cuh); so whether it is right affects only the speed.
//
// The sample has one score of each of 4096 equal parts of the layer, at a fixed, irregular place. One block takes it: 8 loads of each of
// 512 threads, all in flight at once. Both ends of the bracket belong to it, so that it also holds a value that many scores share.
#pragma once

#include "radix.cuh"
#include "table.cuh"

namespace s2ap::cuda {

constexpr int kSample = 4096;
constexpr int64_t kSampledFrom = 8 * kSample;  // elements; a sample of less is as much work as the layer

template <class Key>
struct BracketStorage {
  RadixStorage<Key> radix;
  Key sample[kSample];
};

// The rank-th largest key of the sample.
template <class T, class Grid>
S2AP_DEVICE KeyOf<T> sampled_key(const Grid& grid, BracketStorage<KeyOf<T>>& storage, uint32_t rank) {
  Progress<KeyOf<T>> p{0, Digits<T>::kEnd, rank, 0, false};
  while (!p.is_found()) {
    clear_bins(grid, storage.radix);
    grid.block_barrier();
    for (int i = static_cast<int>(grid.thread()); i < kSample; i += static_cast<int>(grid.threads())) {
      KeyOf<T> key = storage.sample[i];
      count(grid, storage.radix.bins, p.holds(key), p.bin(key));
    }
    grid.block_barrier();
    split(grid, storage.radix, storage.radix.bins, p);
  }
  return p.lo;
}

// Block-wide; 0 < kept < n.
template <class T, class Grid, class Reader>
S2AP_DEVICE Progress<KeyOf<T>> guess_bracket(const Grid& grid, BracketStorage<KeyOf<T>>& storage, const Reader& reader, int64_t n,
                                             uint32_t kept) {
  uint64_t part = n / kSample;
  for_each_element(
      grid, kSample, [&](int i) { return reader.load(i * part + (i * 0x9e3779b9u * part >> 32)); },
      [&](int i, bool valid, auto raw) {
        if (valid) storage.sample[i] = Digits<T>::of(reader.score(raw));
      });
  grid.block_barrier();
  double fraction = static_cast<double>(kept) / static_cast<double>(n), mean = kSample * fraction;
  double margin = 4 * square_root(mean * (1 - fraction)) + 4;
  int upper = static_cast<int>(mean - margin), lower = static_cast<int>(mean + margin);
  KeyOf<T> lo = lower <= kSample ? sampled_key<T>(grid, storage, lower) : 0;
  KeyOf<T> hi = upper >= 1 ? sampled_key<T>(grid, storage, upper) + 1 : Digits<T>::kEnd;
  return {lo, hi, kept, 0, hi - lo > 1};
}

}  // namespace s2ap::cuda
