// The loops of tiles.h for one instruction set: included once for each, with S2AP_LOOPS (the namespace), S2AP_TARGET (the function
// attribute) and S2AP_WIDTH (bytes in a vector register).

namespace s2ap {
namespace S2AP_LOOPS {

constexpr int64_t kFloats = S2AP_WIDTH / sizeof(float);
typedef float Floats __attribute__((vector_size(S2AP_WIDTH)));
typedef float LooseFloats __attribute__((vector_size(S2AP_WIDTH), aligned(4), may_alias));  // at any address

S2AP_TARGET S2AP_INLINE void load_floats(Floats& v, const float* p) { v = *reinterpret_cast<const LooseFloats*>(p); }
S2AP_TARGET S2AP_INLINE void store_floats(float* p, const Floats& v) { *reinterpret_cast<LooseFloats*>(p) = v; }

// One number in all lanes.
S2AP_TARGET S2AP_INLINE Floats broadcast(float x) {
#if S2AP_WIDTH == 64
  return (Floats)_mm512_set1_ps(x);
#elif S2AP_WIDTH == 32
  return (Floats)_mm256_set1_ps(x);
#else
  return Floats{x, x, x, x};
#endif
}

// sum += a * b, rounded once where the machine can.
S2AP_TARGET S2AP_INLINE void add_product(Floats& sum, const Floats& a, const Floats& b) {
#if S2AP_WIDTH == 64
  sum = (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif S2AP_WIDTH == 32
  sum = (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  sum = sum + a * b;
#endif
}

// What lies like a tile's results, for writing or for reading.
template <int rows, int columns, int write>
S2AP_TARGET S2AP_INLINE void prefetch(const TileArgs& args, const float* first) {
  S2AP_ALL for (int r = 0; r < rows; ++r) {
    S2AP_ALL for (int c = 0; c < columns; c += 64 / S2AP_WIDTH) __builtin_prefetch(first + r * args.out_row + c * args.out_column, write);
  }
}

template <int step, int rows, int columns>
S2AP_TARGET void tile(const TileArgs& given) {
  const TileArgs args = given;  // a copy that the stores below cannot change, in the eyes of the compiler
  float* out = args.out;
  for (int64_t o = args.first; o < args.last; ++o, out += args.out_channel) {
    prefetch<rows, columns, 1>(args, out + 2 * args.out_channel);  // what is written two channels on, and read one channel on
    if (args.residual) prefetch<rows, columns, 0>(args, args.residual + (out - args.out) + args.out_channel);
    if (args.gate) prefetch<rows, columns, 0>(args, args.gate + (out - args.out) + args.out_channel);
    Floats sum[rows][columns];
    if (args.resume) {
      S2AP_ALL for (int r = 0; r < rows; ++r) {
        S2AP_ALL for (int c = 0; c < columns; ++c) load_floats(sum[r][c], out + r * args.out_row + c * args.out_column);
      }
    } else {
      const Floats start = args.bias ? broadcast(args.bias[o]) : Floats{};
      S2AP_ALL for (int r = 0; r < rows; ++r) {
        S2AP_ALL for (int c = 0; c < columns; ++c) sum[r][c] = start;
      }
    }
    const int32_t *offset = args.offsets + args.starts[o], *const end = args.offsets + args.ends[o];
    for (const float* value = args.values + args.starts[o]; offset < end; ++offset, ++value) {
      const Floats v = broadcast(*value);
      const float* const x = args.in + *offset;
      S2AP_ALL for (int r = 0; r < rows; ++r) {
        S2AP_ALL for (int c = 0; c < columns; ++c) {
          Floats at;
          load_floats(at, x + r * args.in_row + c * step * kFloats);
          add_product(sum[r][c], v, at);
        }
      }
    }
    if (args.residual) {
      const float* const other = args.residual + (out - args.out);
      S2AP_ALL for (int r = 0; r < rows; ++r) {
        S2AP_ALL for (int c = 0; c < columns; ++c) {
          Floats at;
          load_floats(at, other + r * args.out_row + c * args.out_column);
          sum[r][c] = sum[r][c] + at;
        }
      }
    }
    if (args.relu) {
      S2AP_ALL for (int r = 0; r < rows; ++r) {
        S2AP_ALL for (int c = 0; c < columns; ++c) sum[r][c] = sum[r][c] < 0 ? Floats{} : sum[r][c];  // NaN stays
      }
    }
    if (args.gate) {
      const float* const gate = args.gate + (out - args.out);
      S2AP_ALL for (int r = 0; r < rows; ++r) {
        S2AP_ALL for (int c = 0; c < columns; ++c) {
          Floats at;
          load_floats(at, gate + r * args.out_row + c * args.out_column);
          sum[r][c] = at <= 0 ? Floats{} : sum[r][c];
        }
      }
    }
    S2AP_ALL for (int r = 0; r < rows; ++r) {
      S2AP_ALL for (int c = 0; c < columns; ++c) store_floats(out + r * args.out_row + c * args.out_column, sum[r][c]);
    }
  }
}

// The first `count` floats of a vector, 1 <= count <= kFloats; the others are 0, or stay. (AVX2's masked stores are slow on some machines.)
S2AP_TARGET S2AP_INLINE Floats load_first(const float* p, int64_t count) {
  Floats v{};
#if S2AP_WIDTH == 64
  v = (Floats)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#else
  count == kFloats ? load_floats(v, p) : static_cast<void>(std::memcpy(&v, p, count * sizeof(float)));
#endif
  return v;
}
S2AP_TARGET S2AP_INLINE void store_first(float* p, const Floats& v, int64_t count) {
#if S2AP_WIDTH == 64
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
#else
  count == kFloats ? store_floats(p, v) : static_cast<void>(std::memcpy(p, &v, count * sizeof(float)));
#endif
}

S2AP_TARGET inline void finish(const FinishArgs& args) {
  const FinishArgs a = args;
  for (int64_t i = 0; i < a.count; i += kFloats) {
    const int64_t count = std::min(a.count - i, kFloats);
    Floats result = load_first(a.from + i, count);
    if (a.residual) result = result + load_first(a.residual + i, count);
    if (a.relu) result = result < 0 ? Floats{} : result;  // NaN stays
    if (a.gate) result = load_first(a.gate + i, count) <= 0 ? Floats{} : result;
    store_first(a.to + i, result, count);
  }
}

// to[k] += all lanes of sums[k].
template <int count>
S2AP_TARGET S2AP_INLINE void add_lanes(float* to, const Floats (&sums)[count]) {
#if S2AP_WIDTH == 16
  S2AP_ALL for (int k = 0; k < count; ++k) to[k] += (sums[k][0] + sums[k][1]) + (sums[k][2] + sums[k][3]);
#else
  S2AP_ALL for (int k = 0; k < count; k += 4) {
    __m256 eight[4];
    S2AP_ALL for (int i = 0; i < 4; ++i) {
      alignas(S2AP_WIDTH) float lanes[kFloats];
      store_floats(lanes, k + i < count ? sums[k + i < count ? k + i : 0] : Floats{});
      eight[i] = _mm256_load_ps(lanes);
      if constexpr (kFloats == 16) eight[i] = _mm256_add_ps(eight[i], _mm256_load_ps(lanes + kFloats / 2));
    }
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(eight[0], eight[1]), _mm256_hadd_ps(eight[2], eight[3]));
    const __m128 all = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
    S2AP_ALL for (int i = 0; i < 4; ++i) {
      if (k + i < count) to[k + i] += all[i];
    }
  }
#endif
}

// The products of `together` entries from the j-th on. Each load of `a` is shared by all of them, and so many sums in registers keep the
// multiply-adds from waiting for each other.
template <int together>
S2AP_TARGET void dots_of(const DotArgs& args, int64_t j) {
  Floats sum[together] = {};
  for (int64_t r = 0; r < args.rows; ++r) {
    const float* const a = args.a + r * args.a_row;
    const float* x[together];
    S2AP_ALL for (int k = 0; k < together; ++k) x[k] = args.x + r * args.x_row + args.offsets[j + k];
    for (int64_t c = 0; c < args.columns * kFloats; c += kFloats) {
      Floats shared;
      load_floats(shared, a + c);
      S2AP_ALL for (int k = 0; k < together; ++k) {
        Floats at;
        load_floats(at, x[k] + c);
        add_product(sum[k], shared, at);
      }
    }
  }
  add_lanes(args.sums + j, sum);
}

// sums[j] += the dot products of a with x[offsets[j]], over `rows` rows of `columns` vectors.
S2AP_TARGET inline void dots(const DotArgs& args) {
  constexpr int kTogether = 8;
  static constexpr void (*kRest[kTogether])(const DotArgs&, int64_t) = {nullptr,    dots_of<1>, dots_of<2>, dots_of<3>,
                                                                        dots_of<4>, dots_of<5>, dots_of<6>, dots_of<7>};
  int64_t j = args.first;
  for (; j + kTogether <= args.last; j += kTogether) dots_of<kTogether>(args, j);
  if (j < args.last) kRest[args.last - j](args, j);
}

S2AP_TARGET inline void place(const PlaceArgs& args) {
  const auto taps = static_cast<int32_t>(args.taps), channel = static_cast<int32_t>(args.channel);
  const int32_t *const columns = args.columns, *const tap_offsets = args.tap_offsets;
  int32_t* const offsets = args.offsets;  // apart from both
  if (taps == 1) {
#pragma GCC ivdep
    for (int64_t j = 0; j < args.count; ++j) offsets[j] = columns[j] * channel + tap_offsets[0];
    return;
  }
  const auto part = static_cast<uint32_t>(((uint64_t{1} << 32) + args.taps - 1) / args.taps);  // a division for each entry would be slow
#pragma GCC ivdep
  for (int64_t j = 0; j < args.count; ++j) {
    const auto c = static_cast<int32_t>(uint64_t{static_cast<uint32_t>(columns[j])} * part >> 32);
    offsets[j] = c * channel + tap_offsets[columns[j] - c * taps];
  }
}

template <int step, int rows, int... columns>
constexpr std::array<TileLoop, sizeof...(columns)> tiles_of(std::integer_sequence<int, columns...>) {
  return {tile<step, rows, columns + 1>...};
}

template <int rows>
using Columns = std::make_integer_sequence<int, kWidest / rows>;

inline constexpr TileLoops kTileLoops = {
    {tiles_of<1, 1>(Columns<1>()), tiles_of<2, 1>(Columns<1>())},
    {tiles_of<1, 2>(Columns<2>()), tiles_of<2, 2>(Columns<2>())},
    finish,
    dots,
    place,
};

}  // namespace S2AP_LOOPS
}  // namespace s2ap
