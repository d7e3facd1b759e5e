// sparse_pattern: the places of a layer's kept weights, as rows of output channels and as rows of input channels.
//
// The weight is [outputs][inputs of a group][taps]. A row of an output channel lists its kept entries by (input, tap); a row of an
// input channel by (output of the group, tap), which is the same matrix with its axes exchanged, group by group. Both are ascending.
//
// Both are cut into parts, one after the other, each with all rows, for what reads them wants a part's inputs in the first-level cache
// (sparse_conv.h). Parts of the rows of outputs are runs of inputs. Parts of the rows of inputs are, for each pass of the gradient with
// respect to the input, runs of outputs; a tap's entries belong to one pass.
//
// One pass over the weight counts all entries, which decides on the runs, one those of each part, and one writes the rows of outputs, of
// which the threads take one after the other; the rows of inputs then come from these. Bytes per element: 12 (with a mask 3), and 20 per
// kept entry.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "machine.h"

namespace s2ap {

struct WeightShape {
  int64_t outputs, inputs, taps, groups;  // inputs: of one group
  int64_t passes;
  std::vector<int64_t> pass_of_tap;

  int64_t row() const { return inputs * taps; }
  int64_t group_outputs() const { return outputs / groups; }
};

// So many channels of `channels` make a run that a row has 20 entries there, for fewer are not worth loading and storing its sums again;
// and 8 at least. `entries`: of all `rows` in all `passes`.
inline int64_t channels_of_run(int64_t entries, int64_t rows, int64_t channels, int64_t passes) {
  constexpr int64_t kEntries = 20, kChannels = 8;
  const int64_t all = kEntries * rows * channels * passes;
  const int64_t run = entries == 0 ? channels : std::clamp((all + entries - 1) / entries, std::min(kChannels, channels), channels);
  const int64_t runs = (channels + run - 1) / std::max<int64_t>(run, 1);
  return (channels + runs - 1) / std::max<int64_t>(runs, 1);
}

inline int64_t runs_of(int64_t channels, int64_t each) { return channels == 0 ? 1 : (channels + each - 1) / each; }

class PatternLists {
 public:
  // Counts, and so knows the sizes of everything.
  template <class Kept>
  PatternLists(const Machine& machine, const WeightShape& shape, const Kept& kept) : machine_(machine), shape_(shape) {
    std::vector<int32_t> counts(shape.outputs);
    for_each(machine, shape.outputs, shape.outputs * shape.row(), [&](int64_t o) {
      int32_t count = 0;
      for (int64_t i = o * shape.row(); i < (o + 1) * shape.row(); ++i) count += kept(i);
      counts[o] = count;
    });
    for (int32_t count : counts) entries_ += count;
    each_ = channels_of_run(entries_, shape.outputs, shape.inputs, 1);
    input_each_ = channels_of_run(entries_, shape.groups * shape.inputs, shape.group_outputs(), shape.passes);
  }

  int64_t entries() const { return entries_; }
  int64_t rows() const { return runs_of(shape_.inputs, each_) * shape_.outputs; }  // of all parts
  int64_t input_rows() const { return shape_.passes * input_runs() * shape_.groups * shape_.inputs; }

  // Writes starts [rows() + 1], columns [entries], and for the rows of inputs starts [input_rows() + 1], columns [entries] and `order`
  // [entries]: which entry of the rows of outputs each is.
  template <class Kept>
  void write(const Kept& kept, int32_t* starts, int32_t* columns, int32_t* input_starts, int32_t* input_columns, int32_t* order) const {
    const int64_t runs = rows() / std::max<int64_t>(shape_.outputs, 1), row = shape_.row(), each = each_ * shape_.taps;
    const auto for_each_part = [&](const auto& f) {  // f(place in starts, first element of the row, first column, last column)
      for_each(machine_, shape_.outputs, shape_.outputs * row, [&](int64_t o) {
        for (int64_t run = 0; run < runs; ++run) f(run * shape_.outputs + o, o * row, run * each, std::min(row, (run + 1) * each));
      });
    };
    starts[0] = 0;
    for_each_part([&](int64_t part, int64_t in_row, int64_t first, int64_t last) {
      int32_t count = 0;
      for (int64_t column = first; column < last; ++column) count += kept(in_row + column);
      starts[part + 1] = count;
    });
    for (int64_t part = 0; part < rows(); ++part) starts[part + 1] += starts[part];
    for_each_part([&](int64_t part, int64_t in_row, int64_t first, int64_t last) {
      int32_t to = starts[part];
      for (int64_t column = first; column < last && to < starts[part + 1]; ++column) {
        columns[to] = static_cast<int32_t>(column);
        to += kept(in_row + column);
      }
    });
    write_inputs(runs, starts, columns, input_starts, input_columns, order);
  }

 private:
  int64_t input_runs() const { return runs_of(shape_.group_outputs(), input_each_); }

  void write_inputs(int64_t runs, const int32_t* starts, const int32_t* columns, int32_t* input_starts, int32_t* input_columns,
                    int32_t* order) const {
    const int64_t outputs = shape_.group_outputs(), inputs = shape_.groups * shape_.inputs, taps = shape_.taps;
    std::vector<int64_t> part_of_tap(taps);
    for (int64_t tap = 0; tap < taps; ++tap) part_of_tap[tap] = shape_.pass_of_tap[tap] * input_runs() * inputs;
    const auto for_each_entry = [&](const auto& f) {  // f(entry, output of the group, place in input_starts, tap)
      for (int64_t o = 0; o < shape_.outputs; ++o) {
        const int64_t group = o / std::max<int64_t>(outputs, 1), output = o % std::max<int64_t>(outputs, 1);
        const int64_t first = output / input_each_ * inputs + group * shape_.inputs;
        for (int64_t run = 0; run < runs; ++run) {
          int64_t input = run * each_, end = (input + 1) * taps;
          for (int32_t j = starts[run * shape_.outputs + o]; j < starts[run * shape_.outputs + o + 1]; ++j) {
            for (; columns[j] >= end; end += taps) ++input;
            const int64_t tap = columns[j] - (end - taps);
            f(j, output, part_of_tap[tap] + first + input, tap);
          }
        }
      }
    };
    std::fill_n(input_starts, input_rows() + 1, 0);
    for_each_entry([&](int32_t, int64_t, int64_t row, int64_t) { ++input_starts[row + 1]; });
    for (int64_t r = 0; r < input_rows(); ++r) input_starts[r + 1] += input_starts[r];
    std::vector<int32_t> next(input_starts, input_starts + input_rows());
    for_each_entry([&](int32_t j, int64_t output, int64_t row, int64_t tap) {
      const int32_t to = next[row]++;
      input_columns[to] = static_cast<int32_t>(output * taps + tap);
      order[to] = j;
    });
  }

  const Machine& machine_;
  const WeightShape& shape_;
  int64_t entries_ = 0, each_, input_each_;
};

}  // namespace s2ap
