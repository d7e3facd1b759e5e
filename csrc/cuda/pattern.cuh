// Layers that are pruned by a pattern (reference.Pattern). Their work rides on the phases of the plain selection, which passes them over.
//
// Windows  phase 0: every thread ranks its own element within its window. The others of the window come out of the L1 cache, since
//          the neighbours of the thread rank those.
// Groups   Sum    sum|s| of each group in the order of reference.group_sums, a warp for each chunk of a group, and then the chunks'
//                 sums level by level as in sums.cuh.                                       -- a grid barrier for each level
//          Cut    a warp for each group counts the groups that rank above it: the one with kept - 1 above it is the cut. That is
//                 quadratic in the number of groups, and for the thousands that a layer has, less work than reading it.  -- grid barrier
//          Apply  every element looks up the sum of its group.
//
// Whether an element stayed before, for the flips, is a question that each op answers in its own way, by one of the masks below.
#pragma once

#include "selection.cuh"
#include "sums.cuh"

namespace s2ap::cuda {

// Scores as they are.
template <class T>
struct ScoreReader {
  using Raw = T;
  static constexpr bool kFlips = false, kNotes = false;
  const T* scores;

  S2AP_DEVICE Raw load(int64_t i) const { return scores[i]; }
  S2AP_DEVICE Compute<T> score(Raw raw) const { return widen(raw); }
  S2AP_DEVICE void tally(Raw, Compute<T>, Tally&) const {}
};

// ---- Masks: bool keeps(key, i), key being that of element i.

struct Cut {
  int64_t key, index;

  S2AP_DEVICE bool is_reached(int64_t other_key, int64_t other_index) const {
    return other_key > key || (other_key == key && other_index >= index);
  }
};

// In as few bits as the keys have; layers have fewer than 2^32 elements.
template <class Key>
struct CutMask {
  Key key;
  uint32_t index;

  S2AP_DEVICE explicit CutMask(const Cut& cut)
      : key(static_cast<uint64_t>(cut.key) > Key(-1) ? Key(-1) : static_cast<Key>(cut.key)), index(static_cast<uint32_t>(cut.index)) {}

  S2AP_DEVICE bool keeps(Key other, int64_t i) const { return other > key || (other == key && static_cast<uint32_t>(i) >= index); }
};

// One bit per element.
struct BitMask {
  const uint32_t* words;

  template <class Key>
  S2AP_DEVICE bool keeps(Key, int64_t i) const {
    return words[i / 32] >> (i % 32) & 1;
  }
};

S2AP_DEVICE uint32_t place_of(const Pattern& pattern, int64_t i) {  // layers have fewer than 2^32 elements
  return static_cast<uint32_t>(i) / static_cast<uint32_t>(pattern.block) % static_cast<uint32_t>(pattern.size);
}

// Element i stays iff fewer than `kept` of its window rank above it.
template <class Reader>
struct WindowMask {
  Pattern pattern;
  int64_t kept;
  Reader reader;

  template <class Key>
  S2AP_DEVICE bool keeps(Key key, int64_t i) const {
    int size = static_cast<int>(pattern.size), place = static_cast<int>(place_of(pattern, i)), above = 0;
    int64_t first = i - place * pattern.block;
    for (int other = 0; other < size; ++other) {
      Key others = key_of(reader.score(reader.load(first + other * pattern.block)));
      above += others > key || (others == key && other > place);
    }
    return above < kept;
  }
};

// Groups of the layers that have any. The sums of a quantity lie as in Sums: those of chunk j of a layer's group g at
// quantity * chunks + first_chunk + g * (chunks of a group) + j. Quantity 0 is taken at the new scores, 1 at those before.
struct Groups {
  double* level[2];  // [quantities * chunks] each
  int64_t first_chunk[kMaxLayers];
  int64_t chunks = 0;
  int levels = 0;    // 0: no layer has groups
  bool any = false;  // whether there are patterns at all
  int quantities = 1;

  template <class T>
  void take(const Table<Layer<T>>& table, int new_quantities) {
    quantities = new_quantities;
    for (int layer = 0; layer < table.layers; ++layer) {
      const Layer<T>& row = table.rows[layer];
      first_chunk[layer] = chunks;
      any |= row.pattern.kind != kWeight;
      if (row.pattern.kind != kGroup) continue;
      int64_t each = chunks_of_group(row);
      chunks += row.pattern.size * each;
      int needed = 1;
      for (int64_t left = each; left > 1; left = (left + kChunk - 1) / kChunk) ++needed;
      if (needed > levels) levels = needed;
    }
  }
  template <class T>
  static S2AP_HD int64_t chunks_of_group(const Layer<T>& row) {
    return (row.n / row.pattern.size + kChunk - 1) / kChunk;
  }
};

template <class Array>
void for_each_array(Groups& groups, Array&& array) {
  for (double*& level : groups.level) array(level, groups.quantities * groups.chunks);
}

// The ranking key of a group; every NaN is the same one.
S2AP_DEVICE int64_t group_key(double sum) {
  uint64_t key = key_of(sum);
  return key > KeyTraits<uint64_t>::kInfinityKey ? 0x7ff8000000000000 : static_cast<int64_t>(key);
}

// All elements of the groups that reach the cut stay.
struct GroupMask {
  Pattern pattern;
  const double* sums;
  int64_t stride;
  Cut cut;

  template <class T>
  S2AP_DEVICE GroupMask(const Groups& groups, const Table<Layer<T>>& table, int layer, int quantity, Cut cut)
      : pattern(table.rows[layer].pattern),
        sums(groups.level[(groups.levels - 1) % 2] + quantity * groups.chunks + groups.first_chunk[layer]),
        stride(Groups::chunks_of_group(table.rows[layer])),
        cut(cut) {}

  S2AP_DEVICE int64_t key(int64_t group) const { return group_key(sums[group * stride]); }
  template <class Key>
  S2AP_DEVICE bool keeps(Key, int64_t i) const {
    uint32_t group = place_of(pattern, i);
    return cut.is_reached(key(group), group);
  }
};

// ---- Counts and cuts

template <class T>
S2AP_DEVICE int64_t kept_of_pattern(const Selection<T>& s, int layer) {
  int64_t size = s.table.rows[layer].pattern.size, kept = s.kept[layer];
  return kept < 0 ? 0 : kept > size ? size : kept;
}

// Copies the cuts to flip against, since the new ones may take their place; in a phase before prepare(). One thread per layer.
template <class Grid>
S2AP_DEVICE void save_cuts(const Grid& grid, const int64_t* cuts, Cut* saved, int layers) {
  int64_t thread = static_cast<int64_t>(grid.block()) * grid.threads() + grid.thread();
  for (int64_t layer = thread; layer < layers; layer += static_cast<int64_t>(grid.blocks()) * grid.threads()) {
    saved[layer] = {cuts[layer * kCutColumns + kKey], cuts[layer * kCutColumns + kIndex]};
  }
}

// ---- Sum

// Calls use(layer, turn) for turn = 0 .. tasks(layer) - 1 of every layer with groups; the warps of the whole grid share them.
template <class Grid, class T, class Tasks, class Use>
S2AP_DEVICE void for_each_group_task(const Grid& grid, const Table<Layer<T>>& table, Tasks tasks, Use use) {
  int64_t warps = static_cast<int64_t>(grid.blocks()) * grid.warps();
  int64_t turn = static_cast<int64_t>(grid.block()) * grid.warps() + grid.warp();  // counts down to this warp's next task
  for (int layer = 0; layer < table.layers; ++layer) {
    const Layer<T>& row = table.rows[layer];
    if (row.pattern.kind != kGroup) continue;
    int64_t count = tasks(row);
    for (; turn < count; turn += warps) use(layer, turn);
    turn -= count;
  }
}

// Level 0 of one quantity. make_reader(layer) reads the scores whose magnitudes are summed.
template <class Grid, class T, class MakeReader>
S2AP_DEVICE_APART void sum_groups(const Grid& grid, const Table<Layer<T>>& table, const Groups& groups, int quantity,
                                  MakeReader make_reader) {
  for_each_group_task(
      grid, table, [](const Layer<T>& row) { return row.pattern.size * Groups::chunks_of_group(row); },
      [&](int layer, int64_t turn) {
        const Layer<T>& row = table.rows[layer];
        int64_t each = Groups::chunks_of_group(row), group = turn / each, chunk = turn % each;
        uint32_t block = static_cast<uint32_t>(row.pattern.block), first = static_cast<uint32_t>(chunk * kChunk);
        auto reader = make_reader(layer);
        double sum = chunk_sum(
            grid, chunk_length(row.n / row.pattern.size, chunk),
            [&](int j) {
              uint32_t t = first + static_cast<uint32_t>(j);  // of the group's elements in the order of their index
              return reader.load((t / block * row.pattern.size + group) * block + t % block);
            },
            [&](auto raw) {
              double score = reader.score(raw);
              return score < 0 ? -score : score;
            });
        if (grid.lane() == 0) groups.level[0][quantity * groups.chunks + groups.first_chunk[layer] + turn] = sum;
      });
}

// Level 1 and above, of all quantities.
template <class Grid, class T>
S2AP_DEVICE void sum_groups_again(const Grid& grid, const Table<Layer<T>>& table, const Groups& groups, int level) {
  auto terms = [level](const Layer<T>& row) {  // of one group
    int64_t count = Groups::chunks_of_group(row);
    for (int k = 1; k < level; ++k) count = (count + kChunk - 1) / kChunk;
    return count;
  };
  for_each_group_task(
      grid, table, [&](const Layer<T>& row) { return groups.quantities * row.pattern.size * ((terms(row) + kChunk - 1) / kChunk); },
      [&](int layer, int64_t turn) {
        const Layer<T>& row = table.rows[layer];
        int64_t count = terms(row), parts = (count + kChunk - 1) / kChunk, part = turn % parts, group = turn / parts % row.pattern.size;
        int64_t quantity = turn / parts / row.pattern.size;
        int64_t at = quantity * groups.chunks + groups.first_chunk[layer] + group * Groups::chunks_of_group(row);
        const double* in = groups.level[(level - 1) % 2] + at + part * kChunk;
        double sum = chunk_sum(grid, chunk_length(count, part), [&](int j) { return in[j]; }, [](double x) { return x; });
        if (grid.lane() == 0) groups.level[level % 2][at + part] = sum;
      });
}

// ---- Cut

template <class Grid, class T>
S2AP_DEVICE void cut_groups(const Grid& grid, const Selection<T>& s, const Groups& groups) {
  for_each_group_task(
      grid, s.table, [](const Layer<T>& row) { return row.pattern.size; },
      [&](int layer, int64_t group) {
        int64_t size = s.table.rows[layer].pattern.size, kept = kept_of_pattern(s, layer);
        int64_t* row = s.cuts + layer * kCutColumns;
        if (kept == 0 || kept == size) {  // there is no lowest one, or nothing to cut off
          if (group == 0 && grid.lane() == 0) {
            row[kKey] = kept == 0 ? kKeepNone : 0;
            row[kIndex] = 0;
          }
          return;
        }
        GroupMask at(groups, s.table, layer, 0, {});
        Cut own{at.key(group), group};
        uint32_t above = 0;
        for (int64_t other = grid.lane(); other < size; other += kWarp) above += other != group && own.is_reached(at.key(other), other);
        above = warp_sum(grid, above);
        if (above == kept - 1 && grid.lane() == 0) {
          row[kKey] = own.key;
          row[kIndex] = own.index;
        }
      });
}

// ---- Apply

// Writes what stays of the layers of one kind. make_mask(layer, reader) makes the mask. The reader is that of selection.cuh, but for
// patterns of this kind.
template <int kind, class Grid, class Args, class MakeMask>
S2AP_DEVICE void apply_pattern(const Grid& grid, const Args& args, MakeMask make_mask) {
  const auto& s = args.selection;
  for_each_segment(grid, s.table, [&](Segment segment) {
    const auto& row = s.table.rows[segment.layer];
    if (row.pattern.kind != kind) return;
    auto reader = args.template reader<kind>(segment.layer);
    auto mask = make_mask(segment.layer, reader);
    using Raw = decltype(reader.load(0));
    using T = std::decay_t<decltype(*row.masked)>;
    struct Element {
      Raw raw;
      T weight;
    };
    Tally tally;
    for (int64_t chunk = segment.begin; chunk < segment.end; ++chunk) {
      int64_t first = chunk * kChunk;
      for_each_element<2>(
          grid, chunk_length(row.n, chunk), [&](int j) { return Element{reader.load(first + j), row.weights[first + j]}; },
          [&](int j, bool valid, const Element& element) {
            if (!valid) return;
            auto score = reader.score(element.raw);
            auto key = key_of(score);
            bool keep = mask.keeps(key, first + j);
            row.masked[first + j] = keep ? element.weight : T{};
            tally.nans += key > KeyTraits<decltype(key)>::kInfinityKey;
            if constexpr (decltype(reader)::kFlips) tally.flips += keep != reader.was_kept(element.raw, first + j);
            reader.tally(element.raw, score, tally);
          });
    }
    add_tally(grid, s.cuts + segment.layer * kCutColumns, tally);
  });
}

template <class Grid, class Args>
S2AP_DEVICE void apply_windows(const Grid& grid, const Args& args) {
  const auto& s = args.selection;
  for_each_segment(grid, s.table, [&](Segment segment) {
    if (s.table.rows[segment.layer].pattern.kind != kWindow || segment.begin != 0 || grid.thread() != 0) return;
    s.cuts[segment.layer * kCutColumns + kKey] = 0;
    s.cuts[segment.layer * kCutColumns + kIndex] = kept_of_pattern(s, segment.layer);
  });
  apply_pattern<kWindow>(grid, args, [&](int layer, auto reader) {
    return WindowMask<decltype(reader)>{s.table.rows[layer].pattern, kept_of_pattern(s, layer), reader};
  });
}

template <class Grid, class Args>
S2AP_DEVICE void apply_groups(const Grid& grid, const Args& args) {
  const auto& s = args.selection;
  apply_pattern<kGroup>(grid, args, [&](int layer, auto) {
    const int64_t* cut = s.cuts + layer * kCutColumns;
    return GroupMask(args.groups, s.table, layer, 0, {cut[kKey], cut[kIndex]});
  });
}

// ---- All of it

// How many phases follow guess(): those of the plain selection, or more where groups are so long that their sums take several levels.
template <class T>
int selection_and_pattern_phases(const Groups& groups) {
  int patterns = groups.levels == 0 ? 1 : groups.levels + 2;
  return patterns > kSelectionPhases<T> ? patterns : kSelectionPhases<T>;
}

template <class Grid, class Args>
S2AP_DEVICE_APART void pattern_phase(const Grid& grid, const Args& args, int phase) {
  const Groups& groups = args.groups;
  if (phase == 0) apply_windows(grid, args);
  if (groups.levels == 0) return;
  if (phase == 0) {
    sum_groups(grid, args.selection.table, groups, 0, [&](int layer) { return args.template reader<kGroup>(layer); });
  } else if (phase < groups.levels) {
    sum_groups_again(grid, args.selection.table, groups, phase);
  } else if (phase == groups.levels) {
    cut_groups(grid, args.selection, groups);
  } else if (phase == groups.levels + 1) {
    apply_groups(grid, args);
  }
}

// One phase of the plain layers and of the patterned ones.
template <class Grid, class Args, class T>
S2AP_DEVICE void selection_and_pattern_phase(const Grid& grid, const Args& args, SelectionStorage<T>& storage, int phase) {
  if (args.groups.any) pattern_phase(grid, args, phase);
  if (phase < kSelectionPhases<T>) selection_phase(grid, args, storage, phase);
}

template <class Args>
S2AP_DEVICE bool selection_and_pattern_phase_is_idle(const Args& args, int phase) {
  return !args.groups.any && is_idle(args.selection, phase);
}

}  // namespace s2ap::cuda
