// The Python module s2ap_ext._C_cuda: what the CUDA kernels were built with. The kernels are in cuda/, one file for each op, and
// register themselves with torch's dispatcher when this library is loaded, which happens only under a CUDA torch.

// Torch's copy of pybind11 refuses to be included where this restricts torch's headers to the stable ABI; this file includes none of them.
#undef TORCH_TARGET_VERSION

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

#define S2AP_TEXT_(x) #x
#define S2AP_TEXT(x) S2AP_TEXT_(x)

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", []() {
    pybind11::dict info;
    info["interface"] = S2AP_TEXT(S2AP_INTERFACE);
    info["torch"] = S2AP_TORCH;
    info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
    info["gpus"] = S2AP_GPUS;
    return info;
  });
}
