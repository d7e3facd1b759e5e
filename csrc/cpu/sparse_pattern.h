// sparse_pattern: the places of a layer's kept weights, as rows of output channels and as rows of input channels.
//
// The weight is [outputs][inputs of a group][taps]. A row of an output channel lists its kept entries by (input, tap); a row of an
// input channel by (output of the group, tap), which is the same matrix with its axes exchanged, group by group. Both are ascending.
//
// One pass over the weight counts, one writes the rows of outputs, of which the threads take one after the other; the rows of inputs then
// come from these. Bytes per element: 8 (4 with a mask of one byte: 2), and 20 per kept entry.
#pragma once

#include <vector>

#include "machine.h"

namespace s2ap {

struct WeightShape {
  int64_t outputs, inputs, taps, groups;  // inputs: of one group

  int64_t row() const { return inputs * taps; }
};

// Writes starts [outputs + 1].
template <class Kept>
void count_entries(const Machine& machine, const WeightShape& shape, const Kept& kept, int32_t* starts) {
  starts[0] = 0;
  for_each(machine, shape.outputs, shape.outputs * shape.row(), [&](int64_t o) {
    int32_t count = 0;
    for (int64_t i = o * shape.row(); i < (o + 1) * shape.row(); ++i) count += kept(i);
    starts[o + 1] = count;
  });
  for (int64_t o = 0; o < shape.outputs; ++o) starts[o + 1] += starts[o];
}

// Writes columns [entries], and for the rows of inputs starts [groups * inputs + 1], columns [entries] and `order` [entries]: which entry of
// the rows of outputs each is.
template <class Kept>
void list_entries(const Machine& machine, const WeightShape& shape, const Kept& kept, const int32_t* starts, int32_t* columns,
                  int32_t* input_starts, int32_t* input_columns, int32_t* order) {
  for_each(machine, shape.outputs, shape.outputs * shape.row(), [&](int64_t o) {
    int32_t to = starts[o];
    for (int64_t i = 0; i < shape.row() && to < starts[o + 1]; ++i) {
      columns[to] = static_cast<int32_t>(i);
      to += kept(o * shape.row() + i);
    }
  });
  const int64_t outputs = shape.outputs / shape.groups, rows = shape.groups * shape.inputs;
  std::fill_n(input_starts, rows + 1, 0);
  const auto for_each_entry = [&](const auto& f) {  // f(entry, output, row of the input, tap)
    for (int64_t o = 0; o < shape.outputs; ++o) {
      int64_t row = o / outputs * shape.inputs, end = shape.taps;
      for (int32_t j = starts[o]; j < starts[o + 1]; ++j) {
        for (; columns[j] >= end; end += shape.taps) ++row;
        f(j, o % outputs, row, columns[j] - (end - shape.taps));
      }
    }
  };
  for_each_entry([&](int32_t, int64_t, int64_t row, int64_t) { ++input_starts[row + 1]; });
  for (int64_t r = 0; r < rows; ++r) input_starts[r + 1] += input_starts[r];
  std::vector<int32_t> next(input_starts, input_starts + rows);
  for_each_entry([&](int32_t j, int64_t output, int64_t row, int64_t tap) {
    const int32_t to = next[row]++;
    input_columns[to] = static_cast<int32_t>(output * shape.taps + tap);
    order[to] = j;
  });
}

}  // namespace s2ap
