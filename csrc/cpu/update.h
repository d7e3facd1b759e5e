// update: one SGD step on the scores of all layers, in place.
//
// What is computed is torch.optim.SGD's arithmetic, operation for operation (s2ap_ext/reference.py, function update), but in one sweep:
// torch's own foreach form reads and writes the momentum three times. Elements are independent, so there is nothing more to it.
//
// Bytes per element (float32): s, g and the momentum read, s and the momentum written: 20.
#pragma once

#include <vector>

#include "loops.h"

namespace s2ap {

template <class T>
struct UpdateLayer {
  BitsOf<T>* scores;
  const BitsOf<T>* grad;
  BitsOf<T>* momentum_buffer;  // null without momentum
  int64_t numel;
};

// fused: whether a + alpha * b is rounded once.
template <class T>
void update(const Machine& machine, const std::vector<UpdateLayer<T>>& layers, const SgdParameters& parameters, bool fused) {
  constexpr int64_t kPiece = 8 * kChunk;
  struct Piece {
    const UpdateLayer<T>* layer;
    int64_t begin;
  };
  std::vector<Piece> pieces;
  int64_t elements = 0;
  for (const auto& layer : layers) {
    for (int64_t begin = 0; begin < layer.numel; begin += kPiece) pieces.push_back({&layer, begin});
    elements += layer.numel;
  }
  const Loops<T>& loop = loops<T>(machine.isa);
  for_each(machine, static_cast<int64_t>(pieces.size()), elements, [&](int64_t i) {
    const auto& [layer, begin] = pieces[i];
    BitsOf<T>* buffer = layer->momentum_buffer ? layer->momentum_buffer + begin : nullptr;
    loop.update(layer->scores + begin, layer->grad + begin, buffer, std::min(kPiece, layer->numel - begin), parameters, fused);
  });
}

}  // namespace s2ap
