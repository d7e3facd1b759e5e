// The loops of loops.h for one instruction set: included once for each, with S2AP_LOOPS (the namespace), S2AP_TARGET (the function
// attribute) and S2AP_WIDTH (bytes in a vector register).
//
// Those that stream from memory are written on vectors (GNU vector extensions) and ask for what they will need kAhead bytes later: with
// several streams at once the hardware's own prefetching leaves half of the bandwidth unused (seen: 5.3 -> 1.1 ms for a sweep of 45 MB).
// The others are plain loops that the compiler vectorises.
//
// Loops that rank are templates of the bits: they are the same for both types of 16 bits. Those that compute are templates of the element
// type.

namespace s2ap {
namespace S2AP_LOOPS {

constexpr int64_t kAhead = 4096;
constexpr int64_t kCountBlock = 16384;  // what a 16-bit counter can count

template <class Bits>
struct Vector {
  static constexpr int64_t kSize = S2AP_WIDTH / sizeof(Bits);
  typedef Bits Type __attribute__((vector_size(S2AP_WIDTH)));
};
template <class Bits>
using VectorOf = typename Vector<Bits>::Type;

S2AP_TARGET S2AP_INLINE void fetch(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + kAhead); }

// The first n of a vector's lanes; the others are 0.
template <class Bits>
S2AP_TARGET S2AP_INLINE void load(VectorOf<Bits>& v, const Bits* p, int64_t n = Vector<Bits>::kSize) {
  v = VectorOf<Bits>{};
  memcpy(&v, p, n * sizeof(Bits));
}

template <class Bits>
S2AP_TARGET S2AP_INLINE int64_t sum(const VectorOf<Bits>& v) {
  int64_t total = 0;
  for (int64_t i = 0; i < Vector<Bits>::kSize; ++i) total += v[i];
  return total;
}

#if S2AP_WIDTH == 64
// Compaction: the lanes of a vector that lie in [lo, hi) move to its front and the whole vector is stored; the next store
// overwrites what is beyond them.
S2AP_TARGET inline SweepCounts sweep(const uint32_t* x, int64_t n, uint32_t lo, uint32_t hi, uint32_t* inside) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), low = _mm512_set1_epi32(static_cast<int>(lo)),
                high = _mm512_set1_epi32(static_cast<int>(hi)), width = _mm512_set1_epi32(static_cast<int>(hi - lo));
  SweepCounts counts;
  uint32_t* out = inside;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 valid = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1);
    const __m512i key = _mm512_and_si512(_mm512_maskz_loadu_epi32(valid, x + i), magnitude);
    fetch(x + i);
    const __mmask16 in = _mm512_mask_cmplt_epu32_mask(valid, _mm512_sub_epi32(key, low), width);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(in, key));
    out += _mm_popcnt_u32(in);
    counts.above += _mm_popcnt_u32(_mm512_mask_cmpge_epu32_mask(valid, key, high));
  }
  counts.inside = out - inside;
  return counts;
}

S2AP_TARGET inline SweepCounts sweep(const uint64_t* x, int64_t n, uint64_t lo, uint64_t hi, uint64_t* inside) {
  const __m512i magnitude = _mm512_set1_epi64(0x7fffffffffffffff), low = _mm512_set1_epi64(static_cast<int64_t>(lo)),
                high = _mm512_set1_epi64(static_cast<int64_t>(hi)), width = _mm512_set1_epi64(static_cast<int64_t>(hi - lo));
  SweepCounts counts;
  uint64_t* out = inside;
  for (int64_t i = 0; i < n; i += 8) {
    const __mmask8 valid = n - i >= 8 ? 0xff : static_cast<__mmask8>((1u << (n - i)) - 1);
    const __m512i key = _mm512_and_si512(_mm512_maskz_loadu_epi64(valid, x + i), magnitude);
    fetch(x + i);
    const __mmask8 in = _mm512_mask_cmplt_epu64_mask(valid, _mm512_sub_epi64(key, low), width);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi64(in, key));
    out += _mm_popcnt_u32(in);
    counts.above += _mm_popcnt_u32(_mm512_mask_cmpge_epu64_mask(valid, key, high));
  }
  counts.inside = out - inside;
  return counts;
}

S2AP_TARGET inline SweepCounts sweep(const uint16_t* x, int64_t n, uint16_t lo, uint16_t hi, uint16_t* inside) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff), low = _mm512_set1_epi16(static_cast<int16_t>(lo)),
                high = _mm512_set1_epi16(static_cast<int16_t>(hi)), width = _mm512_set1_epi16(static_cast<int16_t>(hi - lo));
  SweepCounts counts;
  uint16_t* out = inside;
  for (int64_t i = 0; i < n; i += 32) {
    const __mmask32 valid = n - i >= 32 ? 0xffffffffu : static_cast<__mmask32>((uint32_t{1} << (n - i)) - 1);
    const __m512i key = _mm512_and_si512(_mm512_maskz_loadu_epi16(valid, x + i), magnitude);
    fetch(x + i);
    const __mmask32 in = _mm512_mask_cmplt_epu16_mask(valid, _mm512_sub_epi16(key, low), width);
    // Compressing 16-bit lanes needs AVX512_VBMI2; by way of 32-bit lanes it does not.
    for (int half = 0; half < 2; ++half) {
      const __m256i part = half ? _mm512_extracti64x4_epi64(key, 1) : _mm512_castsi512_si256(key);
      const __mmask16 in_part = static_cast<__mmask16>(in >> (16 * half));
      const __m512i packed = _mm512_maskz_compress_epi32(in_part, _mm512_cvtepu16_epi32(part));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(packed));
      out += _mm_popcnt_u32(in_part);
    }
    counts.above += _mm_popcnt_u32(_mm512_mask_cmpge_epu16_mask(valid, key, high));
  }
  counts.inside = out - inside;
  return counts;
}
#elif S2AP_WIDTH == 32
// The same without an instruction for it: a table says which lanes to move to the front.
struct Compress8 {
  uint64_t order[256] = {};  // eight bytes each: the set bits of the index, from the lowest
  constexpr Compress8() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int lane = 0, at = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) order[mask] |= uint64_t(lane) << (8 * at++);
      }
    }
  }
};
inline constexpr Compress8 kCompress8;

S2AP_TARGET S2AP_INLINE __m256i compress(__m256i lanes, int mask) {
  const __m128i order = _mm_cvtsi64_si128(static_cast<int64_t>(kCompress8.order[mask]));
  return _mm256_permutevar8x32_epi32(lanes, _mm256_cvtepu8_epi32(order));
}

// Eight 32-bit magnitudes of elements that are up to 32 bits wide, or four of 64.
S2AP_TARGET S2AP_INLINE __m256i read(const uint16_t* x) {
  return _mm256_and_si256(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))), _mm256_set1_epi32(0x7fff));
}
S2AP_TARGET S2AP_INLINE __m256i read(const uint32_t* x) {
  return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), _mm256_set1_epi32(0x7fffffff));
}
S2AP_TARGET S2AP_INLINE __m256i read(const uint64_t* x) {
  return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), _mm256_set1_epi64x(0x7fffffffffffffff));
}
S2AP_TARGET S2AP_INLINE void write(uint16_t* out, __m256i lanes) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(lanes, lanes), 0b1000);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
}
S2AP_TARGET S2AP_INLINE void write(uint32_t* out, __m256i lanes) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), lanes); }
S2AP_TARGET S2AP_INLINE void write(uint64_t* out, __m256i lanes) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), lanes); }

// Magnitudes are never negative, so signed comparisons do, and `> bound - 1` stands for `>= bound`.
template <class Bits>
S2AP_TARGET S2AP_INLINE __m256i just_below(Bits bound) {
  const auto below = static_cast<std::make_signed_t<Bits>>(static_cast<Bits>(bound - 1));
  return sizeof(Bits) == 8 ? _mm256_set1_epi64x(below) : _mm256_set1_epi32(static_cast<int>(below));
}
template <class Bits>
S2AP_TARGET S2AP_INLINE int above_mask(__m256i lanes, __m256i below) {  // eight bits, two for each 64-bit lane
  const __m256i above = sizeof(Bits) == 8 ? _mm256_cmpgt_epi64(lanes, below) : _mm256_cmpgt_epi32(lanes, below);
  return _mm256_movemask_ps(_mm256_castsi256_ps(above));
}

template <class Bits>
S2AP_TARGET SweepCounts sweep(const Bits* x, int64_t n, Bits lo, Bits hi, Bits* inside) {
  constexpr bool kWide = sizeof(Bits) == 8;
  constexpr int kLanesRead = kWide ? 4 : 8;
  const __m256i low = just_below(lo), high = just_below(hi);
  SweepCounts counts;
  Bits* out = inside;
  int64_t i = 0;
  for (; i + kLanesRead <= n; i += kLanesRead) {
    fetch(x + i);
    const __m256i key = read(x + i);
    const int over = above_mask<Bits>(key, high), in = above_mask<Bits>(key, low) & ~over;
    write(out, compress(key, in));
    out += kWide ? _mm_popcnt_u32(in) / 2 : _mm_popcnt_u32(in);
    counts.above += kWide ? _mm_popcnt_u32(over) / 2 : _mm_popcnt_u32(over);
  }
  for (; i < n; ++i) {
    const Bits key = x[i] & kMagnitude<Bits>;
    *out = key;
    out += key >= lo && key < hi;
    counts.above += key >= hi;
  }
  counts.inside = out - inside;
  return counts;
}
#else
template <class Bits>
S2AP_TARGET SweepCounts sweep(const Bits* x, int64_t n, Bits lo, Bits hi, Bits* inside) {
  const Bits width = static_cast<Bits>(hi - lo);
  SweepCounts counts;
  Bits* out = inside;
  for (int64_t i = 0; i < n; ++i) {
    const Bits key = x[i] & kMagnitude<Bits>;
    *out = key;  // stays only if it is counted
    out += static_cast<Bits>(key - lo) < width;
    counts.above += key >= hi;
  }
  counts.inside = out - inside;
  return counts;
}
#endif

template <class Bits>
S2AP_TARGET int64_t count_at_least(const Bits* x, int64_t n, Bits bound) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += kCountBlock) {
    const int64_t end = n - begin < kCountBlock ? n : begin + kCountBlock;
    Bits count = 0;
    for (int64_t i = begin; i < end; ++i) count += static_cast<Bits>((x[i] & kMagnitude<Bits>) >= bound);
    total += count;
  }
  return total;
}

#if S2AP_WIDTH == 64
S2AP_TARGET S2AP_INLINE uint32_t at_least(const uint32_t* x, uint32_t bound) {
  const __m512i key = _mm512_and_si512(_mm512_loadu_si512(x), _mm512_set1_epi32(0x7fffffff));
  return _mm512_cmpge_epu32_mask(key, _mm512_set1_epi32(static_cast<int>(bound)));
}
S2AP_TARGET S2AP_INLINE uint32_t at_least(const uint64_t* x, uint64_t bound) {
  const __m512i key = _mm512_and_si512(_mm512_loadu_si512(x), _mm512_set1_epi64(0x7fffffffffffffff));
  return _mm512_cmpge_epu64_mask(key, _mm512_set1_epi64(static_cast<int64_t>(bound)));
}
S2AP_TARGET S2AP_INLINE uint32_t at_least(const uint16_t* x, uint16_t bound) {
  const __m512i key = _mm512_and_si512(_mm512_loadu_si512(x), _mm512_set1_epi16(0x7fff));
  return _mm512_cmpge_epu16_mask(key, _mm512_set1_epi16(static_cast<int16_t>(bound)));
}
template <class Bits>
constexpr int64_t kBitsAtOnce = Vector<Bits>::kSize;
#else
template <class Bits>
constexpr int64_t kBitsAtOnce = 8;
#endif

#if S2AP_WIDTH == 32
// Comparisons are signed here. As magnitudes are below 2^31, key >= bound is key > bound - 1, for a bound of 0 (-1) and of kBeyond too.
S2AP_TARGET S2AP_INLINE uint32_t at_least(const uint32_t* x, uint32_t bound) {
  const __m256i key = _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), _mm256_set1_epi32(0x7fffffff));
  return _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(key, _mm256_set1_epi32(static_cast<int>(bound - 1)))));
}
S2AP_TARGET S2AP_INLINE uint32_t at_least(const uint64_t* x, uint64_t bound) {
  const __m256i least = _mm256_set1_epi64x(static_cast<int64_t>(bound - 1)), magnitude = _mm256_set1_epi64x(0x7fffffffffffffff);
  const auto half = [&](const uint64_t* from) S2AP_TARGET S2AP_LAMBDA {
    const __m256i key = _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), magnitude);
    return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(key, least))));
  };
  return half(x) | half(x + 4) << 4;
}
S2AP_TARGET S2AP_INLINE uint32_t at_least(const uint16_t* x, uint16_t bound) {
  const __m128i key = _mm_and_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)), _mm_set1_epi16(0x7fff));
  const __m128i kept = _mm_cmpgt_epi16(key, _mm_set1_epi16(static_cast<int16_t>(bound - 1)));
  return static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(kept, _mm_setzero_si128())));
}
#elif S2AP_WIDTH < 32
template <class Bits>
S2AP_TARGET S2AP_INLINE uint32_t at_least(const Bits* x, Bits bound) {
  uint32_t bits = 0;
  for (int i = 0; i < 8; ++i) bits |= static_cast<uint32_t>((x[i] & kMagnitude<Bits>) >= bound) << i;
  return bits;
}
#endif

template <class Bits>
S2AP_TARGET void keep_bits(const Bits* x, int64_t n, Bits bound, uint8_t* bits) {
  constexpr int64_t kStep = kBitsAtOnce<Bits>;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    const uint32_t here = at_least(x + i, bound);
    memcpy(bits + i / 8, &here, kStep / 8);
  }
  for (; i < n; i += 8) {
    uint8_t here = 0;
    for (int64_t j = i; j < n && j < i + 8; ++j) here |= static_cast<uint8_t>((x[j] & kMagnitude<Bits>) >= bound) << (j - i);
    bits[i / 8] = here;
  }
}

S2AP_TARGET inline int64_t count_different(const uint8_t* a, const uint8_t* b, int64_t n) {
  const int64_t bytes = (n + 7) / 8;
  int64_t count = 0;
  for (int64_t i = 0; i < bytes; i += 8) {
    uint64_t x = 0, y = 0;
    const int64_t size = bytes - i < 8 ? bytes - i : 8;
    memcpy(&x, a + i, size);
    memcpy(&y, b + i, size);
    count += __builtin_popcountll(x ^ y);
  }
  return count;
}

// The two forms of Keep, a vector of elements at a time; `past_end`: what they say of the zeros that fill up the last vector.
template <class Bits>
struct AtLeast {
  Bits bound;
  bool past_end() const { return bound == 0; }
  S2AP_TARGET S2AP_INLINE void get(VectorOf<Bits>& keep, const VectorOf<Bits>& key, int64_t, int64_t) const {
    keep = (VectorOf<Bits>)(key >= bound);
  }
};
template <class Bits>
struct Given {
  const Bits* mask;
  bool past_end() const { return false; }
  S2AP_TARGET S2AP_INLINE void get(VectorOf<Bits>& keep, const VectorOf<Bits>&, int64_t i, int64_t size) const {
    load(keep, mask + i, size);
  }
};

template <class T, class Form>
S2AP_TARGET int64_t apply_form(const BitsOf<T>* x, const BitsOf<T>* w, BitsOf<T>* masked, int64_t n, Form form) {
  using Bits = BitsOf<T>;
  using V = VectorOf<Bits>;
  const auto step = [=](int64_t i, int64_t size, V& nans) S2AP_TARGET S2AP_LAMBDA {
    V key, weight, keep;
    load(key, x + i, size);
    load(weight, w + i, size);
    key &= kMagnitude<Bits>;
    form.get(keep, key, i, size);
    weight &= keep;
    nans -= (V)(key > Element<T>::kInfinity);
    memcpy(masked + i, &weight, size * sizeof(Bits));
  };
  constexpr int64_t kSize = Vector<Bits>::kSize;
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += kCountBlock) {
    const int64_t end = n - begin < kCountBlock ? n : begin + kCountBlock;
    V nans = {};
    int64_t i = begin;
    for (; i + kSize <= end; i += kSize) {
      fetch(x + i);
      fetch(w + i);
      fetch(masked + i);
      step(i, kSize, nans);
    }
    if (i < end) step(i, end - i, nans);
    total += sum<Bits>(nans);
  }
  return total;
}

template <class T>
S2AP_TARGET int64_t apply(const BitsOf<T>* x, const BitsOf<T>* w, BitsOf<T>* masked, int64_t n, Keep<BitsOf<T>> keep) {
  using Bits = BitsOf<T>;
  return keep.mask ? apply_form<T>(x, w, masked, n, Given<Bits>{keep.mask}) : apply_form<T>(x, w, masked, n, AtLeast<Bits>{keep.bound});
}

// An element is compared with each of the others in its window: for d = 1, 2 ... with the one d places on, or beyond the last place round
// from the first. A later one ranks above it if it is as large, an earlier one if it is larger. All this is done to neighbouring
// elements, whatever their places are, so it takes whole vectors for any `block`, 1 too.
template <class Bits>
S2AP_TARGET S2AP_INLINE void window_keep_of(const Bits* x, int64_t n, int64_t size, int64_t block, int64_t kept, Bits* mask) {
  using Lane = std::make_signed_t<Bits>;  // magnitudes are never negative, and signed comparisons are one instruction
  typedef Lane V __attribute__((vector_size(S2AP_WIDTH)));
  constexpr int64_t kSize = Vector<Bits>::kSize;
  const int64_t period = size * block, reach = period - block;
  // The magnitudes, and zeros where the comparisons of the first and the last windows look, to no effect, beyond them.
  alignas(64) Lane room[3 * kTile + kSize];
  Lane* key = room + kTile;
  for (int64_t i = -reach; i < 0; ++i) key[i] = 0;
  for (int64_t i = n; i < n + reach + kSize; ++i) key[i] = 0;
  for (int64_t i = 0; i < n; i += 64 / sizeof(Bits)) fetch(x + i);
  for (int64_t i = 0; i < n; ++i) key[i] = static_cast<Lane>(x[i] & kMagnitude<Bits>);
  // How many members of its window come after an element: one period, and what a vector more reads of the next ones.
  alignas(64) Lane after[kTile + kSize];
  for (int64_t j = 0; j < size; ++j) {
    for (int64_t i = 0; i < block; ++i) after[j * block + i] = static_cast<Lane>(size - 1 - j);
  }
  for (int64_t i = period; i < period + kSize; ++i) after[i] = after[i - period];

  const int64_t advance = kSize % period;
  for (int64_t i = 0, in_period = 0; i < n; i += kSize) {
    V self, left, above = {};
    memcpy(&self, key + i, sizeof(V));
    memcpy(&left, after + in_period, sizeof(V));
    for (int64_t d = 1; d < size; ++d) {
      V on, round;
      memcpy(&on, key + i + d * block, sizeof(V));
      memcpy(&round, key + i + d * block - period, sizeof(V));
      const V later = (V)(left > 0);  // -1 or 0, so that adding it turns > into >=
      above -= (V)((later ? on : round) > self + later);
      left -= 1;
    }
    const V stays = (V)(above < static_cast<Lane>(kept));
    memcpy(mask + i, &stays, (n - i < kSize ? n - i : kSize) * sizeof(Bits));
    in_period += advance;
    if (in_period >= period) in_period -= period;
  }
}

// 2:4 and 4:8 with loops of known length.
template <class Bits>
S2AP_TARGET void window_keep(const Bits* x, int64_t n, int64_t size, int64_t block, int64_t kept, Bits* mask) {
  if (size == 4) return window_keep_of(x, n, 4, block, kept, mask);
  if (size == 8) return window_keep_of(x, n, 8, block, kept, mask);
  window_keep_of(x, n, size, block, kept, mask);
}

template <class T>
S2AP_TARGET void form(const BitsOf<T>* grad, const BitsOf<T>* w, const BitsOf<T>* at, BitsOf<T>* __restrict formed, int64_t n) {
  using E = Element<T>;
  using C = ComputeOf<T>;
  for (int64_t i = 0; i < n; ++i) {
    const C product = E::widen(E::narrow(E::widen(grad[i]) * E::widen(w[i]))), x = E::widen(at[i]);
    const C sign = static_cast<C>(x > 0) - static_cast<C>(x < 0);
    formed[i] = E::narrow(product * sign);
  }
}

template <class T>
S2AP_TARGET void move(const BitsOf<T>* s, const BitsOf<T>* g, ComputeOf<T> scale, BitsOf<T>* __restrict moved, int64_t n) {
  using E = Element<T>;
  constexpr int64_t kBlock = 1024 / sizeof(s[0]);
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = n - begin < kBlock ? n : begin + kBlock;
    for (int64_t i = begin; i < end; i += 64 / sizeof(s[0])) {
      fetch(s + i);
      fetch(g + i);
    }
    for (int64_t i = begin; i < end; ++i) {
      const ComputeOf<T> z = E::widen(g[i]) * scale;
      moved[i] = E::narrow(E::widen(s[i]) + z);
    }
  }
}

template <class T, class Form>
S2AP_TARGET PerturbCounts apply_moved_form(const BitsOf<T>* moved, const BitsOf<T>* s, const BitsOf<T>* w, BitsOf<T>* masked, int64_t n,
                                           Form form, Form form_now) {
  using Bits = BitsOf<T>;
  using V = VectorOf<Bits>;
  constexpr Bits kInfinity = Element<T>::kInfinity;
  const auto step = [=](int64_t i, int64_t size, V& nans, V& flips, V& signs) S2AP_TARGET S2AP_LAMBDA {
    V x, y, weight;
    load(x, moved + i, size);
    load(y, s + i, size);
    load(weight, w + i, size);
    const V key = x & kMagnitude<Bits>, key_now = y & kMagnitude<Bits>;
    V keep, keep_now;
    form.get(keep, key, i, size);
    form_now.get(keep_now, key_now, i, size);
    // sign() is 0 for zero and for NaN; with that, two signs differ if only one is 0 or if the sign bits differ.
    const V sign = (V)(key - 1 < kInfinity), sign_now = (V)(key_now - 1 < kInfinity), opposite = (V)((x ^ y) > kMagnitude<Bits>);
    nans -= (V)(key > kInfinity);
    flips -= keep ^ keep_now;
    signs -= (sign ^ sign_now) | (sign & sign_now & opposite);
    weight &= keep;
    memcpy(masked + i, &weight, size * sizeof(Bits));
  };
  constexpr int64_t kSize = Vector<Bits>::kSize;
  PerturbCounts total;
  for (int64_t begin = 0; begin < n; begin += kCountBlock) {
    const int64_t end = n - begin < kCountBlock ? n : begin + kCountBlock;
    V nans = {}, flips = {}, signs = {};
    int64_t i = begin;
    for (; i + kSize <= end; i += kSize) {
      fetch(s + i);
      fetch(w + i);
      fetch(masked + i);
      step(i, kSize, nans, flips, signs);
    }
    if (i < end) {
      step(i, end - i, nans, flips, signs);
      if (form.past_end() != form_now.past_end()) total.flips -= kSize - (end - i);
    }
    total.nans += sum<Bits>(nans);
    total.flips += sum<Bits>(flips);
    total.signs += sum<Bits>(signs);
  }
  return total;
}

template <class T>
S2AP_TARGET PerturbCounts apply_moved(const BitsOf<T>* moved, const BitsOf<T>* s, const BitsOf<T>* w, BitsOf<T>* masked, int64_t n,
                                      Keep<BitsOf<T>> keep, Keep<BitsOf<T>> keep_now) {
  using Bits = BitsOf<T>;
  if (keep.mask) return apply_moved_form<T>(moved, s, w, masked, n, Given<Bits>{keep.mask}, Given<Bits>{keep_now.mask});
  return apply_moved_form<T>(moved, s, w, masked, n, AtLeast<Bits>{keep.bound}, AtLeast<Bits>{keep_now.bound});
}

template <class T, bool kSquares>
S2AP_TARGET double chunk_sum(const BitsOf<T>* x, int64_t n) {
  double lanes[kLanes] = {};
  for (int64_t row = 0; row < n; row += kLanes) {
    const auto add = [&](int64_t j) S2AP_TARGET S2AP_LAMBDA {
      const double value = static_cast<double>(Element<T>::widen(x[row + j]));
      lanes[j] += kSquares ? value * value : __builtin_fabs(value);
    };
    if (row + kLanes <= n) {
      for (size_t byte = 0; byte < kLanes * sizeof(x[0]); byte += 64) fetch(reinterpret_cast<const char*>(x + row) + byte);
      for (int64_t j = 0; j < kLanes; ++j) add(j);
    } else {
      for (int64_t j = 0; row + j < n; ++j) add(j);
    }
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

template <bool kFused, class C>
S2AP_TARGET S2AP_INLINE C add_scaled(C a, C alpha, C b) {
  if constexpr (!kFused) return a + alpha * b;
  if constexpr (sizeof(C) == sizeof(float)) return __builtin_fmaf(alpha, b, a);
  return static_cast<C>(__builtin_fma(alpha, b, a));
}

// Steps that the parameters leave out are computed and dropped: branches around arithmetic would keep the loop from vectorising.
template <class T, bool kFused>
S2AP_TARGET void update_fused(BitsOf<T>* __restrict s, const BitsOf<T>* __restrict g, BitsOf<T>* __restrict b, int64_t n,
                              const SgdParameters& p) {
  using E = Element<T>;
  using C = ComputeOf<T>;
  using Bits = BitsOf<T>;
  const C descent = static_cast<C>(-p.lr), momentum = static_cast<C>(p.momentum), intake = static_cast<C>(1 - p.dampening),
          decay = static_cast<C>(p.weight_decay);
  const bool decays = p.weight_decay != 0, nesterov = p.nesterov;
  if (b == nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      const C old = E::widen(s[i]), grad = E::widen(g[i]);
      const Bits d = choose(decays, E::narrow(add_scaled<kFused>(grad, decay, old)), g[i]);
      s[i] = E::narrow(add_scaled<kFused>(old, descent, E::widen(d)));
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const C old = E::widen(s[i]), grad = E::widen(g[i]);
    const C d = E::widen(choose(decays, E::narrow(add_scaled<kFused>(grad, decay, old)), g[i]));
    const C scaled = E::widen(E::narrow(E::widen(b[i]) * momentum));
    const Bits buffer = E::narrow(add_scaled<kFused>(scaled, intake, d));
    const Bits ahead = choose(nesterov, E::narrow(add_scaled<kFused>(d, momentum, E::widen(buffer))), buffer);
    b[i] = buffer;
    s[i] = E::narrow(add_scaled<kFused>(old, descent, E::widen(ahead)));
  }
}

template <class T>
S2AP_TARGET void update(BitsOf<T>* s, const BitsOf<T>* g, BitsOf<T>* b, int64_t n, const SgdParameters& p, bool fused) {
  fused ? update_fused<T, true>(s, g, b, n, p) : update_fused<T, false>(s, g, b, n, p);
}

template <class T>
inline constexpr Loops<T> kLoops = {
    sweep,   count_at_least, apply<T>,       window_keep,        keep_bits,           count_different,
    form<T>, move<T>,        apply_moved<T>, chunk_sum<T, true>, chunk_sum<T, false>, update<T>,
};

}  // namespace S2AP_LOOPS
}  // namespace s2ap
