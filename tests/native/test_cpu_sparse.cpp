// The sparse convolutions against naive sums in double: shapes, layouts, epilogues, instruction sets, and the same bits for any number of
// threads.
#include "cpu/sparse_blocks.h"
#include "cpu/sparse_conv.h"
#include "cpu/sparse_pattern.h"
#include "cpu_cases.h"

#include <new>
#include <vector>

namespace {

using namespace s2ap;
using cases::machine;

const std::vector<int> kThreads = cases::kOnlySharing ? std::vector{3} : std::vector{1, 3};

struct Case {
  int64_t batch, in_channels, out_channels, groups, size[2], kernel[2], stride[2], padding[2], dilation[2];
  double density;
};

const Case kCases[] = {
    {16, 5, 7, 1, {6, 9}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0.3},   // whole vectors
    {27, 5, 18, 1, {6, 9}, {3, 3}, {2, 2}, {1, 1}, {1, 1}, 0.3},  // and images left over
    {3, 4, 4, 1, {8, 8}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0.5},    // few images
    {1, 8, 8, 1, {7, 5}, {3, 3}, {2, 1}, {1, 1}, {1, 1}, 0.4},    // one
    {2, 6, 8, 2, {9, 9}, {3, 1}, {1, 2}, {1, 0}, {2, 1}, 0.5},    // groups, dilation
    {17, 6, 9, 3, {5, 7}, {2, 3}, {2, 2}, {0, 2}, {1, 2}, 0.5},
    {16, 4, 6, 1, {10, 10}, {3, 3}, {3, 3}, {1, 1}, {1, 1}, 0.5},  // a stride beyond 2
    {9, 3, 4, 1, {11, 11}, {7, 7}, {2, 2}, {3, 3}, {1, 1}, 0.3},
    {16, 6, 5, 1, {6, 6}, {1, 1}, {2, 2}, {0, 0}, {1, 1}, 0.5},    // residues that no entry reaches
    {40, 33, 12, 1, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 0.2},  // a linear layer
    {1, 33, 12, 1, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 0.2},
    {16, 3, 3, 1, {4, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0},       // nothing kept
    {16, 3, 3, 1, {4, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1},       // all
    {16, 70, 40, 1, {8, 37}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0.3},  // several pieces, several runs
    {21, 70, 10, 1, {5, 6}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0.3},   // several runs, and images left over
    {16, 80, 64, 2, {7, 6}, {3, 3}, {2, 2}, {1, 1}, {1, 1}, 0.4},   // with a stride and groups
    {1, 300, 20, 1, {20, 21}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0.05},
};

// A tensor of logical shape (N, C, H, W) in some layout.
struct Tensor {
  int64_t n, c, h, w;
  std::vector<float> values;  // contiguous

  double at(int64_t i, int64_t j, int64_t y, int64_t x) const { return values[((i * c + j) * h + y) * w + x]; }
};

Tensor random(int64_t n, int64_t c, int64_t h, int64_t w, uint32_t seed) {
  Tensor t{n, c, h, w, std::vector<float>(n * c * h * w)};
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  for (float& v : t.values) v = normal(generator);
  return t;
}

enum Order { kImagesFirst, kChannelsLast, kBatchInnermost };

// Memory that begins with a line of the caches.
template <class T>
struct InLines {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  bool operator==(const InLines&) const { return true; }
};
template <class T>
using Lines = std::vector<T, InLines<T>>;

template <class T>
struct Stored {
  Lines<T> memory;
  Images<T> images;

  Stored(const Tensor& t, Order order) : memory(t.values.size()) {
    const int64_t n = t.n, c = t.c, h = t.h, w = t.w;
    const Images<T> strides[] = {{nullptr, c * h * w, h * w, w, 1}, {nullptr, c * h * w, 1, c * w, c}, {nullptr, 1, n * h * w, n * w, n}};
    images = strides[order];
    images.data = memory.data();
    each(t, [&](int64_t flat, T& place) { assign(place, t.values[flat]); });
  }
  Images<const T> input() const { return {images.data, images.n, images.c, images.h, images.w}; }
  Tensor read(const Tensor& like) {
    Tensor t = like;
    each(like, [&](int64_t flat, T& place) { t.values[flat] = as_float(place); });
    return t;
  }
  template <class F>
  void each(const Tensor& t, const F& f) {
    int64_t flat = 0;
    for (int64_t i = 0; i < t.n; ++i) {
      for (int64_t j = 0; j < t.c; ++j) {
        for (int64_t y = 0; y < t.h; ++y) {
          for (int64_t x = 0; x < t.w; ++x) f(flat++, memory[i * images.n + j * images.c + y * images.h + x * images.w]);
        }
      }
    }
  }
};

// The same in blocks, `shift` floats after the begin of a line.
struct Blocked {
  Lines<float> memory;
  Blocks<float> blocks;

  Blocked(const Tensor& t, int64_t halo, int64_t lanes, int64_t shift = 0) {
    blocks = {nullptr, (t.n + lanes - 1) / lanes, t.c, t.h, t.w, halo, lanes};
    memory.resize(blocks.count * t.c * blocks.channel() + shift);
    blocks.data = memory.data() + shift;
    each(t, [&](int64_t flat, float& place) { place = t.values[flat]; });
  }
  Blocks<const float> input() const {
    return {blocks.data, blocks.count, blocks.channels, blocks.height, blocks.width, blocks.halo, blocks.lanes};
  }
  Tensor read(const Tensor& like) {
    Tensor t = like;
    each(like, [&](int64_t flat, float& place) { t.values[flat] = place; });
    return t;
  }
  double sum_of_magnitudes() const {
    double sum = 0;
    for (float v : memory) sum += std::abs(v);
    return sum;
  }
  template <class F>
  void each(const Tensor& t, const F& f) {
    int64_t flat = 0;
    for (int64_t i = 0; i < t.n; ++i) {
      for (int64_t j = 0; j < t.c; ++j) {
        for (int64_t y = 0; y < t.h; ++y) {
          for (int64_t x = 0; x < t.w; ++x) f(flat++, blocks.at(i / blocks.lanes, j, y, x)[i % blocks.lanes]);
        }
      }
    }
  }
};

void expect_close(const Tensor& got, const std::vector<double>& expected, double tolerance, const std::string& what) {
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT(std::abs(got.values[i] - expected[i]) <= tolerance * (1 + std::abs(expected[i])), "%s: element %zu: %g, not %g", what.c_str(), i,
           got.values[i], expected[i]);
  }
}

struct Problem {
  Case c;
  ConvShape shape;
  WeightShape weight_shape;
  std::vector<float> weight;  // dense
  std::vector<int32_t> starts, columns, input_starts, input_columns, order;
  std::vector<float> values, input_values, bias;
  Tensor in, out;              // out: some gradient there
  Tensor other, before, gate;  // of an epilogue: added to outputs, added to inputs' gradients, and their gate

  explicit Problem(const Case& given) : c(given) {
    shape = {c.batch, c.in_channels, c.out_channels, c.groups, {}, {}, {}, {}, {}, {}};
    for (int a = 0; a < 2; ++a) {
      shape.in_size[a] = c.size[a];
      shape.kernel[a] = c.kernel[a];
      shape.stride[a] = c.stride[a];
      shape.padding[a] = c.padding[a];
      shape.dilation[a] = c.dilation[a];
      shape.out_size[a] = (c.size[a] + 2 * c.padding[a] - c.dilation[a] * (c.kernel[a] - 1) - 1) / c.stride[a] + 1;
    }
    in = random(c.batch, c.in_channels, c.size[0], c.size[1], 1);
    out = random(c.batch, c.out_channels, shape.out_size[0], shape.out_size[1], 2);
    other = random(out.n, out.c, out.h, out.w, 4);
    before = random(in.n, in.c, in.h, in.w, 5);
    gate = random(in.n, in.c, in.h, in.w, 6);
    weight_shape = {c.out_channels, c.in_channels / c.groups, shape.taps(), c.groups, shape.passes(), passes_of_taps(shape)};
    std::mt19937 generator(3);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<double> uniform;
    weight.resize(weight_shape.outputs * weight_shape.row());
    for (float& w : weight) w = uniform(generator) < c.density ? normal(generator) : 0;
    for (int64_t i = 0; i < c.out_channels; ++i) bias.push_back(normal(generator));
    const auto kept = [&](int64_t i) { return weight[i] != 0; };
    const Machine three = machine(Isa::kPlain, 3);
    const PatternLists lists(three, weight_shape, kept);
    for (auto* list : {&columns, &input_columns, &order}) list->resize(lists.entries());
    starts.resize(lists.rows() + 1);
    input_starts.resize(lists.input_rows() + 1);
    lists.write(kept, starts.data(), columns.data(), input_starts.data(), input_columns.data(), order.data());
    each_entry([&](size_t, int64_t w) { values.push_back(weight[w]); });
    for (int32_t j : order) input_values.push_back(values[j]);
  }

  // f(entry, flat index into the weight)
  template <class F>
  void each_entry(const F& f) const {
    for (size_t row = 0; row + 1 < starts.size(); ++row) {
      for (int32_t j = starts[row]; j < starts[row + 1]; ++j)
        f(j, static_cast<int64_t>(row) % c.out_channels * weight_shape.row() + columns[j]);
    }
  }

  // f(flat index of in, of the weight, of out)
  template <class F>
  void each_product(const F& f) const {
    const int64_t outputs = c.out_channels / c.groups, inputs = c.in_channels / c.groups;
    for (int64_t n = 0; n < c.batch; ++n) {
      for (int64_t o = 0; o < c.out_channels; ++o) {
        for (int64_t y = 0; y < out.h; ++y) {
          for (int64_t x = 0; x < out.w; ++x) {
            for (int64_t i = 0; i < inputs; ++i) {
              for (int64_t t = 0; t < shape.taps(); ++t) {
                const int64_t iy = y * c.stride[0] - c.padding[0] + t / c.kernel[1] * c.dilation[0];
                const int64_t ix = x * c.stride[1] - c.padding[1] + t % c.kernel[1] * c.dilation[1];
                if (iy < 0 || iy >= in.h || ix < 0 || ix >= in.w) continue;
                const int64_t channel = o / outputs * inputs + i;
                f(((n * in.c + channel) * in.h + iy) * in.w + ix, o * weight_shape.row() + i * shape.taps() + t,
                  ((n * out.c + o) * out.h + y) * out.w + x);
              }
            }
          }
        }
      }
    }
  }
  Entries forward() const {
    return {starts.data(), columns.data(), values.data(), c.out_channels, static_cast<int64_t>(starts.size()) / c.out_channels};
  }
  Entries backward() const {
    const int64_t parts = static_cast<int64_t>(input_starts.size()) / c.in_channels;
    return {input_starts.data(), input_columns.data(), input_values.data(), c.in_channels, parts / shape.passes()};
  }
};

int64_t reach(const Problem& p) {
  int64_t halo = 0;
  const auto extend = [&](const Axis& y, const Axis& x) {
    while (!reaches(y, halo) || !reaches(x, halo)) ++halo;
  };
  extend(forward_axis(p.shape, 0), forward_axis(p.shape, 1));
  for_each_residue(p.shape, [&](int64_t, const Axis& y, const Axis& x) { extend(y, x); });
  return halo;
}

void epilogue(std::vector<double>& result, const Tensor& like, const float* bias, const Tensor* residual, bool relu, const Tensor* gate) {
  for (size_t i = 0; i < result.size(); ++i) {
    if (bias) result[i] += bias[i / (like.h * like.w) % like.c];
    if (residual) result[i] += residual->values[i];
    if (relu && result[i] < 0) result[i] = 0;
    if (gate && !(gate->values[i] > 0)) result[i] = 0;
  }
}

void test_images(const Problem& p, Isa isa, Order order, bool with_epilogue, const std::vector<double>& expected,
                 const std::vector<double>& expected_in) {
  const Stored<float> in(p.in, order), grad(p.out, order), residual(p.other, order), in_residual(p.before, order), in_gate(p.gate, order);
  Epilogue<Images<const float>> after, after_grad;
  if (with_epilogue) {
    after = {p.bias.data(), residual.input(), true, {}};
    after_grad = {nullptr, in_residual.input(), false, in_gate.input()};
  }
  Tensor first_out, first_in;
  for (int threads : kThreads) {
    Stored<float> out(p.out, order), grad_in(p.in, order);
    Machine m = machine(isa, threads);
    m.last_cache = threads > 1;  // and so past the caches, where results are whole lines
    EXPECT(past_caches(m, p.shape.activations()) == (isa == Isa::kAvx512 && threads > 1) && is_line(out.images.data),
           "not the way to test");
    sparse_conv<float>(m, p.shape, p.forward(), in.input(), after, out.images);
    sparse_conv_input_grad<float>(m, p.shape, p.backward(), grad.input(), after_grad, grad_in.images);
    const Tensor got = out.read(p.out), got_in = grad_in.read(p.in);
    expect_close(got, expected, 1e-4, "images, forward");
    expect_close(got_in, expected_in, 1e-4, "images, gradient");
    if (threads == kThreads[0]) {
      first_out = got;
      first_in = got_in;
    }
    EXPECT(got.values == first_out.values && got_in.values == first_in.values, "the bits depend on the number of threads");
  }
}

void test_blocks(const Problem& p, Isa isa, bool with_epilogue, const std::vector<double>& expected,
                 const std::vector<double>& expected_in) {
  const int64_t halo = reach(p), width = lanes(isa);
  const Blocked in(p.in, halo, width), grad(p.out, halo, width), residual(p.other, halo, width), in_residual(p.before, halo, width),
      in_gate(p.gate, halo, width);
  Epilogue<Blocks<const float>> after, after_grad;
  if (with_epilogue) {
    after = {p.bias.data(), residual.input(), true, {}};
    after_grad = {nullptr, in_residual.input(), false, in_gate.input()};
  }
  Tensor first_out, first_in;
  struct Way {  // results past the caches, where they are at whole lines, or through them
    int64_t last_cache, shift;
  };
  for (Way way : {Way{0, 0}, Way{1, 0}, Way{1, 1}}) {
    for (int threads : kThreads) {
      Blocked out(p.out, halo, width, way.shift), grad_in(p.in, halo, width, way.shift);
      Machine m = machine(isa, threads);
      m.last_cache = way.last_cache;
      EXPECT(past_caches(m, p.shape.activations()) == (isa == Isa::kAvx512 && way.last_cache == 1), "not the way to test");
      EXPECT(is_line(out.blocks.data) == (way.shift == 0), "not where to test");
      sparse_conv(m, p.shape, p.forward(), in.input(), after, out.blocks);
      sparse_conv_input_grad(m, p.shape, p.backward(), grad.input(), after_grad, grad_in.blocks);
      const Tensor got = out.read(p.out), got_in = grad_in.read(p.in);
      expect_close(got, expected, 1e-4, "blocks, forward");
      expect_close(got_in, expected_in, 1e-4, "blocks, gradient");
      if (first_out.values.empty()) {
        first_out = got;
        first_in = got_in;
      }
      EXPECT(got.values == first_out.values && got_in.values == first_in.values, "the bits depend on threads or caches");
      if (p.c.batch % width == 0) {  // all that is not inside is still 0
        double inside = 0;
        for (float v : got.values) inside += std::abs(v);
        EXPECT(std::abs(inside - out.sum_of_magnitudes()) <= 1e-6 * (1 + inside), "something was written to the halo");
      }
    }
  }
}

void test_weight_grad(const Problem& p, Isa isa, Order order, const std::vector<double>& expected) {
  const Stored<float> in(p.in, order), grad(p.out, order);
  std::vector<float> first;
  for (int threads : kThreads) {
    std::vector<float> got(p.weight.size(), -1.f);
    sparse_conv_weight_grad<float>(machine(isa, threads), p.shape, p.forward(), in.input(), grad.input(), got.data());
    for (size_t w = 0; w < got.size(); ++w) {
      const double want = p.weight[w] == 0 ? 0 : expected[w];
      EXPECT(std::abs(got[w] - want) <= 1e-3 * std::abs(want) + (want == 0 ? 0 : 1e-3), "weight %zu: %g, not %g", w, got[w], want);
    }
    if (threads == kThreads[0]) first = got;
    EXPECT(got == first, "the bits of a weight gradient depend on the number of threads");
  }
}

void test_half(const Problem& p, Isa isa, const std::vector<double>& forward) {
  const Stored<uint16_t> in(p.in, kBatchInnermost);
  Stored<uint16_t> out(p.out, kBatchInnermost);
  sparse_conv<uint16_t>(machine(isa, 2), p.shape, p.forward(), in.input(), {}, out.images);
  double largest = 0;
  for (double v : forward) largest = std::max(largest, std::abs(v));
  expect_close(out.read(p.out), forward, 0.02 * (1 + largest), "bfloat16, forward");
}

}  // namespace

int main() {
  for (const Case& c : kCases) {
    const Problem p(c);
    std::vector<double> forward(p.out.values.size()), backward(p.in.values.size()), weight_grad(p.weight.size());
    p.each_product([&](int64_t i, int64_t w, int64_t o) {
      forward[o] += double{p.in.values[i]} * p.weight[w];
      backward[i] += double{p.out.values[o]} * p.weight[w];
      weight_grad[w] += double{p.out.values[o]} * p.in.values[i];
    });
    std::vector<double> finished = forward, finished_in = backward;
    epilogue(finished, p.out, p.bias.data(), &p.other, true, nullptr);
    epilogue(finished_in, p.in, nullptr, &p.before, false, &p.gate);
    for (Isa isa : cases::instruction_sets()) {
      for (Order order : {kImagesFirst, kChannelsLast, kBatchInnermost}) {
        test_images(p, isa, order, false, forward, backward);
        test_images(p, isa, order, true, finished, finished_in);
        test_weight_grad(p, isa, order, weight_grad);
      }
      if (c.stride[0] <= 2 && c.stride[1] <= 2) {
        test_blocks(p, isa, false, forward, backward);
        test_blocks(p, isa, true, finished, finished_in);
      }
      test_half(p, isa, forward);
    }
  }
  std::puts("sparse convolutions: ok");
}
