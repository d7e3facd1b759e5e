// The loops of loops.h, compiled for every element type and instruction set.
#include "loops.h"

#ifdef S2AP_X86
#include <immintrin.h>
#endif

#define S2AP_LOOPS plain
#define S2AP_TARGET
#define S2AP_WIDTH 16
#include "loops_body.h"
#undef S2AP_LOOPS
#undef S2AP_TARGET
#undef S2AP_WIDTH

#ifdef S2AP_X86
#define S2AP_LOOPS avx2
#define S2AP_TARGET __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")))
#define S2AP_WIDTH 32
#include "loops_body.h"
#undef S2AP_LOOPS
#undef S2AP_TARGET
#undef S2AP_WIDTH

#define S2AP_LOOPS avx512
#define S2AP_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")))
#define S2AP_WIDTH 64
#include "loops_body.h"
#undef S2AP_LOOPS
#undef S2AP_TARGET
#undef S2AP_WIDTH
#endif

namespace s2ap {

template <class T>
const Loops<T>& loops(Isa isa) {
#ifdef S2AP_X86
  if (isa == Isa::kAvx512) return avx512::kLoops<T>;
  if (isa == Isa::kAvx2) return avx2::kLoops<T>;
#endif
  return plain::kLoops<T>;
}

template const Loops<float>& loops(Isa);
template const Loops<double>& loops(Isa);
template const Loops<Half>& loops(Isa);
template const Loops<BFloat16>& loops(Isa);

}  // namespace s2ap
