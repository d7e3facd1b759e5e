// Exact selection of the `kept` largest keys of every plain layer, and the masked weights. select.cu, perturb.cu and update_select.cu are
// this with three ways to read a score.
//
// Prepare  zero the counts.
// Guess    a bracket [lo, hi) around the kept-th largest key, the cut key, of each layer (bracket.cuh): from a sample, which is that key
//          itself in layers of no more elements than a sample, or from the cut that is known.               -- grid barrier
// Sweep    over the scores: one bit per element for whether its key is above the bracket, the count of these; the elements inside the
//          bracket go to their chunk's list, as key and place. Then pass 0 over the lists.                  -- grid barrier
// Pass p   every block walks the counts of pass p - 1 to the bin that holds the cut key (radix.cuh), and counts what the bin's elements
//          have for the next digit.                                                                         -- grid barrier
// Apply    the cut key is known and goes to `cuts`: the elements of the lists that reach it get their bits; then the bits say which weights
//          stay. Of the elements with the cut key, all stay for now; they are counted per chunk.            -- grid barrier
// Settle   usually one chunk per layer has work: of the elements with the cut key, the first `spare` in index order go.
//
// The counts of the sweep prove that the cut key is inside the bracket. If it is not, pass 1 starts again with the whole range of keys,
// and reads the scores themselves, as do chunks with more elements inside than their list takes. So the sample, and how the scores are
// arranged, affect only the speed. From the bracket on, two passes usually find the key; the others are left out with their barriers.
//
// Each chunk has a list of its own, so that nothing but integer counts passes between blocks: the result does not depend on their number or
// order, and the cut is that of a stable sort. Within a list the order is any; its elements are only counted, and their bits set.
// Blocks carry nothing in registers or shared memory from one phase to the next, so a phase may as well be a launch of its own.
// What one phase writes and a later one reads has a single writer: the block that holds the chunk, or the layer's first chunk.
//
// Until a chunk's masked weights are written, their memory is free: the lists and the bits lie there (Scratch). So the workspace has next
// to nothing for each element; masked weights must not share memory with anything else.
//
// Bytes per element beside those of the reader, float32: 1/8 written and 1/8 read for the bits, 4 + 4 for the weights and the masked
// weights; for each element inside the bracket, 4 % of those of a layer that keeps 10 % where a sample guesses, 2.5 % where the cut is
// known, 6 written and at most 14 read. The reader's bytes come once, but up to 5 times for layers without a bracket that holds: with the
// sweep, with each digit of pass 1 and later, and with the bits; and 2 or 3 times more for the chunks that have to be settled.
#pragma once

#include <utility>

#include "bracket.cuh"

namespace s2ap::cuda {

constexpr int kListed = kChunk / 4;      // elements of a chunk that its list takes
constexpr int kWords = kChunk / 32;      // of a bit per element
constexpr int kBatch = 64;               // chunks that a block counts the lists of at once
constexpr int kStaged = kBins / kWords;  // chunks whose bits fit the bins
constexpr int kHistograms = 3;           // of a layer: the one that is read, the one that is counted in, and the next, which is zeroed

template <class T>
struct Layer {
  const T* scores;
  const T* grads;  // perturb and update_select only
  const T* weights;
  T* masked;
  int64_t n;
  Pattern pattern;
};

// The sweep is pass 0. A bracket that does not hold takes all digits after it.
template <class T>
constexpr int kPasses = 1 + Digits<T>::kCount;
template <class T>
constexpr int kSelectionPhases = kPasses<T> + 2;  // those after Guess

// What is known of a chunk before its masked weights are written.
template <class T>
struct Scratch {
  KeyOf<T> keys[kListed];    // of the elements inside the bracket, in any order
  uint32_t stay[kWords];     // a bit for each element: whether it stays
  uint32_t stayed[kWords];   // where the sweep notes that down: whether it stayed so far
  uint16_t places[kListed];  // of the elements of keys, in the chunk
};

template <class T>
struct Selection {
  using Key = KeyOf<T>;

  Table<Layer<T>> table;
  const int64_t* kept;  // [layers]
  int64_t* cuts;        // [layers, kCutColumns]
  // Workspace, not initialised.
  uint32_t* histograms;     // [layers, kHistograms, kBins + 1]
  Progress<Key>* progress;  // [layers, kPasses + 1]; entry p: before pass p; the last: when the key is found
  uint32_t* wanted;         // [kPasses + 1]: whether any layer needs the pass
  uint32_t* inside;         // [chunks]: elements inside the bracket
  uint32_t* ties;           // [chunks]: elements with the cut key
  Scratch<T>* rests;        // [layers], of the chunk at the end, where it is shorter than others

  S2AP_DEVICE int64_t chunk_of(const Segment& segment, int64_t chunk) const { return table.first_chunk[segment.layer] + chunk; }
  S2AP_DEVICE Scratch<T>& scratch(int layer, int64_t chunk) const {
    static_assert(sizeof(Scratch<T>) + alignof(Scratch<T>) <= kChunk * sizeof(T));
    const Layer<T>& row = table.rows[layer];
    if ((chunk + 1) * kChunk > row.n) return rests[layer];
    uintptr_t address = reinterpret_cast<uintptr_t>(row.masked + chunk * kChunk);  // aligned as T is
    return *reinterpret_cast<Scratch<T>*>((address + alignof(Scratch<T>) - 1) / alignof(Scratch<T>) * alignof(Scratch<T>));
  }
};

// Calls array(pointer, length) for each array of the workspace; whoever launches provides them.
template <class T, class Array>
void for_each_array(Selection<T>& s, Array&& array) {
  int64_t layers = s.table.layers, chunks = s.table.chunks();
  array(s.histograms, layers * kHistograms * (kBins + 1));
  array(s.progress, layers * (kPasses<T> + 1));
  array(s.wanted, int64_t{kPasses<T> + 1});
  array(s.inside, chunks);
  array(s.ties, chunks);
  array(s.rests, layers);
}

template <class T>
struct SelectionStorage {
  BracketStorage<KeyOf<T>> bracket;
  uint32_t inside[kBatch];

  S2AP_DEVICE RadixStorage<KeyOf<T>>& radix() { return bracket.radix; }
};

// Reader: how the key of a score is made, and the by-products.
//   Raw load(i)                    what element i is made from
//   Compute<T> score(raw)          the score to be ranked
//   void tally(raw, score, t)      adds to the by-products what does not depend on the mask
//   kFlips; bool was_kept(raw, i)  whether mask entries that change are counted; if so, whether element i stayed so far
//   kNotes                         whether the sweep is to note that down; otherwise
//   uint32_t word_before(i)        has it for the 32 elements from i on
// args.reader(layer) makes one.

// What the reader of plain layers makes its scores from.
template <class Args>
using RawOf = typename decltype(std::declval<const Args&>().reader(0))::Raw;

// By-products, per thread; they end up in the layer's row of cuts.
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
S2AP_DEVICE uint32_t clamped_kept(const Selection<T>& s, int layer) {
  int64_t n = s.table.rows[layer].n, kept = s.kept[layer];
  return static_cast<uint32_t>(kept < 0 ? 0 : kept > n ? n : kept);
}

template <class T>
S2AP_DEVICE uint32_t* histogram(const Selection<T>& s, int layer, int pass) {
  return s.histograms + (static_cast<int64_t>(layer) * kHistograms + pass % kHistograms) * (kBins + 1);
}

template <class T>
S2AP_DEVICE Progress<KeyOf<T>>* progress(const Selection<T>& s, int layer, int pass) {
  return s.progress + layer * (kPasses<T> + 1) + pass;
}

// ---- Prepare and guess

// Zeroes what is added to. In the rows of cuts that is the counts: where a row holds the cut of before, other blocks may read its key and
// index in the same phase.
template <class Grid, class T>
S2AP_DEVICE void prepare(const Grid& grid, const Selection<T>& s) {
  int64_t thread = static_cast<int64_t>(grid.block()) * grid.threads() + grid.thread();
  int64_t threads = static_cast<int64_t>(grid.blocks()) * grid.threads();
  int64_t bins = static_cast<int64_t>(s.table.layers) * kHistograms * (kBins + 1);
  for (int64_t i = thread; i < bins; i += threads) s.histograms[i] = 0;
  for (int64_t i = thread; i < s.table.chunks(); i += threads) s.ties[i] = 0;
  for (int64_t i = thread; i <= kPasses<T>; i += threads) s.wanted[i] = 0;
  for (int64_t layer = thread; layer < s.table.layers; layer += threads) {
    int64_t* cut = s.cuts + layer * kCutColumns;
    for (int column = kNans; column <= kSigns; ++column) cut[column] = 0;
    if (s.table.rows[layer].n == 0) {  // nobody comes by there
      cut[kKey] = kKeepNone;
      cut[kIndex] = 0;
    }
  }
}

// The bracket of a layer, which bracket(kept) gives. Where all or none stay, the interval is empty, and below or above all keys.
template <class T, class Bracket>
S2AP_DEVICE Progress<KeyOf<T>> start(const Selection<T>& s, int layer, Bracket bracket) {
  uint32_t kept = clamped_kept(s, layer);
  if (kept == 0) return {Digits<T>::kEnd, Digits<T>::kEnd, kept, 0, false};
  if (kept == s.table.rows[layer].n) return {0, 0, kept, 0, false};
  return bracket(kept);
}

// Brackets from samples of the scores.
template <class Grid, class T, class MakeReader>
S2AP_DEVICE void guess(const Grid& grid, const Selection<T>& s, SelectionStorage<T>& storage, MakeReader make_reader) {
  for (int layer = static_cast<int>(grid.block()); layer < s.table.layers; layer += static_cast<int>(grid.blocks())) {
    const Layer<T>& row = s.table.rows[layer];
    if (row.pattern.kind != kWeight) continue;
    Progress<KeyOf<T>> p =
        start(s, layer, [&](uint32_t kept) { return guess_bracket<T>(grid, storage.bracket, make_reader(layer), row.n, kept); });
    if (grid.thread() == 0) *progress(s, layer, 0) = p;
  }
}

// Brackets around cuts that are known; one thread per layer.
template <class Grid, class T, class CutKey>
S2AP_DEVICE void guess_around(const Grid& grid, const Selection<T>& s, CutKey cut_key) {
  int64_t thread = static_cast<int64_t>(grid.block()) * grid.threads() + grid.thread();
  for (int64_t at = thread; at < s.table.layers; at += static_cast<int64_t>(grid.blocks()) * grid.threads()) {
    int layer = static_cast<int>(at);
    *progress(s, layer, 0) = start(s, layer, [&](uint32_t kept) { return bracket_around<T>(cut_key(layer), kept); });
  }
}

// ---- Passes

// Calls list(chunk, length) with a warp for each chunk of the segment whose elements inside the interval are all in its list,
// and scan(chunk) with the block for each other one.
template <class Grid, class T, class List, class Scan>
S2AP_DEVICE void for_each_chunk(const Grid& grid, const Selection<T>& s, SelectionStorage<T>& storage, const Segment& segment, bool listed,
                                List list, Scan scan) {
  const uint32_t* inside = s.inside + s.chunk_of(segment, 0);
  if (listed) {
    uint32_t overflows = 0;
    for (int64_t chunk = segment.begin + grid.thread(); chunk < segment.end; chunk += grid.threads()) overflows += inside[chunk] > kListed;
    for (int64_t chunk = segment.begin + grid.warp(); chunk < segment.end; chunk += grid.warps()) {
      if (inside[chunk] <= kListed) list(chunk, static_cast<int>(inside[chunk]));
    }
    if (block_scan(grid, storage.radix().scan, overflows).total == 0) return;
  }
  for (int64_t chunk = segment.begin; chunk < segment.end; ++chunk) {
    if (!listed || inside[chunk] > kListed) scan(chunk);
  }
}

// Counts the keys of the segment that are in the interval, in the block's bins.
template <class Grid, class Args, class T>
S2AP_DEVICE void count_keys(const Grid& grid, const Args& args, SelectionStorage<T>& storage, const Segment& segment,
                            const Progress<KeyOf<T>>& p) {
  using Key = KeyOf<T>;
  const Selection<T>& s = args.selection;
  const Layer<T>& row = s.table.rows[segment.layer];
  uint32_t* bins = storage.radix().bins;
  auto reader = args.reader(segment.layer);
  for_each_chunk(
      grid, s, storage, segment, p.listed,
      [&](int64_t chunk, int length) {
        const Key* keys = s.scratch(segment.layer, chunk).keys;
        for_each_element(
            OneWarp{grid.lane()}, length, [&](int j) { return keys[j]; },
            [&](int, bool valid, Key key) { count(grid, bins, valid && p.holds(key), p.bin(key)); });
      },
      [&](int64_t chunk) {
        int64_t first = chunk * kChunk;
        for_each_element<kUnrollOf<RawOf<Args>>>(
            grid, chunk_length(row.n, chunk), [&](int j) { return reader.load(first + j); },
            [&](int, bool valid, auto raw) {
              Key key = Digits<T>::of(reader.score(raw));
              count(grid, bins, valid && p.holds(key), p.bin(key));
            });
      });
}

// Adds the block's bins to the layer's. No barrier after this: the thread that reads a bin here is the one that clears it for the next
// segment.
template <class Grid, class T>
S2AP_DEVICE void add_bins(const Grid& grid, const Selection<T>& s, SelectionStorage<T>& storage, int layer, int pass) {
  grid.block_barrier();
  uint32_t* total = histogram(s, layer, pass);
  for (int bin = static_cast<int>(grid.thread()); bin <= kBins; bin += static_cast<int>(grid.threads())) {
    uint32_t mine = storage.radix().bins[bin];
    if (mine != 0) grid.atomic_add(total + bin, mine);
  }
}

template <class Grid, class Args, class T>
S2AP_DEVICE void sweep(const Grid& grid, const Args& args, SelectionStorage<T>& storage) {
  using Key = KeyOf<T>;
  using Reader = decltype(args.reader(0));
  const Selection<T>& s = args.selection;
  for_each_segment(grid, s.table, [&](Segment segment) {
    const Layer<T>& row = s.table.rows[segment.layer];
    if (row.pattern.kind != kWeight) return;
    Progress<Key> p = *progress(s, segment.layer, 0);
    uint32_t* bins = storage.radix().bins;
    Reader reader = args.reader(segment.layer);
    Tally tally;
    uint32_t above = 0;
    clear_bins(grid, storage.radix());
    for (int64_t batch = segment.begin; batch < segment.end; batch += kBatch) {
      int64_t end = batch + kBatch < segment.end ? batch + kBatch : segment.end;
      for (int i = static_cast<int>(grid.thread()); i < kBatch; i += static_cast<int>(grid.threads())) storage.inside[i] = 0;
      grid.block_barrier();
      for (int64_t chunk = batch; chunk < end; ++chunk) {
        int64_t first = chunk * kChunk;
        Scratch<T>& scratch = s.scratch(segment.layer, chunk);
        for_each_element<kUnrollOf<RawOf<Args>>>(
            grid, chunk_length(row.n, chunk), [&](int j) { return reader.load(first + j); },
            [&](int j, bool valid, auto raw) {
              auto score = reader.score(raw);
              Key key = Digits<T>::of(score);
              bool inside = valid && p.holds(key), beyond = valid && key >= p.hi;
              uint32_t word = grid.ballot(beyond);
              if (valid && grid.lane() == 0) scratch.stay[j / 32] = word;
              if constexpr (Reader::kNotes) {
                word = grid.ballot(valid && reader.was_kept(raw, first + j));
                if (valid && grid.lane() == 0) scratch.stayed[j / 32] = word;
              }
              above += beyond;
              if (!p.listed) {
                count(grid, bins, inside, p.bin(key));
              } else if (inside) {
                uint32_t free = grid.atomic_add(&storage.inside[chunk - batch], 1u);
                if (free < kListed) {
                  scratch.keys[free] = key;
                  scratch.places[free] = static_cast<uint16_t>(j);
                }
              }
              tally.nans += valid && key > Digits<T>::kInfinity;
              if (valid) reader.tally(raw, score, tally);
            });
      }
      grid.block_barrier();
      for (int64_t i = grid.thread(); i < end - batch; i += grid.threads()) s.inside[s.chunk_of(segment, batch + i)] = storage.inside[i];
    }
    above = warp_sum(grid, above);
    if (grid.lane() == 0) grid.atomic_add(bins + kBins, above);
    if (p.listed) {
      grid.block_barrier();  // the lists and their lengths are complete
      count_keys(grid, args, storage, segment, p);
    }
    add_bins(grid, s, storage, segment.layer, 0);
    add_tally(grid, s.cuts + segment.layer * kCutColumns, tally);
  });
}

// Where the search of a layer is after a pass, from its counts. Block-wide.
template <class Grid, class T>
S2AP_DEVICE Progress<KeyOf<T>> found_by(const Grid& grid, const Selection<T>& s, SelectionStorage<T>& storage, int layer, int pass) {
  Progress<KeyOf<T>> p = *progress(s, layer, pass);
  if (p.is_empty() || (pass > 0 && p.is_found())) return p;
  const uint32_t* bins = histogram(s, layer, pass);
  uint32_t kept = p.need;
  if (pass == 0) p.need = kept > bins[kBins] ? kept - bins[kBins] : 0;
  if (!split(grid, storage.radix(), bins, p)) p = {0, Digits<T>::kEnd, kept, 0, false};  // pass 0 was a miss
  return p;
}

// Pass 1 and later.
template <class Grid, class Args, class T>
S2AP_DEVICE void count_pass(const Grid& grid, const Args& args, SelectionStorage<T>& storage, int pass) {
  const Selection<T>& s = args.selection;
  for_each_segment(grid, s.table, [&](Segment segment) {
    if (s.table.rows[segment.layer].pattern.kind != kWeight) return;
    Progress<KeyOf<T>> p = found_by(grid, s, storage, segment.layer, pass - 1);
    bool found = p.is_found();
    if (segment.begin == 0 && grid.thread() == 0) {
      *progress(s, segment.layer, pass) = p;
      if (!found && p.shift() > 0) grid.atomic_add(s.wanted + pass + 1, 1u);
    }
    if (found) return;
    if (segment.begin == 0 && pass > 1) {  // the next pass's, which nobody reads any more; the first three are zero already
      uint32_t* next = histogram(s, segment.layer, pass + 1);
      for (int bin = static_cast<int>(grid.thread()); bin <= kBins; bin += static_cast<int>(grid.threads())) next[bin] = 0;
    }
    clear_bins(grid, storage.radix());
    grid.block_barrier();
    count_keys(grid, args, storage, segment, p);
    add_bins(grid, s, storage, segment.layer, pass);
  });
}

// Whether a phase after Guess has nothing to do in any plain layer. The same to all threads, from the barrier in front of it on.
template <class T>
S2AP_DEVICE bool is_idle(const Selection<T>& s, int phase) {
  return phase > 1 && phase < kPasses<T> && s.wanted[phase] == 0;
}

// ---- Apply

// The bits of the elements that reach the cut key, and the counts of those that have it.
template <class Grid, class Args, class T>
S2AP_DEVICE void mark(const Grid& grid, const Args& args, SelectionStorage<T>& storage, const Segment& segment,
                      const Progress<KeyOf<T>>& cut) {
  using Key = KeyOf<T>;
  struct Entry {
    Key key;
    uint16_t place;
  };
  const Selection<T>& s = args.selection;
  const Layer<T>& row = s.table.rows[segment.layer];
  auto reader = args.reader(segment.layer);
  auto add_ties = [&](int64_t at, uint32_t ties) {
    if (grid.ballot(ties != 0) == 0) return;
    ties = warp_sum(grid, ties);
    if (grid.lane() == 0) grid.atomic_add(s.ties + at, ties);
  };
  for_each_chunk(
      grid, s, storage, segment, cut.listed,
      [&](int64_t chunk, int length) {
        Scratch<T>& scratch = s.scratch(segment.layer, chunk);
        uint32_t ties = 0;
        for_each_element(
            OneWarp{grid.lane()}, length, [&](int j) { return Entry{scratch.keys[j], scratch.places[j]}; },
            [&](int, bool valid, const Entry& entry) {
              if (!valid || entry.key < cut.lo) return;
              grid.atomic_or(scratch.stay + entry.place / 32, 1u << entry.place % 32);
              ties += entry.key == cut.lo;
            });
        add_ties(s.chunk_of(segment, chunk), ties);
      },
      [&](int64_t chunk) {
        int64_t first = chunk * kChunk;
        Scratch<T>& scratch = s.scratch(segment.layer, chunk);
        uint32_t ties = 0;
        for_each_element<kUnrollOf<RawOf<Args>>>(
            grid, chunk_length(row.n, chunk), [&](int j) { return reader.load(first + j); },
            [&](int j, bool valid, auto raw) {
              Key key = Digits<T>::of(reader.score(raw));
              uint32_t word = grid.ballot(valid && key >= cut.lo);
              if (valid && grid.lane() == 0) scratch.stay[j / 32] = word;
              ties += valid && key == cut.lo;
            });
        add_ties(s.chunk_of(segment, chunk), ties);
      });
}

// The masked weights of a segment, and the flips, from the bits. The weights take the bits' place, so those move to the bins first.
template <class Grid, class Args, class T>
S2AP_DEVICE void write_masked(const Grid& grid, const Args& args, SelectionStorage<T>& storage, const Segment& segment) {
  const Selection<T>& s = args.selection;
  const Layer<T>& row = s.table.rows[segment.layer];
  [[maybe_unused]] auto reader = args.reader(segment.layer);
  using Reader = decltype(reader);
  uint32_t* staged = storage.radix().bins;
  Tally tally;
  for (int64_t begin = segment.begin; begin < segment.end; begin += kStaged) {
    int64_t end = begin + kStaged < segment.end ? begin + kStaged : segment.end, last = (row.n + 31) / 32 - begin * kWords;
    int words = static_cast<int>(last < (end - begin) * kWords ? last : (end - begin) * kWords);
    for (int word = static_cast<int>(grid.thread()); word < words; word += static_cast<int>(grid.threads())) {
      const Scratch<T>& scratch = s.scratch(segment.layer, begin + word / kWords);
      uint32_t stay = scratch.stay[word % kWords];
      staged[word] = stay;
      if constexpr (Reader::kNotes) {
        tally.flips += static_cast<int>(count_bits(stay ^ scratch.stayed[word % kWords]));
      } else if constexpr (Reader::kFlips) {
        tally.flips += static_cast<int>(count_bits(stay ^ reader.word_before(begin * kChunk + word * 32)));
      }
    }
    grid.block_barrier();
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      int64_t first = chunk * kChunk;
      const uint32_t* stay = staged + (chunk - begin) * kWords;
      for_each_element(
          grid, chunk_length(row.n, chunk), [&](int j) { return row.weights[first + j]; },
          [&](int j, bool valid, T weight) {
            if (valid) row.masked[first + j] = stay[j / 32] >> j % 32 & 1 ? weight : T{};
          });
    }
    grid.block_barrier();
  }
  if constexpr (Reader::kFlips) add_tally(grid, s.cuts + segment.layer * kCutColumns, tally);
}

template <class Grid, class Args, class T>
S2AP_DEVICE void apply(const Grid& grid, const Args& args, SelectionStorage<T>& storage) {
  const Selection<T>& s = args.selection;
  int last = 1;
  while (last + 1 < kPasses<T> && s.wanted[last + 1] != 0) ++last;
  for_each_segment(grid, s.table, [&](Segment segment) {
    const Layer<T>& row = s.table.rows[segment.layer];
    if (row.pattern.kind != kWeight) return;
    Progress<KeyOf<T>> cut = found_by(grid, s, storage, segment.layer, last);
    if (segment.begin == 0 && grid.thread() == 0) {
      *progress(s, segment.layer, kPasses<T>) = cut;
      int64_t* found = s.cuts + segment.layer * kCutColumns;
      found[kKey] = !cut.is_empty() ? static_cast<int64_t>(cut.lo << Digits<T>::kZeros) : cut.lo == 0 ? 0 : kKeepNone;
      found[kIndex] = 0;
    }
    if (!cut.is_empty()) {
      mark(grid, args, storage, segment, cut);
      grid.block_barrier();  // these bits are of this block's chunks
    }
    write_masked(grid, args, storage, segment);
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
  int64_t first = chunk * kChunk;
  int length = chunk_length(row.n, chunk), warps = static_cast<int>(grid.warps()), lane = static_cast<int>(grid.lane());
  int part = (static_cast<int>(kChunk) / kWarp + warps - 1) / warps * kWarp;
  int begin = static_cast<int>(grid.warp()) * part, end = begin + part < length ? begin + part : length;
  auto is_tie = [&](int j) { return j < end && Digits<T>::of(reader.score(reader.load(first + j))) == cut.lo; };

  uint32_t mine = 0;
  for (int j = begin + lane; j < end; j += kWarp) mine += is_tie(j);
  Scan scan = block_scan(grid, storage.radix().scan, mine);
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
        if constexpr (decltype(reader)::kFlips) tally.flips += reader.was_kept(reader.load(first + j), first + j) ? 1 : -1;
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
    if (s.table.rows[segment.layer].pattern.kind != kWeight) return;
    Progress<KeyOf<T>> cut = *progress(s, segment.layer, kPasses<T>);
    if (cut.is_empty()) return;
    const uint32_t* ties = s.ties + s.table.first_chunk[segment.layer];
    uint32_t mine = 0;
    for (int64_t chunk = thread; chunk < segment.begin; chunk += threads) mine += ties[chunk];
    uint32_t before = block_scan(grid, storage.radix().scan, mine).total;
    for (int64_t chunk = segment.begin; chunk < segment.end && before <= cut.spare; ++chunk) {
      if (ties[chunk] != 0) settle_chunk(grid, args, storage, segment.layer, chunk, before, cut);
      before += ties[chunk];
    }
  });
}

// ---- All of it

template <class Grid, class Args, class T>
S2AP_DEVICE void selection_phase(const Grid& grid, const Args& args, SelectionStorage<T>& storage, int phase) {
  if (phase == 0) {
    sweep(grid, args, storage);
  } else if (phase < kPasses<T>) {
    count_pass(grid, args, storage, phase);
  } else if (phase == kPasses<T>) {
    apply(grid, args, storage);
  } else {
    settle(grid, args, storage);
  }
}

}  // namespace s2ap::cuda
