// Torch's current stream on a device. The function that tells it lives in libtorch_cuda, which a CPU build of torch does not
// have: it is looked up when a CUDA tensor is at hand, so that one binary loads on both.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/tensor.h>

namespace bnn_fast {

inline void* current_stream(const torch::stable::Tensor& t) {
  using Function = int32_t (*)(int32_t device, void** stream);
  static const auto function = reinterpret_cast<Function>([] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  }());
  STD_TORCH_CHECK(function, "this torch has no CUDA: libtorch_cuda.so with aoti_torch_get_current_cuda_stream is not loaded");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(t.get_device_index(), &stream) == 0, "torch did not tell its current CUDA stream");
  return stream;
}

}  // namespace bnn_fast
