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

// Past the caches, where `streams`: whole lines only, which nothing then reads from memory first.
S2AP_TARGET S2AP_INLINE void store_result(float* p, const Floats& v, bool streams) {
#if S2AP_WIDTH == 64
  if (streams) return _mm512_stream_ps(p, (__m512)v);
#endif
  store_floats(p, v);
}

// Keeps the compiler from working out the addresses of all vectors of a tile beforehand: there are more of them than registers.
template <class T>
S2AP_INLINE void hide(T*& p) {
  asm("" : "+r"(p));
}

// f(vector, its place) for the vectors of a tile that begins at p.
template <int rows, int columns, class T, class F>
S2AP_TARGET S2AP_INLINE void for_each_vector(Floats (&vectors)[rows][columns], T* p, int64_t row, int64_t column, const F& f) {
  S2AP_ALL for (int r = 0; r < rows; ++r, p += row) {
    T* at = p;
    S2AP_ALL for (int c = 0; c < columns; ++c, at += column) {
      hide(at);
      f(vectors[r][c], at);
    }
  }
}

// The vectors of a tile of results, or of a gradient: of a later channel, which the machine does not foresee, for they are few and channels
// lie far apart.
constexpr int64_t kChannelsAhead = 4;

template <int rows, int columns>
S2AP_TARGET S2AP_INLINE void ask_for_tile(const float* first, int64_t row, int64_t column) {
  constexpr int64_t kVectors = 64 / S2AP_WIDTH;  // in a line
  S2AP_ALL for (int r = 0; r < rows; ++r, first += row) {
    const float* at = first;
    S2AP_ALL for (int c = 0; c < columns; c += kVectors, at += kVectors * column) {
      hide(at);
      ask_for(at);
    }
  }
}

// With `ends` and without, apart: most of what follows the sums would only take registers where they are not complete.
template <int step, int rows, int columns, bool ends>
S2AP_TARGET S2AP_INLINE void tile_of(const TileArgs& args) {
  const int32_t *start = args.starts + args.first, *const last = args.starts + args.last;
  const int32_t* offset = args.offsets + *start;  // entries of a run follow each other, whatever output channel they are of
  const float* value = args.values + *start;
  const float *bias = args.bias ? args.bias + args.first : nullptr, *resumed = args.resumed;
  float* out = args.out;
  const float *ahead = args.ahead.first, *const ahead_end = args.ahead.end();
  while (start < last) {
    if (ahead < ahead_end) {
      args.ahead.ask_from(ahead);
      ahead += args.ahead.step;
    }
    if constexpr (ends) {
      const int64_t later = out - args.out + kChannelsAhead * args.out_channel;
      if (!args.streams) ask_for_tile<rows, columns>(args.out + later, args.out_row, args.out_column);
      if (args.residual) ask_for_tile<rows, columns>(args.residual + later, args.out_row, args.out_column);
      if (args.gate) ask_for_tile<rows, columns>(args.gate + later, args.out_row, args.out_column);
    }
    Floats sum[rows][columns];
    if (resumed) {
      S2AP_ALL for (int r = 0; r < rows; ++r) {
        S2AP_ALL for (int c = 0; c < columns; ++c, resumed += kFloats) load_floats(sum[r][c], resumed);
      }
    } else {
      const Floats first = bias ? broadcast(*bias++) : Floats{};
      S2AP_ALL for (int r = 0; r < rows; ++r) { S2AP_ALL for (int c = 0; c < columns; ++c) sum[r][c] = first; }
    }
    for (const int32_t* const end = args.offsets + *++start; offset < end; ++offset, ++value) {
      const Floats v = broadcast(*value);
      const float* x = args.in + *offset;
      S2AP_ALL for (int r = 0; r < rows; ++r, x += args.in_row) {
        hide(x);
        S2AP_ALL for (int c = 0; c < columns; ++c) {
          Floats at;
          load_floats(at, x + c * step * kFloats);
          add_product(sum[r][c], v, at);
        }
      }
    }
    if constexpr (!ends) {
      S2AP_ALL for (int r = 0; r < rows; ++r) { S2AP_ALL for (int c = 0; c < columns; ++c, out += kFloats) store_floats(out, sum[r][c]); }
      continue;
    }
    if (args.residual) {
      for_each_vector(sum, args.residual + (out - args.out), args.out_row, args.out_column,
                      [](Floats& v, const float* p) S2AP_TARGET S2AP_LAMBDA {
                        Floats at;
                        load_floats(at, p);
                        v = v + at;
                      });
    }
    if (args.relu) {
      S2AP_ALL for (int r = 0; r < rows; ++r) {
        S2AP_ALL for (int c = 0; c < columns; ++c) sum[r][c] = sum[r][c] < 0 ? Floats{} : sum[r][c];  // NaN stays
      }
    }
    if (args.gate) {
      for_each_vector(sum, args.gate + (out - args.out), args.out_row, args.out_column,
                      [](Floats& v, const float* p) S2AP_TARGET S2AP_LAMBDA {
                        Floats at;
                        load_floats(at, p);
                        v = at <= 0 ? Floats{} : v;
                      });
    }
    for_each_vector(sum, out, args.out_row, args.out_column,
                    [&](Floats& v, float* p) S2AP_TARGET S2AP_LAMBDA { store_result(p, v, args.streams); });
    out += args.out_channel;
  }
}

template <int step, int rows, int columns>
S2AP_TARGET void tile(const TileArgs& given) {
  const TileArgs args = given;  // a copy that the stores cannot change, in the eyes of the compiler
  args.ends ? tile_of<step, rows, columns, true>(args) : tile_of<step, rows, columns, false>(args);
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

// sums[k] += all lanes of vectors[k], for k < count.
S2AP_TARGET S2AP_INLINE void add_lanes(const Floats (&vectors)[kFloats], int64_t count, float* sums) {
#if S2AP_WIDTH == 64
  // Halves of 16 vectors are added up into 8, quarters of these into 4, and so on: the sums of vector k end in lane k. (With masks of all
  // lanes, since the plain forms make GCC warn of its own header.)
  constexpr __mmask16 all_lanes = 0xFFFF;
  __m512 v[8], w[4], u[2];
  S2AP_ALL for (int k = 0; k < 8; ++k) {
    const auto a = (__m512)vectors[k], b = (__m512)vectors[k + 8];
    v[k] = _mm512_add_ps(_mm512_mask_blend_ps(0xFF00, a, b), _mm512_maskz_shuffle_f32x4(all_lanes, a, b, 0x4E));
  }
  const __m512i quarters = _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
  S2AP_ALL for (int k = 0; k < 4; ++k) {
    w[k] = _mm512_add_ps(_mm512_mask_blend_ps(0xF0F0, v[k], v[k + 4]), _mm512_permutex2var_ps(v[k], quarters, v[k + 4]));
  }
  S2AP_ALL for (int k = 0; k < 2; ++k) {
    u[k] = _mm512_add_ps(_mm512_mask_blend_ps(0xCCCC, w[k], w[k + 2]), _mm512_maskz_shuffle_ps(all_lanes, w[k], w[k + 2], 0x4E));
  }
  const __m512 even = _mm512_maskz_unpacklo_ps(all_lanes, u[0], u[1]), odd = _mm512_maskz_unpackhi_ps(all_lanes, u[0], u[1]);
  const Floats all =
      (Floats)_mm512_add_ps(_mm512_maskz_shuffle_ps(all_lanes, even, odd, 0x44), _mm512_maskz_shuffle_ps(all_lanes, even, odd, 0xEE));
#elif S2AP_WIDTH == 32
  __m256 v[4];
  S2AP_ALL for (int k = 0; k < 4; ++k) {
    const auto a = (__m256)vectors[k], b = (__m256)vectors[k + 4];
    v[k] = _mm256_add_ps(_mm256_blend_ps(a, b, 0xF0), _mm256_permute2f128_ps(a, b, 0x21));
  }
  const Floats all = (Floats)_mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
#else
  Floats all;
  S2AP_ALL for (int k = 0; k < 4; ++k) all[k] = (vectors[k][0] + vectors[k][1]) + (vectors[k][2] + vectors[k][3]);
#endif
  store_first(sums, load_first(sums, count) + all, count);
}

// A gradient's vectors stay in registers while an entry after the other takes its products; what these add up to waits until there is a
// vector of them. The entries of a run follow each other, whatever output channel they are of.
template <int rows, int columns>
S2AP_TARGET void products(const ProductArgs& given) {
  const ProductArgs args = given;
  Floats waiting[kFloats];
  int64_t count = 0, done = args.starts[args.first];
  const float* gradient = args.gradient;
  for (int64_t o = args.first; o < args.last; ++o, gradient += args.channel) {
    const int32_t* offset = args.offsets + args.starts[o];
    const int32_t* const end = args.offsets + args.starts[o + 1];
    if (offset == end) continue;
    ask_for_tile<rows, columns>(gradient + kChannelsAhead * args.channel, args.row, args.column);
    Floats g[rows][columns];
    for_each_vector(g, gradient, args.row, args.column, [](Floats& v, const float* p) S2AP_TARGET S2AP_LAMBDA { load_floats(v, p); });
    for (; offset < end; ++offset) {
      const float* x = args.in + *offset;
      Floats sum[2] = {};  // two, so that products wait less for each other
      S2AP_ALL for (int r = 0; r < rows; ++r, x += args.in_row) {
        hide(x);
        S2AP_ALL for (int c = 0; c < columns; ++c) {
          Floats at;
          load_floats(at, x + c * kFloats);
          add_product(sum[c % 2], g[r][c], at);
        }
      }
      waiting[count++] = sum[0] + sum[1];
      if (count == kFloats) {
        add_lanes(waiting, kFloats, args.sums + done);
        done += kFloats;
        count = 0;
      }
    }
  }
  if (count == 0) return;
  for (int64_t k = count; k < kFloats; ++k) waiting[k] = Floats{};
  add_lanes(waiting, count, args.sums + done);
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

template <int rows, int... columns>
constexpr std::array<ProductLoop, sizeof...(columns)> products_of(std::integer_sequence<int, columns...>) {
  return {products<rows, columns + 1>...};
}

template <int most>
using Columns = std::make_integer_sequence<int, most>;

inline constexpr TileLoops kTileLoops = {
    {tiles_of<1, 1>(Columns<kWidest>()), tiles_of<2, 1>(Columns<kWidest>())},
    tiles_of<1, 2>(Columns<kShort>()),
    products_of<1>(Columns<kMostProducts>()),
    products_of<2>(Columns<kMostProducts / 2>()),
    products_of<4>(Columns<kMostProducts / 4>()),
    finish,
    place,
};

}  // namespace S2AP_LOOPS
}  // namespace s2ap
