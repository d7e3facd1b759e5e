// The Python module s2ap_ext._C: what the CPU kernels were built with. The kernels are in cpu/, one file for each op, and register
// themselves with torch's dispatcher when this library is loaded; the schemas are in s2ap_ext/_library.py.

// Torch's copy of pybind11 refuses to be included where this restricts torch's headers to the stable ABI; this file includes none of them.
#undef TORCH_TARGET_VERSION

#include <pybind11/pybind11.h>

#include "cpu/machine.h"

#define S2AP_TEXT_(x) #x
#define S2AP_TEXT(x) S2AP_TEXT_(x)

#if defined(__clang__)
#define S2AP_COMPILER __VERSION__
#else
#define S2AP_COMPILER "GCC " __VERSION__
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", []() {
    pybind11::dict info;
    info["interface"] = S2AP_TEXT(S2AP_INTERFACE);
    info["torch"] = S2AP_TORCH;
    info["python"] = PY_VERSION;
    info["compiler"] = S2AP_COMPILER;
    info["flags"] = S2AP_FLAGS;
    return info;
  });
  m.def("lanes", [] { return s2ap::lanes(s2ap::best_isa()); });
}
