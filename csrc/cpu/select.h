// select: for each layer, keep the `kept` weights with the largest |score| and zero the others.
//
// What is computed. Elements rank by (|s|, index); those from the cut (KEY, INDEX) upwards stay (s2ap_ext/reference.py). So the work is
// to find the kept-th largest magnitude T and, among the elements equal to T, the index of the first that stays.
//
// How, for a layer:
//   1. A small sample of the scores gives a bracket [lo, hi) that holds T almost surely.
//   2. One sweep over the scores counts the magnitudes above the bracket and compacts those inside it (about 3 % of them).
//   3. Bisection on the bits, among those few, gives T; one unit is looked at again for the index of the last tie.
//   4. One sweep writes masked = (|s|, i) >= cut ? w : 0 and counts NaN.
// The counts of step 2 prove whether T lies inside, so the sample only affects speed. If T is outside, the next sweep takes the
// bracket's own edge as a bracket of width 1 (many equal scores make T such an edge, and then counting is all there is to do); if
// that misses too, or if too many elements lie inside, 2048-bin histograms narrow the bracket, at most three for float32. Equal
// scores, or scores arranged to mislead the sample, cost some more sweeps and never a wrong bit.
//
// All layers go through one queue of tasks, each a unit of 16384 elements and a step, which the threads take in order: one start of the
// threads per call, and layers of any size balance. A task waits while its layer's previous step is not finished by the threads that
// took it. Small layers take their steps in batches, large ones alone, so that a step finds in the cache what the one before it read.
// Layers of up to one unit are finished by one thread in one go. Layers with a pattern go through the same queue: groups have their sums
// in the place of steps 1 to 3, windows have nothing there, and step 4 applies masks that are made tile by tile (pattern.h).
//
// Bytes per element (float32): 4 in step 2; 4 + 4 read and 4 written in step 4, the scores once more but from the cache.
#pragma once

#include <atomic>
#include <bit>
#include <cmath>
#include <memory>
#include <vector>

#include "pattern.h"

namespace s2ap {

// A unit is what one thread sweeps at once: consecutive elements of one layer, a multiple of kChunk.
constexpr int64_t kUnit = 4 * kChunk;
// Layers take their steps together until they have this many elements.
constexpr int64_t kBatch = int64_t{1} << 18;

constexpr int kDigitBits = 11;

// Searches the cuts of all layers and applies them. Problem says what the layers are:
//   Element                                             the element type T
//   int64_t layers(), numel(l), kept(l); Pattern pattern(l); int64_t* row(l)
//   const Bits* read(l, begin, n, space)                the bits to rank; may be computed into `space` (kUnit elements)
//   void read_scattered(l, places, out)                 those of them that are at a SamplePlan's or at Runs' places
//   void apply(l, begin, n, cut, x, Tally&)             x: what read gave for these elements
//   void apply(l, tile, mask, x, Tally&)                the same for a tile of a layer with a pattern
//   void add(l, Tally)
//   kMeasures; void measure(l, begin, n), measured(l)   a first pass over a layer, before anything is read (perturb's norms)
//   if so: bool notes(l); void note(l, share)           a pass before that, over a layer with a pattern: what the present mask is made from
template <class Problem>
class Selection {
 public:
  using T = typename Problem::Element;
  using Bits = BitsOf<T>;
  using Tally = typename Problem::Tally;

  Selection(const Machine& machine, Problem& problem) : machine_(machine), problem_(problem), loop_(loops<T>(machine.isa)) { plan(); }

  void run() {
    run_tasks();
    while (plan_missed()) run_tasks();
    for (const Unit& u : units_) problem_.add(layers_[u.layer].id, u.tally);
  }

 private:
  enum class Step { kSmall, kNote, kMeasure, kGuess, kSearch, kApply };
  struct Task {
    Step step;
    int64_t first, last;  // kSmall: of small_; kGuess: a layer; otherwise a unit
  };

  struct Unit {
    int64_t layer;
    int64_t begin, n;
    SweepCounts counts = {};
    int64_t offset = 0;  // of its compacted magnitudes among the layer's
    Tally tally = {};
  };

  // What is known of a layer of more than one unit. kUnnoted: the present mask is to be noted first. kBracketed: it can be searched.
  // kMissed: the search needs another sweep.
  enum Stage : int { kUnnoted, kUnknown, kBracketed, kFound, kMissed };
  struct Layer {
    int64_t id = 0, n = 0, kept = 0;
    Pattern pattern;
    int64_t first_unit = 0, units = 0;
    Cut<Bits> cut;
    // T is in [lo, hi), or that is the guess.
    Bits lo = 0, hi = kBeyond<Bits>;
    bool guess = true;
    std::unique_ptr<int64_t[]> digits;  // where it is to be narrowed by a histogram
    std::unique_ptr<Bits[]> inside;     // room for the compacted magnitudes of all units, from the guess until T is found
    int64_t capacity = 0;               // of that, and how much of it is taken
    std::atomic<int64_t> taken{0};
    std::atomic<int64_t> open{0};  // units whose present step is not finished
    std::atomic<int> stage{kUnknown};

    void enter(Stage next) {
      stage.store(next, std::memory_order_release);
      stage.notify_all();
    }
    Stage wait_beyond(Stage last) {
      int now;
      while ((now = stage.load(std::memory_order_acquire)) <= last) stage.wait(now);
      return static_cast<Stage>(now);
    }
    // True for the last unit, which sees what all the others wrote.
    bool closes() { return open.fetch_sub(1, std::memory_order_acq_rel) == 1; }
  };

  // Room for one thread's work on a unit.
  struct Space {
    alignas(64) Bits read[kUnit];
    alignas(64) Bits inside[kUnit + kStoreSlack];
  };

  void plan() {
    std::vector<int64_t> large;
    sums_.resize(problem_.layers());
    for (int64_t l = 0; l < problem_.layers(); ++l) {
      (problem_.numel(l) > kUnit ? large : small_).push_back(l);
      if (problem_.pattern(l).kind == kGroup) sums_[l].resize(problem_.pattern(l).size);
    }

    layers_ = std::vector<Layer>(large.size());
    for (size_t i = 0; i < large.size(); ++i) {
      Layer& layer = layers_[i];
      layer.id = large[i];
      layer.n = problem_.numel(layer.id);
      layer.kept = problem_.kept(layer.id);
      layer.pattern = problem_.pattern(layer.id);
      layer.stage = notes(layer.id) ? kUnnoted : kUnknown;
      layer.first_unit = static_cast<int64_t>(units_.size());
      for (int64_t begin = 0; begin < layer.n; begin += kUnit) {
        units_.push_back({static_cast<int64_t>(i), begin, std::min(kUnit, layer.n - begin)});
      }
      layer.units = static_cast<int64_t>(units_.size()) - layer.first_unit;
      elements_ += layer.n;
    }

    if (!Problem::kMeasures) {  // otherwise whoever ends a layer's measurement guesses
      for (size_t i = 0; i < layers_.size(); ++i) tasks_.push_back({Step::kGuess, static_cast<int64_t>(i), 0});
    }
    for (size_t begin = 0, end = 0; begin < layers_.size(); begin = end) {
      for (int64_t n = 0; end < layers_.size() && n < kBatch; ++end) n += layers_[end].n;
      for (Step step : {Step::kNote, Step::kMeasure, Step::kSearch, Step::kApply}) {
        for (size_t i = begin; i < end; ++i) {
          if (takes(step, layers_[i])) add_tasks(step, layers_[i]);
        }
      }
    }

    // The smallest work comes last, to even out the ends.
    const auto count = static_cast<int64_t>(small_.size());
    for (int64_t first = 0, last; first < count; first = last) {
      int64_t n = 0;
      for (last = first; last < count && n < kUnit; ++last) n += 256 + problem_.numel(small_[last]);
      tasks_.push_back({Step::kSmall, first, last});
      elements_ += n;
    }
  }

  // The layers whose cut is not found yet search on. False if there are none.
  bool plan_missed() {
    tasks_.clear();
    elements_ = 0;
    for (Step step : {Step::kSearch, Step::kApply}) {
      for (Layer& layer : layers_) {
        if (layer.stage == kFound) continue;
        layer.stage = kBracketed;
        add_tasks(step, layer);
        elements_ += layer.n;
      }
    }
    return !tasks_.empty();
  }

  bool notes(int64_t id) const {
    if constexpr (Problem::kMeasures) return problem_.notes(id);
    return false;
  }

  bool takes(Step step, const Layer& layer) const {
    if (step == Step::kNote) return notes(layer.id);
    if (step == Step::kMeasure) return Problem::kMeasures;
    return step != Step::kSearch || layer.pattern.kind != kWindow;
  }

  void add_tasks(Step step, Layer& layer) {
    if (step != Step::kApply) layer.open = layer.units;
    for (int64_t u = layer.first_unit; u < layer.first_unit + layer.units; ++u) tasks_.push_back({step, u, 0});
  }

  void run_tasks() {
    for_each(machine_, static_cast<int64_t>(tasks_.size()), elements_, [&](int64_t i) {
      const Task& task = tasks_[i];
      switch (task.step) {
        case Step::kSmall:
          for (int64_t l = task.first; l < task.last; ++l) finish_small(small_[l]);
          return;
        case Step::kNote:
          return note(units_[task.first]);
        case Step::kMeasure:
          return measure(units_[task.first]);
        case Step::kGuess:
          return start_search(layers_[task.first]);
        case Step::kSearch:
          return search(units_[task.first]);
        case Step::kApply:
          return apply(units_[task.first]);
      }
    });
  }

  void finish_small(int64_t id) {
    const int64_t n = problem_.numel(id), kept = problem_.kept(id);
    if constexpr (Problem::kMeasures) {
      if (problem_.notes(id)) problem_.note(id, Share{});
      problem_.measure(id, 0, n);
      problem_.measured(id);
    }
    Tally tally = {};
    if (problem_.pattern(id).kind == kWeight) {
      Space space;
      const Bits* x = problem_.read(id, 0, n, space.read);
      Cut<Bits> cut;
      if (!is_decided(id, cut)) {
        const Rank<Bits> t = rank_largest(loop_, x, n, kept, Bits{0}, kBeyond<Bits>, space.inside);
        cut = found(id, t, index_of_tie(loop_, x, n, t.magnitude, kept - t.above));
      }
      problem_.apply(id, 0, n, cut, x, tally);
    } else {
      Cut<Bits> cut;
      if (!is_decided(id, cut)) {
        sum_groups(id, Share{});
        rank_sums(id);
      }
      apply_tiles(id, Share{}, tally);
    }
    problem_.add(id, tally);
  }

  // Starts the row of a layer. True if that is all of it: everything stays or nothing, or the same number of each window.
  bool is_decided(int64_t id, Cut<Bits>& cut) {
    const Pattern pattern = problem_.pattern(id);
    const int64_t kept = problem_.kept(id), all = pattern.kind == kWeight ? problem_.numel(id) : pattern.size;
    int64_t* row = problem_.row(id);
    std::fill(row, row + kCutColumns, 0);
    if (pattern.kind == kWindow) {
      row[kIndex] = kept;
      return true;
    }
    if (kept != 0 && kept != all) return false;
    if (kept == 0) row[kKey] = kKeepNone;
    cut = cut_of_row<T>(row);
    return true;
  }

  Cut<Bits> found(int64_t id, const Rank<Bits>& t, int64_t index) {
    problem_.row(id)[kKey] = cut_key<T>(t.magnitude);
    problem_.row(id)[kIndex] = index;
    return {static_cast<Bits>(t.magnitude + 1), t.magnitude, index};
  }

  Share share(const Unit& u) const { return {u.begin / kUnit, layers_[u.layer].units}; }

  void note(Unit& u) {
    if constexpr (Problem::kMeasures) {
      Layer& layer = layers_[u.layer];
      problem_.note(layer.id, share(u));
      if (!layer.closes()) return;
      layer.open = layer.units;
      layer.enter(kUnknown);
    }
  }

  void measure(Unit& u) {
    if constexpr (Problem::kMeasures) {
      Layer& layer = layers_[u.layer];
      layer.wait_beyond(kUnnoted);
      problem_.measure(layer.id, u.begin, u.n);
      if (!layer.closes()) return;
      problem_.measured(layer.id);
      layer.open = layer.units;
      start_search(layer);
    }
  }

  void start_search(Layer& layer) {
    if (is_decided(layer.id, layer.cut)) return layer.enter(kFound);
    if (layer.pattern.kind == kWeight) guess_bracket(layer);
    layer.enter(kBracketed);
  }

  // A bracket around the kept-th largest, four standard deviations of a sample's rank to either side.
  void guess_bracket(Layer& layer) {
    const SamplePlan plan(layer.n);
    const int64_t size = plan.size();
    const auto sample = std::make_unique_for_overwrite<Bits[]>(size);
    problem_.read_scattered(layer.id, plan, sample.get());
    const double fraction = static_cast<double>(layer.kept) / static_cast<double>(layer.n), m = static_cast<double>(size);
    const double margin = 4 * std::sqrt(m * fraction * (1 - fraction)) + 4;
    const auto upper = static_cast<int64_t>(m * fraction - margin), lower = static_cast<int64_t>(m * fraction + margin);
    const auto scratch = std::make_unique_for_overwrite<Bits[]>(size / 4 + kStoreSlack);
    const auto ranked = [&](int64_t rank) {
      return rank_largest(loop_, sample.get(), size, rank, Bits{0}, kBeyond<Bits>, scratch.get()).magnitude;
    };
    // What is to be expected inside, and a quarter more: the sample's density there is not quite the layer's.
    layer.capacity = static_cast<int64_t>(2.5 * margin / m * static_cast<double>(layer.n)) + kUnit / 16;
    layer.inside = std::make_unique_for_overwrite<Bits[]>(layer.capacity);
    layer.hi = upper >= 1 ? ranked(upper) : kBeyond<Bits>;
    layer.lo = lower <= size ? static_cast<Bits>(ranked(lower) + 1) : Bits{0};
    if (layer.lo > layer.hi) {  // one value all around: that value alone
      layer.lo = layer.hi;
      layer.hi = static_cast<Bits>(layer.lo + 1);
    }
  }

  bool stores(const Layer& layer) const { return layer.hi - layer.lo > 1; }  // a bracket of width 1 holds equal magnitudes

  void search(Unit& u) {
    Layer& layer = layers_[u.layer];
    if (layer.wait_beyond(kUnknown) == kFound) return;
    if (layer.pattern.kind == kGroup) {
      sum_groups(layer.id, share(u));
      if (!layer.closes()) return;
      rank_sums(layer.id);
      layer.enter(kFound);
    } else if (layer.digits) {
      count_digits(layer, u);
      if (layer.closes()) read_digits(layer);
    } else {
      sweep(layer, u);
      if (layer.closes()) read_sweep(layer);
    }
  }

  void sweep(Layer& layer, Unit& u) {
    Space space;
    const Bits* x = problem_.read(layer.id, u.begin, u.n, space.read);
    u.counts = loop_.sweep(x, u.n, layer.lo, layer.hi, space.inside);
    if (!stores(layer)) return;
    u.offset = layer.taken.fetch_add(u.counts.inside, std::memory_order_relaxed);
    if (u.offset + u.counts.inside <= layer.capacity) std::copy_n(space.inside, u.counts.inside, layer.inside.get() + u.offset);
  }

  void read_sweep(Layer& layer) {
    SweepCounts all;
    for (int64_t i = 0; i < layer.units; ++i) {
      const SweepCounts& counts = units_[layer.first_unit + i].counts;
      all.above += counts.above;
      all.inside += counts.inside;
    }
    const bool below = layer.kept > all.above + all.inside, above = layer.kept <= all.above;
    if (!below && !above) {
      if (!stores(layer)) {
        found_in_layer(layer, {layer.lo, all.above});
      } else if (all.inside <= layer.capacity) {
        const auto scratch = std::make_unique_for_overwrite<Bits[]>(all.inside / 4 + kStoreSlack);
        Rank<Bits> t = rank_largest(loop_, layer.inside.get(), all.inside, layer.kept - all.above, layer.lo, layer.hi, scratch.get());
        t.above += all.above;
        for (int64_t i = 0; i < layer.units; ++i) {
          Unit& u = units_[layer.first_unit + i];
          u.counts.inside = count_equal(loop_, layer.inside.get() + u.offset, u.counts.inside, t.magnitude);
        }
        found_in_layer(layer, t);
      } else {
        start_digits(layer);
      }
      return;
    }
    if (layer.guess && layer.hi - layer.lo != 1) {  // the edge next to which T lies may be T itself, many times over
      layer.guess = false;
      if (above) {
        layer.lo = layer.hi;
      } else {
        --layer.lo;
      }
      layer.hi = static_cast<Bits>(layer.lo + 1);
      layer.enter(kMissed);
    } else if (above) {
      layer.lo = layer.hi;
      layer.hi = kBeyond<Bits>;
      start_digits(layer);
    } else {
      layer.hi = layer.lo;
      layer.lo = 0;
      start_digits(layer);
    }
  }

  // T and the number of its equals in each unit are known; finds the index where the ties are cut.
  void found_in_layer(Layer& layer, const Rank<Bits>& t) {
    int64_t rank = layer.kept - t.above;
    int64_t i = layer.first_unit + layer.units - 1;
    for (; rank > units_[i].counts.inside; --i) rank -= units_[i].counts.inside;
    const Unit& u = units_[i];
    Space space;
    const Bits* x = problem_.read(layer.id, u.begin, u.n, space.read);
    layer.cut = found(layer.id, t, u.begin + index_of_tie(loop_, x, u.n, t.magnitude, rank));
    layer.inside.reset();
    layer.enter(kFound);
  }

  int shift(const Layer& layer) const {
    const Bits last = static_cast<Bits>(layer.hi - layer.lo - 1);
    return std::max(0, static_cast<int>(std::bit_width(last)) - kDigitBits);
  }

  void start_digits(Layer& layer) {
    layer.digits = std::make_unique<int64_t[]>((size_t{1} << kDigitBits) + 1);  // the last one: magnitudes >= hi
    layer.enter(kMissed);
  }

  void count_digits(Layer& layer, Unit& u) {
    Space space;
    const Bits* x = problem_.read(layer.id, u.begin, u.n, space.read);
    const SweepCounts counts = loop_.sweep(x, u.n, layer.lo, layer.hi, space.inside);
    uint32_t bins[size_t{1} << kDigitBits] = {};
    const int by = shift(layer);
    for (int64_t i = 0; i < counts.inside; ++i) ++bins[static_cast<Bits>(space.inside[i] - layer.lo) >> by];
    for (size_t bin = 0; bin < std::size(bins); ++bin) {
      if (bins[bin]) std::atomic_ref(layer.digits[bin]).fetch_add(bins[bin], std::memory_order_relaxed);
    }
    std::atomic_ref(layer.digits[std::size(bins)]).fetch_add(counts.above, std::memory_order_relaxed);
  }

  void read_digits(Layer& layer) {
    int64_t bin = int64_t{1} << kDigitBits;
    int64_t above = layer.digits[bin];
    for (--bin; above + layer.digits[bin] < layer.kept; --bin) above += layer.digits[bin];
    const int by = shift(layer);
    const Bits base = layer.lo;
    const Bits end = static_cast<Bits>(base + (static_cast<Bits>(bin + 1) << by));
    layer.lo = static_cast<Bits>(base + (static_cast<Bits>(bin) << by));
    layer.hi = std::min(layer.hi, end < layer.lo ? layer.hi : end);
    if (stores(layer) && layer.digits[bin] > layer.capacity) {
      start_digits(layer);
    } else {
      layer.digits.reset();
      layer.taken = 0;
      layer.enter(kMissed);
    }
  }

  void apply(Unit& u) {
    Layer& layer = layers_[u.layer];
    if (layer.wait_beyond(kBracketed) == kMissed) return;
    if (layer.pattern.kind != kWeight) return apply_tiles(layer.id, share(u), u.tally);
    Space space;
    const Bits* x = problem_.read(layer.id, u.begin, u.n, space.read);
    problem_.apply(layer.id, u.begin, u.n, layer.cut, x, u.tally);
  }

  const Bits* read(int64_t id, const Runs& runs, Bits* space) const {
    if (runs.in_one_piece()) return problem_.read(id, runs.front(), runs.n, space);
    problem_.read_scattered(id, runs, space);
    return space;
  }

  void sum_groups(int64_t id, const Share& share) {
    const auto read_runs = [&](const Runs& runs, Bits* space) { return read(id, runs, space); };
    group_sums(loop_, problem_.pattern(id), problem_.numel(id), share, read_runs, sums_[id].data());
  }

  void rank_sums(int64_t id) {
    rank_groups(loops<double>(machine_.isa), sums_[id].data(), problem_.pattern(id).size, problem_.kept(id), problem_.row(id));
  }

  void apply_tiles(int64_t id, const Share& share, Tally& tally) {
    const Pattern pattern = problem_.pattern(id);
    const PatternCut cut(problem_.row(id), sums_[id].data());
    const Tiles tiles(pattern, problem_.numel(id));
    alignas(64) Bits space[kTile], mask[kTile];
    for (int64_t t = share.begin(tiles.count()); t < share.end(tiles.count()); ++t) {
      const Tile tile = tiles[t];
      const Bits* x = read(id, tile.elements, space);
      keep_in_tile(loop_, pattern, cut, tile, x, mask);
      problem_.apply(id, tile, mask, x, tally);
    }
  }

  const Machine& machine_;
  Problem& problem_;
  const Loops<T>& loop_;
  std::vector<int64_t> small_;  // the layers of up to one unit
  std::vector<Layer> layers_;   // the others
  std::vector<Unit> units_;
  std::vector<std::vector<uint64_t>> sums_;  // of the groups of each layer that has groups
  std::vector<Task> tasks_;
  int64_t elements_ = 0;  // of all tasks
};

template <class T>
struct SelectLayer {
  const BitsOf<T>* scores;
  const BitsOf<T>* weight;
  BitsOf<T>* masked;
  int64_t numel;
  int64_t kept;
  Pattern pattern = {};
};

template <class T>
class SelectProblem {
 public:
  using Element = T;
  using Bits = BitsOf<T>;
  using Tally = int64_t;  // NaN
  static constexpr bool kMeasures = false;

  SelectProblem(const Machine& machine, const std::vector<SelectLayer<T>>& layers, int64_t* cuts)
      : loop_(loops<T>(machine.isa)), layers_(layers), cuts_(cuts) {}

  int64_t layers() const { return static_cast<int64_t>(layers_.size()); }
  int64_t numel(int64_t l) const { return layers_[l].numel; }
  int64_t kept(int64_t l) const { return layers_[l].kept; }
  Pattern pattern(int64_t l) const { return layers_[l].pattern; }
  int64_t* row(int64_t l) const { return cuts_ + l * kCutColumns; }
  const Bits* read(int64_t l, int64_t begin, int64_t, Bits*) const { return layers_[l].scores + begin; }
  template <class Places>
  void read_scattered(int64_t l, const Places& places, Bits* out) const {
    gather(places, layers_[l].scores, out);
  }
  void apply(int64_t l, int64_t begin, int64_t n, const Cut<Bits>& cut, const Bits* x, Tally& nans) const {
    in_parts(cut, begin, n, [&](int64_t from, int64_t size, Bits bound) {
      nans += loop_.apply(x + from, layers_[l].weight + begin + from, layers_[l].masked + begin + from, size, bound);
    });
  }
  void apply(int64_t l, const Tile& tile, const Bits* mask, const Bits* x, Tally& nans) const {
    tile.elements.for_each_piece(
        [&](int64_t i, int64_t at, int64_t n) { nans += loop_.apply(x + at, layers_[l].weight + i, layers_[l].masked + i, n, mask + at); });
  }
  void add(int64_t l, Tally nans) const { row(l)[kNans] += nans; }

 private:
  const Loops<T>& loop_;
  const std::vector<SelectLayer<T>>& layers_;
  int64_t* cuts_;
};

// cuts: int64 [L, 5], written.
template <class T>
void select(const Machine& machine, const std::vector<SelectLayer<T>>& layers, int64_t* cuts) {
  SelectProblem<T> problem(machine, layers, cuts);
  Selection<SelectProblem<T>>(machine, problem).run();
}

}  // namespace s2ap
