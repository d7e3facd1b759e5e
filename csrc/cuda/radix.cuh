// Exact selection of the `kept` largest keys of every layer, and the masked weights, by radix histograms. select.cu and perturb.cu
// are this with two ways to read a score.
//
// Prepare  zero the histograms, start the cuts' rows.                                                      -- grid barrier
// Digit d  from the top of the key: every block counts, for the elements that agree with the cut key so far,
//          how often each value of digit d occurs, in shared memory, and adds its counts to the layer's.   -- grid barrier
//          Every block then walks the layer's counts from the top, to the digit of the cut key.
// Apply    the cut key is known: write the masked weights as if every element with that key stayed, and count those per chunk.
//                                                                                                          -- grid barrier
// Settle   usually one chunk per layer has work: of the elements with the cut key, the first `spare` in index order go.
//
// All counts are integers, so their sums do not depend on the order in which blocks arrive, and the cut is that of a stable sort.
// Blocks carry nothing in registers or shared memory from one phase to the next, so a phase may as well be a launch of its own.
// What one phase writes and a later one reads has a single writer: the block that holds the layer's first chunk.
#pragma once

#include <type_traits>

#include "number.cuh"
#include "table.cuh"

namespace s2ap::cuda {

// The key's significant bits in digits of at most 11 bits: float 11 + 11 + 9, double 5 * 11 + 8, float16 9 + 9, bfloat16 8 + 7.
template <class T>
struct Digits {
  // Keys of half-precision scores are those of the widened floats, whose last bits are 0.
  static constexpr int kZeros = sizeof(T) > 2 ? 0 : std::is_same_v<T, Float16> ? 13 : 16;
  static constexpr int kBits = KeyTraits<KeyOf<T>>::kBits - kZeros;
  static constexpr int kCount = (kBits + 10) / 11;
  static constexpr int kWidth = (kBits + kCount - 1) / kCount;
  static constexpr int kBins = 1 << kWidth;

  // How many bits of the key lie below digit d; d = -1: below nothing.
  static S2AP_HD int below(int d) {
    int bits = kBits - (d + 1) * kWidth;
    return kZeros + (bits > 0 ? bits : 0);
  }
  static S2AP_HD int bins(int d) { return 1 << (below(d - 1) - below(d)); }
};

template <class T>
struct Layer {
  const T* scores;
  const T* grads;  // perturb only
  const T* weights;
  T* masked;  // may be weights
  int64_t n;
  Pattern pattern;
};

// How far a layer's search has come. Of the elements whose key begins with prefix, need stay and spare go.
template <class Key>
struct Progress {
  Key prefix;
  uint32_t need, spare;
};

template <class T>
struct Selection {
  using Key = KeyOf<T>;

  Table<Layer<T>> table;
  const int64_t* kept;  // [layers]
  int64_t* cuts;        // [layers, kCutColumns]
  // Workspace, not initialised.
  uint32_t* histograms;     // [layers, Digits::kCount, Digits::kBins]
  Progress<Key>* progress;  // [layers, Digits::kCount + 1]; entry d: when digit d is about to be found
  uint32_t* ties;           // [chunks]: elements with the cut key
};

// Calls array(pointer, length) for each array of the workspace; whoever launches provides them.
template <class T, class Array>
void for_each_array(Selection<T>& s, Array&& array) {
  array(s.histograms, static_cast<int64_t>(s.table.layers) * Digits<T>::kCount * Digits<T>::kBins);
  array(s.progress, static_cast<int64_t>(s.table.layers) * (Digits<T>::kCount + 1));
  array(s.ties, s.table.chunks());
}

template <class T>
struct SelectionStorage {
  uint32_t bins[Digits<T>::kBins];
  Progress<KeyOf<T>> found;
  ScanStorage scan;
};

// By-products of the apply phase, per thread; they end up in the layer's row of cuts.
struct Tally {
  int nans = 0, flips = 0, signs = 0;
};

template <class Grid>
S2AP_DEVICE void add_tally(const Grid& grid, int64_t* cut, const Tally& tally) {
  for (int column = kNans; column <= kSigns; ++column) {
    int mine = column == kNans ? tally.nans : column == kFlips ? tally.flips : tally.signs;
    if (grid.ballot(mine != 0) == 0) continue;
    int sum = warp_sum(grid, mine);
    if (grid.lane() == 0) grid.atomic_add(cut + column, static_cast<int64_t>(sum));
  }
}

template <class T>
S2AP_DEVICE Progress<KeyOf<T>> start(const Selection<T>& s, int layer) {
  int64_t n = s.table.rows[layer].n, kept = s.kept[layer];
  kept = kept < 0 ? 0 : kept > n ? n : kept;
  return {0, static_cast<uint32_t>(kept), static_cast<uint32_t>(n - kept)};
}

// Where all or none stay, the cut is known from the start.
template <class Key>
S2AP_DEVICE bool is_decided(const Progress<Key>& start) {
  return start.need == 0 || start.spare == 0;
}
template <class Key>
S2AP_DEVICE int64_t decided_key(const Progress<Key>& start) {
  return start.need == 0 ? kKeepNone : 0;
}

template <class T>
S2AP_DEVICE uint32_t* histogram(const Selection<T>& s, int layer, int d) {
  return s.histograms + (static_cast<int64_t>(layer) * Digits<T>::kCount + d) * Digits<T>::kBins;
}

template <class T>
S2AP_DEVICE Progress<KeyOf<T>>* progress(const Selection<T>& s, int layer, int d) {
  return s.progress + layer * (Digits<T>::kCount + 1) + d;
}

// ---- Prepare

template <class Grid, class T>
S2AP_DEVICE void prepare(const Grid& grid, const Selection<T>& s) {
  int64_t thread = static_cast<int64_t>(grid.block()) * grid.threads() + grid.thread();
  int64_t threads = static_cast<int64_t>(grid.blocks()) * grid.threads();
  int64_t bins = static_cast<int64_t>(s.table.layers) * Digits<T>::kCount * Digits<T>::kBins;
  for (int64_t i = thread; i < bins; i += threads) s.histograms[i] = 0;
  for (int64_t i = thread; i < s.table.chunks(); i += threads) s.ties[i] = 0;
  for (int64_t layer = thread; layer < s.table.layers; layer += threads) {
    Progress<KeyOf<T>> from = start(s, static_cast<int>(layer));
    int64_t* cut = s.cuts + layer * kCutColumns;
    for (int column = 0; column < kCutColumns; ++column) cut[column] = 0;
    if (is_decided(from)) cut[kKey] = decided_key(from);
    *progress(s, static_cast<int>(layer), 0) = from;
  }
}

// ---- Digits

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

// Digit d of the cut key, from the layer's counts: walks down from the highest bin until `need` elements are passed.
// Block-wide; every thread gets the result, and the layer's owner notes it down for later phases.
template <class Grid, class T>
S2AP_DEVICE Progress<KeyOf<T>> find_digit(const Grid& grid, const Selection<T>& s, SelectionStorage<T>& storage, int layer, int d,
                                          bool owner) {
  const uint32_t* bins = histogram(s, layer, d);
  Progress<KeyOf<T>> from = *progress(s, layer, d);
  int count = Digits<T>::bins(d);
  int each = (count + static_cast<int>(grid.threads()) - 1) / static_cast<int>(grid.threads());
  int top = count - 1 - static_cast<int>(grid.thread()) * each;  // this thread's highest bin
  uint32_t mine = 0;
  for (int bin = top; bin > top - each && bin >= 0; --bin) mine += bins[bin];
  uint32_t above = block_scan(grid, storage.scan, mine).before;
  if (above < from.need && from.need - above <= mine) {
    int bin = top;
    for (; above + bins[bin] < from.need; --bin) above += bins[bin];
    uint32_t need = from.need - above;
    storage.found = {static_cast<KeyOf<T>>(from.prefix * count + bin), need, bins[bin] - need};
  }
  grid.block_barrier();
  Progress<KeyOf<T>> found = storage.found;
  if (owner && grid.thread() == 0) *progress(s, layer, d + 1) = found;
  return found;
}

// Reader: how the key of a score is made, and the by-products of applying the mask.
//   Raw load(i)                          what element i is made from
//   Compute<T> score(raw)                the score to be ranked
//   void tally(raw, score, i, keep, t)   adds element i to the by-products
//   void drop(raw, i, t)                 mends them where element i, which was to stay, goes after all
// args.reader(layer) makes one.

template <class Grid, class Args, class T>
S2AP_DEVICE void count_digit(const Grid& grid, const Args& args, SelectionStorage<T>& storage, int d) {
  using Key = KeyOf<T>;
  const Selection<T>& s = args.selection;
  for_each_segment(grid, s.table, [&](Segment segment) {
    const Layer<T>& row = s.table.rows[segment.layer];
    if (row.pattern.kind != kWeight || is_decided(start(s, segment.layer))) return;
    Key prefix = d == 0 ? Key{0} : find_digit(grid, s, storage, segment.layer, d - 1, segment.begin == 0).prefix;
    int bins = Digits<T>::bins(d), low = Digits<T>::below(d), high = Digits<T>::below(d - 1);
    for (int bin = static_cast<int>(grid.thread()); bin < bins; bin += static_cast<int>(grid.threads())) storage.bins[bin] = 0;
    grid.block_barrier();
    auto reader = args.reader(segment.layer);
    for (int64_t chunk = segment.begin; chunk < segment.end; ++chunk) {
      int64_t first = chunk * kChunk;
      for_each_element(
          grid, chunk_length(row.n, chunk), [&](int j) { return reader.load(first + j); },
          [&](int, bool valid, auto raw) {
            Key key = key_of(reader.score(raw));
            count(grid, storage.bins, valid && key >> high == prefix, static_cast<uint32_t>(key >> low) & (bins - 1));
          });
    }
    grid.block_barrier();
    // No barrier after this: the thread that reads a bin here is the one that clears it for the next segment.
    uint32_t* total = histogram(s, segment.layer, d);
    for (int bin = static_cast<int>(grid.thread()); bin < bins; bin += static_cast<int>(grid.threads())) {
      if (storage.bins[bin] != 0) grid.atomic_add(total + bin, storage.bins[bin]);
    }
  });
}

// ---- Apply

template <class Grid, class Args, class T>
S2AP_DEVICE void apply(const Grid& grid, const Args& args, SelectionStorage<T>& storage) {
  using Key = KeyOf<T>;
  const Selection<T>& s = args.selection;
  for_each_segment(grid, s.table, [&](Segment segment) {
    const Layer<T>& row = s.table.rows[segment.layer];
    if (row.pattern.kind != kWeight) return;
    Progress<Key> from = start(s, segment.layer);
    bool decided = is_decided(from);
    Key cut_key;
    if (decided) {
      cut_key = static_cast<Key>(decided_key(from));
    } else {
      bool owner = segment.begin == 0;
      cut_key = find_digit(grid, s, storage, segment.layer, Digits<T>::kCount - 1, owner).prefix << Digits<T>::kZeros;
      if (owner && grid.thread() == 0) s.cuts[segment.layer * kCutColumns + kKey] = static_cast<int64_t>(cut_key);
    }
    auto reader = args.reader(segment.layer);
    Tally tally;
    for (int64_t chunk = segment.begin; chunk < segment.end; ++chunk) {
      int64_t first = chunk * kChunk;
      using Raw = decltype(reader.load(0));
      struct Element {
        Raw raw;
        T weight;
      };
      uint32_t ties = 0;
      for_each_element(
          grid, chunk_length(row.n, chunk), [&](int j) { return Element{reader.load(first + j), row.weights[first + j]}; },
          [&](int j, bool valid, const Element& element) {
            if (!valid) return;
            auto score = reader.score(element.raw);
            Key key = key_of(score);
            bool keep = key >= cut_key;
            row.masked[first + j] = keep ? element.weight : T{};
            ties += key == cut_key;
            tally.nans += key > KeyTraits<Key>::kInfinityKey;
            reader.tally(element.raw, score, first + j, keep, tally);
          });
      if (!decided && grid.ballot(ties != 0) != 0) {
        ties = warp_sum(grid, ties);
        if (grid.lane() == 0) grid.atomic_add(s.ties + s.table.first_chunk[segment.layer] + chunk, ties);
      }
    }
    add_tally(grid, s.cuts + segment.layer * kCutColumns, tally);
  });
}

// ---- Settle

// The ties of one chunk, `before` ties into the layer: the first `spare` of the layer go, the next one is the cut's index.
// Each warp takes a contiguous part of the chunk, counts its ties, and then ranks them.
template <class Grid, class Args, class T>
S2AP_DEVICE void settle_chunk(const Grid& grid, const Args& args, SelectionStorage<T>& storage, int layer, int64_t chunk, uint32_t before,
                              const Progress<KeyOf<T>>& cut) {
  const Selection<T>& s = args.selection;
  const Layer<T>& row = s.table.rows[layer];
  auto reader = args.reader(layer);
  KeyOf<T> cut_key = cut.prefix << Digits<T>::kZeros;
  int64_t first = chunk * kChunk;
  int length = chunk_length(row.n, chunk), warps = static_cast<int>(grid.warps()), lane = static_cast<int>(grid.lane());
  int part = (static_cast<int>(kChunk) / kWarp + warps - 1) / warps * kWarp;
  int begin = static_cast<int>(grid.warp()) * part, end = begin + part < length ? begin + part : length;
  auto is_tie = [&](int j) { return j < end && key_of(reader.score(reader.load(first + j))) == cut_key; };

  uint32_t mine = 0;
  for (int j = begin + lane; j < end; j += kWarp) mine += is_tie(j);
  Scan scan = block_scan(grid, storage.scan, mine);
  uint32_t rank = before + grid.shuffle(scan.before, 0);  // of the warp's next tie, within the layer

  Tally tally;
  for (int base = begin; base < end; base += kWarp) {
    int j = base + lane;
    bool tie = is_tie(j);
    uint32_t tied = grid.ballot(tie), lower = (1u << lane) - 1;
    if (tie) {
      uint32_t own = rank + count_bits(tied & lower);
      if (own < cut.spare) {
        row.masked[first + j] = T{};
        reader.drop(reader.load(first + j), first + j, tally);
      } else if (own == cut.spare) {
        s.cuts[layer * kCutColumns + kIndex] = first + j;
      }
    }
    rank += count_bits(tied);
  }
  add_tally(grid, s.cuts + layer * kCutColumns, tally);
}

template <class Grid, class Args, class T>
S2AP_DEVICE void settle(const Grid& grid, const Args& args, SelectionStorage<T>& storage) {
  const Selection<T>& s = args.selection;
  int threads = static_cast<int>(grid.threads()), thread = static_cast<int>(grid.thread());
  for_each_segment(grid, s.table, [&](Segment segment) {
    if (s.table.rows[segment.layer].pattern.kind != kWeight || is_decided(start(s, segment.layer))) return;
    Progress<KeyOf<T>> cut = *progress(s, segment.layer, Digits<T>::kCount);
    const uint32_t* ties = s.ties + s.table.first_chunk[segment.layer];
    uint32_t mine = 0;
    for (int64_t chunk = thread; chunk < segment.begin; chunk += threads) mine += ties[chunk];
    uint32_t before = block_scan(grid, storage.scan, mine).total;
    for (int64_t chunk = segment.begin; chunk < segment.end && before <= cut.spare; ++chunk) {
      if (ties[chunk] != 0) settle_chunk(grid, args, storage, segment.layer, chunk, before, cut);
      before += ties[chunk];
    }
  });
}

// ---- All of it

template <class T>
constexpr int kSelectionPhases = Digits<T>::kCount + 2;  // those after Prepare

template <class Grid, class Args, class T>
S2AP_DEVICE void selection_phase(const Grid& grid, const Args& args, SelectionStorage<T>& storage, int phase) {
  if (phase < Digits<T>::kCount) {
    count_digit(grid, args, storage, phase);
  } else if (phase == Digits<T>::kCount) {
    apply(grid, args, storage);
  } else {
    settle(grid, args, storage);
  }
}

}  // namespace s2ap::cuda
