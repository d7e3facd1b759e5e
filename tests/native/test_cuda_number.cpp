// The dtypes of the CUDA kernels: half precision against conversion through double, and the digits of the keys.
#include "cuda/number.cuh"

#include "cuda/radix.cuh"
#include "cuda_cases.h"

using namespace cases;
namespace kernels = s2ap::cuda;

template <class T>
void test_widening() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    T x{static_cast<uint16_t>(bits)};
    float wide = kernels::widen(x);
    EXPECT(same_bits(wide, static_cast<float>(value(x))) || std::isnan(wide), "%s 0x%04x: %g", kName<T>, bits, wide);
    EXPECT(std::isnan(wide) == std::isnan(value(x)), "%s 0x%04x", kName<T>, bits);
    T back = kernels::Number<T>::round(wide);
    EXPECT(std::isnan(wide) ? std::isnan(value(back)) : same_bits(back, x), "%s 0x%04x: 0x%04x", kName<T>, bits, back.bits);
  }
}

template <class T>
void expect_rounded(float x) {
  T expected = make<T>(x), got = kernels::Number<T>::round(x);
  EXPECT(std::isnan(x) ? std::isnan(value(got)) : same_bits(got, expected), "%s %a: 0x%04x, got 0x%04x", kName<T>, x, expected.bits,
         got.bits);
}

// Every number of the dtype, every midpoint between two, and the floats next to the midpoints.
template <class T>
void test_rounding() {
  for (uint32_t bits = 0; bits < 0x7fff; ++bits) {
    float low = kernels::widen(T{static_cast<uint16_t>(bits)}), high = kernels::widen(T{static_cast<uint16_t>(bits + 1)});
    if (std::isnan(low) || std::isnan(high)) continue;
    float middle = std::isinf(high) ? low + (low - kernels::widen(T{static_cast<uint16_t>(bits - 1)})) / 2 : low + (high - low) / 2;
    for (float x : {low, middle, std::nextafter(middle, 0.0f), std::nextafter(middle, INFINITY)}) {
      expect_rounded<T>(x);
      expect_rounded<T>(-x);
    }
  }
  Random random(4);
  for (int i = 0; i < 200000; ++i) {
    uint32_t bits = static_cast<uint32_t>(random());
    expect_rounded<T>(s2ap::cuda::bit_cast<float>(bits));
  }
}

// From all keys on, or from any bracket, one bin after the other leads to the key, in no more passes than it has digits.
template <class T>
void test_digits() {
  using Digits = kernels::Digits<T>;
  using Key = kernels::KeyOf<T>;
  Random random(5);
  for (int i = 0; i < 10000; ++i) {
    auto score = kernels::widen(kernels::bit_cast<T>(static_cast<std::conditional_t<sizeof(T) == 2, uint16_t, Key>>(random())));
    const Key key = Digits::of(score);
    EXPECT(key << Digits::kZeros == s2ap::key_of(score), "%s", kName<T>);
    kernels::Progress<Key> p{0, Digits::kEnd, 1, 0, false};
    if (i % 2) p.lo = key - static_cast<Key>(random()) % (key + 1), p.hi = key + 1 + static_cast<Key>(random()) % (Digits::kEnd - key);
    int passes = 0;
    for (; !p.is_found(); ++passes) {
      EXPECT(p.holds(key) && !p.holds(p.lo - 1) && !p.holds(p.hi), "%s pass %d", kName<T>, passes);
      EXPECT(p.bin(p.lo) == 0 && p.bin(key) <= p.bin(p.hi - 1) && p.bin(p.hi - 1) < kernels::kBins, "%s pass %d", kName<T>, passes);
      Key width = Key{1} << p.shift(), lo = p.lo + p.bin(key) * width;
      p = {lo, std::min<Key>(lo + width, p.hi), 1, 0, false};
    }
    EXPECT(p.lo == key && passes <= Digits::kCount, "%s: %d passes", kName<T>, passes);
  }
}

int main() {
  test_widening<Float16>();
  test_widening<BFloat16>();
  test_rounding<Float16>();
  test_rounding<BFloat16>();
  for_each_type([&]<class T>() { test_digits<T>(); });
  std::puts("numbers: half precision and digits are right");
}
