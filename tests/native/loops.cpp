// The inner loops of the CPU kernels for every type of elements and instruction set: compiled once for all tests, which have them declared
// in cpu_cases.h.
#include "cpu/loops.h"

namespace s2ap {

template const Loops<float>& loops<float>(Isa);
template const Loops<double>& loops<double>(Isa);
template const Loops<Half>& loops<Half>(Isa);
template const Loops<BFloat16>& loops<BFloat16>(Isa);

}  // namespace s2ap
