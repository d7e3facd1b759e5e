// update_select: one SGD step on the scores of all layers, in place, and the masked weights at the new scores.
//
// What is computed: update.h, then select.h; which entries of the masks the step flipped; and the new scores' sums of squares, which the
// next perturb would take otherwise. The step is what select.h calls a measurement: a batch of layers that fits the cache is stepped,
// searched and masked before the next one is read, so the selection finds the scores where the step left them.
//
// The old masks are needed after the old scores are gone. They wait as bits, one for each element, made from the cuts just before
// the step, in the memory of the masked weights, which nothing else needs until they are written; so that memory must not be that of the
// weights. Bits of layers with a pattern wait in memory of their own, and those of groups as the groups' old sums.
//
// The gradient may be given as that of the masked weight, as in perturb.h; its sign is then that of the scores where it was taken, s + z,
// which are formed once more from the first gradient.
//
// Bytes per element (float32): s, g and the momentum read, s and the momentum written, w read, masked written: 28, the scores twice more
// from the cache. update and select one after the other: 32. With gradients of masked weights w is read a second time, from the cache too,
// and the first gradient: 32.
#pragma once

#include "perturb.h"
#include "update.h"

namespace s2ap {

template <class T>
struct UpdateSelectLayer {
  UpdateLayer<T> step;           // its gradient: of the scores, or with UpdateSelect::straight_through of the masked weight
  const BitsOf<T>* ascent_grad;  // of the masked weight, at the scores; null: `step.grad` was taken at the scores
  const BitsOf<T>* weight;
  BitsOf<T>* masked;
  int64_t kept;
  Pattern pattern = {};
};

struct UpdateSelect {
  SgdParameters sgd;
  bool fused;  // as in update()
  bool straight_through = false;
  const double* scales = nullptr;  // [L], those of the ascents
};

struct UpdateSelectCounts {
  int64_t nans = 0;
  int64_t flips = 0;
};

template <class T>
class UpdateSelectProblem {
 public:
  using Element = T;
  using Bits = BitsOf<T>;
  using Tally = UpdateSelectCounts;
  static constexpr bool kMeasures = true;

  UpdateSelectProblem(const Machine& machine, const std::vector<UpdateSelectLayer<T>>& layers, const UpdateSelect& how, const int64_t* cuts,
                      int64_t* new_cuts, double* squares)
      : loop_(loops<T>(machine.isa)), layers_(layers), how_(how), new_cuts_(new_cuts), squares_(squares) {
    int64_t total = 0, bytes = 0;
    for (size_t l = 0; l < layers.size(); ++l) {
      const int64_t chunks = (numel(l) + kChunk - 1) / kChunk;
      first_chunk_.push_back(total);
      total += chunks;
      first_byte_.push_back(bytes);
      if (pattern(l).kind != kWeight) bytes += Tiles(pattern(l), numel(l)).count() * (kTile / 8);
      old_.push_back(cut_of_row<T>(cuts + l * kCutColumns));
      old_sums_.emplace_back(pattern(l).kind == kGroup ? pattern(l).size : 0);
      old_pattern_.emplace_back(cuts + l * kCutColumns, old_sums_.back().data());
    }
    chunk_squares_ = std::make_unique_for_overwrite<double[]>(total);
    old_bits_ = std::make_unique_for_overwrite<uint8_t[]>(bytes);
  }

  int64_t layers() const { return static_cast<int64_t>(layers_.size()); }
  int64_t numel(int64_t l) const { return layers_[l].step.numel; }
  int64_t kept(int64_t l) const { return layers_[l].kept; }
  Pattern pattern(int64_t l) const { return layers_[l].pattern; }
  int64_t* row(int64_t l) const { return new_cuts_ + l * kCutColumns; }

  bool notes(int64_t l) const { return pattern(l).kind != kWeight; }
  void note(int64_t l, const Share& share) {
    const auto read_old = [&](const Runs& runs, Bits* space) { return collect<Bits>(runs, layers_[l].step.scores, space); };
    if (pattern(l).kind == kGroup) return group_sums(loop_, pattern(l), numel(l), share, read_old, old_sums_[l].data());
    const Tiles tiles(pattern(l), numel(l));
    alignas(64) Bits space[kTile];
    for (int64_t t = share.begin(tiles.count()); t < share.end(tiles.count()); ++t) {
      note_tile(l, tiles[t], read_old(tiles[t].elements, space));
    }
  }

  void measure(int64_t l, int64_t begin, int64_t n) const {
    const UpdateLayer<T>& step = layers_[l].step;
    if (pattern(l).kind == kWeight) mask_bits(old_[l], step.scores + begin, begin, n, old_bits(l, begin));
    Bits formed[kChunk];
    for (int64_t i = begin; i < begin + n; i += kChunk) {
      const int64_t size = std::min(kChunk, begin + n - i);
      const Bits* grad = gradient(l, i, size, formed);
      loop_.update(step.scores + i, grad, step.momentum_buffer ? step.momentum_buffer + i : nullptr, size, how_.sgd, how_.fused);
      chunk_squares_[first_chunk_[l] + i / kChunk] = loop_.chunk_of_squares(step.scores + i, size);
    }
  }

  void measured(int64_t l) const { squares_[l] = sum_of_chunks(chunk_squares_.get() + first_chunk_[l], (numel(l) + kChunk - 1) / kChunk); }

  const Bits* read(int64_t l, int64_t begin, int64_t, Bits*) const { return layers_[l].step.scores + begin; }
  template <class Places>
  void read_scattered(int64_t l, const Places& places, Bits* out) const {
    gather<Bits>(places, layers_[l].step.scores, out);
  }

  void apply(int64_t l, int64_t begin, int64_t n, const Cut<Bits>& cut, const Bits* x, Tally& tally) const {
    uint8_t old[kUnit / 8], bits[kUnit / 8];
    std::copy_n(old_bits(l, begin), (n + 7) / 8, old);  // also of an empty layer, whose pointers may be null
    in_parts(cut, begin, n, [&](int64_t from, int64_t size, Bits bound) {
      tally.nans += loop_.apply(x + from, layers_[l].weight + begin + from, layers_[l].masked + begin + from, size, bound);
    });
    mask_bits(cut, x, begin, n, bits);
    tally.flips += loop_.count_different(bits, old, n);
  }

  void apply(int64_t l, const Tile& tile, const Bits* mask, const Bits* x, Tally& tally) const {
    tile.elements.for_each_piece([&](int64_t i, int64_t at, int64_t n) {
      tally.nans += loop_.apply(x + at, layers_[l].weight + i, layers_[l].masked + i, n, mask + at);
    });
    if (pattern(l).kind == kGroup) note_tile(l, tile, nullptr);
    uint8_t bits[kTile / 8];
    bits_of_mask(mask, tile, bits);
    tally.flips += loop_.count_different(bits, old_bits(l, tile.number * kTile), tile.elements.n);
  }

  void add(int64_t l, const Tally& tally) const {
    row(l)[kNans] += tally.nans;
    row(l)[kFlips] += tally.flips;
  }

 private:
  // Those of element `begin` and what follows; where there is a pattern each tile has kTile bits.
  uint8_t* old_bits(int64_t l, int64_t begin) const {
    if (pattern(l).kind == kWeight) return reinterpret_cast<uint8_t*>(layers_[l].masked + begin);
    return old_bits_.get() + first_byte_[l] + begin / 8;
  }

  void bits_of_mask(const Bits* mask, const Tile& tile, uint8_t* bits) const {
    loop_.keep_bits(mask, tile.elements.n, kMagnitude<Bits>, bits);  // all ones has the largest magnitude
  }

  // The old mask of a tile. x: its old scores, which only windows look at.
  void note_tile(int64_t l, const Tile& tile, const Bits* x) const {
    alignas(64) Bits mask[kTile];
    keep_in_tile(loop_, pattern(l), old_pattern_[l], tile, x, mask);
    bits_of_mask(mask, tile, old_bits(l, tile.number * kTile));
  }

  // The mask of x, the elements from `begin` on, a bit for each.
  void mask_bits(const Cut<Bits>& cut, const Bits* x, int64_t begin, int64_t n, uint8_t* bits) const {
    in_parts(cut, begin, n, [&](int64_t from, int64_t size, Bits bound) {
      // What lies in front of the index ends within a byte as a rule: the part behind it fills up that byte.
      int64_t head = -from & 7;
      for (int64_t i = from; i < from + std::min(head, size); ++i) {
        bits[i / 8] = static_cast<uint8_t>(bits[i / 8] | ((x[i] & kMagnitude<Bits>) >= bound) << i % 8);
      }
      if (head < size) loop_.keep_bits(x + from + head, size - head, bound, bits + (from + head) / 8);
    });
  }

  // The gradient of n scores: as given, or formed in `formed`.
  const Bits* gradient(int64_t l, int64_t begin, int64_t n, Bits* formed) const {
    const UpdateSelectLayer<T>& layer = layers_[l];
    const Bits *grad = layer.step.grad + begin, *weight = layer.weight + begin, *scores = layer.step.scores + begin;
    if (!how_.straight_through) return grad;
    if (layer.ascent_grad == nullptr) {
      loop_.form(grad, weight, scores, formed, n);
      return formed;
    }
    Bits moved[kChunk];
    loop_.form(layer.ascent_grad + begin, weight, scores, formed, n);
    loop_.move(scores, formed, static_cast<ComputeOf<T>>(how_.scales[l]), moved, n);
    loop_.form(grad, weight, moved, formed, n);
    return formed;
  }

  const Loops<T>& loop_;
  const std::vector<UpdateSelectLayer<T>>& layers_;
  const UpdateSelect& how_;
  int64_t* new_cuts_;
  double* squares_;
  std::vector<Cut<Bits>> old_;
  std::vector<PatternCut> old_pattern_;  // the same for layers with a pattern
  std::vector<std::vector<uint64_t>> old_sums_;
  std::vector<int64_t> first_chunk_, first_byte_;  // of each layer, in the two below
  std::unique_ptr<double[]> chunk_squares_;
  std::unique_ptr<uint8_t[]> old_bits_;
};

// cuts: int64 [L, 5], those of the scores before the step; new_cuts: int64 [L, 5] and squares: double [L], written. cuts may be new_cuts.
template <class T>
void update_select(const Machine& machine, const std::vector<UpdateSelectLayer<T>>& layers, const UpdateSelect& how, const int64_t* cuts,
                   int64_t* new_cuts, double* squares) {
  UpdateSelectProblem<T> problem(machine, layers, how, cuts, new_cuts, squares);
  Selection<UpdateSelectProblem<T>>(machine, problem).run();
}

}  // namespace s2ap
