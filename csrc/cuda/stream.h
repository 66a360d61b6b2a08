// Work on a tensor's device and on torch's current stream there.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

#ifndef BNN_FAST_STAND_IN
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace bnn_fast {

#ifndef BNN_FAST_STAND_IN

// The function that tells the stream lives in libtorch_cuda, which a CPU build of torch does not have: it is looked up when
// a CUDA tensor is at hand, so that one binary loads on both.
inline void* current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t device, void** stream);
  static const auto function = reinterpret_cast<Function>([] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  }());
  STD_TORCH_CHECK(function, "this torch has no CUDA: libtorch_cuda.so with aoti_torch_get_current_cuda_stream is not loaded");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "torch did not tell its current CUDA stream");
  return stream;
}

// Makes a tensor's device the current one for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& t) : guard(t.get_device_index()), queue(current_stream(t.get_device_index())) {}
  void* stream() const { return queue; }

 private:
  torch::stable::accelerator::DeviceGuard guard;
  void* queue;
};

#else

// Without a GPU (tests/ptx) there is one device, and one stream on it.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor&) {}
  void* stream() const { return nullptr; }
};

#endif

// What a launcher gave back, as an exception that names the operator.
inline void check_cuda(cudaError_t error, const char* name) {
  STD_TORCH_CHECK(error == cudaSuccess, "bnn_fast::", name, ": ", cudaGetErrorString(error));
}

}  // namespace bnn_fast
