// Ranking keys order like magnitudes: every boundary at which the order of floats could break, all half-precision numbers, and the inverse.
#include "cpu_cases.h"

using namespace cases;

// Around every exponent (where the bits carry over), zero, the smallest normal number, infinity and the last NaN; and every
// 8191st float in between.
void test_float32() {
  const auto expect_ordered = [](uint32_t bits) {
    const float x = std::bit_cast<float>(bits);
    EXPECT(key_of(x) == bits && key_of(-x) == bits, "0x%08x", bits);
    if (bits >= KeyTraits<uint32_t>::kInfinityKey) {
      EXPECT(std::isnan(x) == (bits > KeyTraits<uint32_t>::kInfinityKey), "0x%08x", bits);
    } else {
      EXPECT(x < std::bit_cast<float>(bits + 1), "0x%08x", bits);
    }
  };
  for (uint32_t exponent = 0; exponent <= 255; ++exponent) {
    for (int64_t i = -4096; i <= 4096; ++i) {
      const int64_t bits = (int64_t{exponent} << 23) + i;
      if (bits >= 0) expect_ordered(static_cast<uint32_t>(bits));
    }
  }
  for (uint32_t bits = 0; bits <= 0x7fffffffu - 8191; bits += 8191) expect_ordered(bits);
  EXPECT(key_of(-0.0f) == 0 && key_of(0.0f) == 0, "zeros");
}

void test_float64() {
  for (uint64_t exponent = 0; exponent < 2047; ++exponent) {
    for (int64_t i = -64; i <= 64; ++i) {
      const int64_t bits = (static_cast<int64_t>(exponent) << 52) + i;
      if (bits < 0) continue;
      const double x = std::bit_cast<double>(bits);
      EXPECT(key_of(x) == static_cast<uint64_t>(bits) && key_of(-x) == key_of(x), "0x%llx", static_cast<unsigned long long>(bits));
      EXPECT(x < std::bit_cast<double>(bits + 1), "0x%llx", static_cast<unsigned long long>(bits));
    }
  }
}

// What a half-precision number is worth, from its fields.
double decode(uint32_t magnitude, int fraction_bits, int bias) {
  const int exponent = static_cast<int>(magnitude >> fraction_bits);
  const double fraction = magnitude & ((1u << fraction_bits) - 1);
  if (exponent == 2 * bias + 1) return fraction != 0 ? NAN : INFINITY;
  if (exponent == 0) return std::ldexp(fraction, 1 - bias - fraction_bits);
  return std::ldexp(1 + std::ldexp(fraction, -fraction_bits), exponent - bias);
}

template <class T>
void test_half(int fraction_bits, int bias) {
  using E = Element<T>;
  int64_t last_key = -1;
  for (uint32_t magnitude = 0; magnitude < 0x8000; ++magnitude) {
    const auto bits = static_cast<uint16_t>(magnitude);
    const float x = E::widen(bits);
    const double expected = decode(magnitude, fraction_bits, bias);
    EXPECT(std::isnan(x) ? std::isnan(expected) : x == expected, "%s 0x%04x: %g", name<T>().c_str(), magnitude, x);
    EXPECT(std::isnan(x) == (bits > E::kInfinity), "%s 0x%04x", name<T>().c_str(), magnitude);
    EXPECT(E::widen(bits | 0x8000) == -x || std::isnan(x), "%s 0x%04x", name<T>().c_str(), magnitude);
    const int64_t key = cut_key<T>(bits);
    EXPECT(key > last_key, "%s 0x%04x", name<T>().c_str(), magnitude);
    EXPECT(magnitude_at_least<T>(key) == bits && magnitude_at_least<T>(last_key + 1) == bits, "%s 0x%04x", name<T>().c_str(), magnitude);
    last_key = key;
    if (std::isnan(x)) continue;
    EXPECT(E::narrow(x) == bits && E::narrow(-x) == (bits | 0x8000), "%s 0x%04x", name<T>().c_str(), magnitude);
    // Half-way to the next number rounds to the even one, a little to either side to the nearer one.
    const double next = decode(magnitude + 1, fraction_bits, bias);
    const double step = std::isinf(next) ? expected - decode(magnitude - 1, fraction_bits, bias) : next - expected;
    const auto middle = static_cast<float>(expected + step / 2);
    if (std::isinf(x) || static_cast<double>(middle) != expected + step / 2) continue;
    EXPECT(E::narrow(middle) == bits + (bits & 1), "%s 0x%04x + 1/2", name<T>().c_str(), magnitude);
    EXPECT(E::narrow(std::nextafter(middle, 0.0f)) == bits, "%s below 0x%04x + 1/2", name<T>().c_str(), magnitude);
    EXPECT(E::narrow(std::nextafter(middle, INFINITY)) == bits + 1, "%s above 0x%04x + 1/2", name<T>().c_str(), magnitude);
  }
  EXPECT(magnitude_at_least<T>(last_key + 1) == kBeyond<uint16_t> && magnitude_at_least<T>(INT64_MAX) == kBeyond<uint16_t>, "the end");
  EXPECT(E::narrow(INFINITY) == E::kInfinity && E::narrow(3.4e38f) >= E::kInfinity - 1, "overflow");
  EXPECT((E::narrow(NAN) & 0x7fff) > E::kInfinity, "NaN");
}

template <class T>
void test_inverse() {
  for (size_t i = 0; i < 8 * sizeof(BitsOf<T>); ++i) {
    const auto bits = static_cast<BitsOf<T>>(kMagnitude<BitsOf<T>> >> i);
    EXPECT(magnitude_at_least<T>(cut_key<T>(bits)) == bits, "%s >> %d", name<T>().c_str(), static_cast<int>(i));
  }
  EXPECT(magnitude_at_least<T>(0) == 0, "%s", name<T>().c_str());
}

int main() {
  test_float32();
  test_float64();
  test_half<Half>(10, 15);
  test_half<BFloat16>(7, 127);
  test_inverse<float>();
  test_inverse<double>();
  EXPECT(magnitude_at_least<float>(INT64_MAX) == kBeyond<uint32_t>, "no float32 has that key");
}
