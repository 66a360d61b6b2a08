// Stands in for libcudart, with what the project's host code needs of it and nothing more: what is not here
// does not link. Synchronisation and cudaMalloc are absent on purpose, as no operator may wait for the device
// or allocate behind torch. A launch that the hardware's limits allow goes to the callback; streams are
// ignored, all work is done at once.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <string>

namespace {

constexpr int kThreadsPerMultiprocessor = 2048;
constexpr int kSharedByDefault = 48 << 10, kSharedAtMost = 227 << 10, kSharedReserved = 1 << 10;

struct Function {
  std::string name;
  int dynamic_shared = kSharedByDefault;  // what cudaFuncSetAttribute has asked for
};

struct Configuration {
  dim3 grid, block;
  size_t shared;
};

// shared: the dynamic shared memory; shared_at_most: what that and the kernel's static shared memory may come
// to. Returns an error, 0 for none.
using Launcher = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, size_t shared,
                         size_t shared_at_most, void** arguments);

// Registration runs in static initialisers, maybe before those of this file.
std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> table;
  return table;
}

Launcher launcher;
int multiprocessors = 1;
thread_local Configuration pushed;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace

extern "C" {

void stand_in_set_launcher(Launcher f) { launcher = f; }
void stand_in_set_multiprocessors(int count) { multiprocessors = count; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  functions()[host].name = device;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void*) {
  pushed = {grid, block, shared};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<cudaStream_t*>(stream) = nullptr;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  auto found = functions().find(kernel);
  if (found == functions().end()) return result(cudaErrorInvalidDeviceFunction);
  if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z || grid.x > 0x7fffffff ||
      grid.y > 65535 || grid.z > 65535 || block.x > 1024 || block.y > 1024 || block.z > 64 ||
      block.x * block.y * block.z > 1024)
    return result(cudaErrorInvalidConfiguration);
  if (shared > static_cast<size_t>(found->second.dynamic_shared)) return result(cudaErrorInvalidValue);
  size_t shared_at_most = found->second.dynamic_shared > kSharedByDefault ? kSharedAtMost : kSharedByDefault;
  unsigned blocks[] = {grid.x, grid.y, grid.z}, threads[] = {block.x, block.y, block.z};
  return result(static_cast<cudaError_t>(
      launcher(found->second.name.c_str(), blocks, threads, shared, shared_at_most, arguments)));
}

cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    default: return "an error that the stand-in runtime does not make";
  }
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  auto found = functions().find(host);
  if (found == functions().end()) return result(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > kSharedAtMost)
    return result(cudaErrorInvalidValue);
  found->second.dynamic_shared = value;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = multiprocessors; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kSharedByDefault; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kSharedAtMost; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = kSharedAtMost + kSharedReserved;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = kThreadsPerMultiprocessor; return cudaSuccess;
    default: return result(cudaErrorInvalidValue);
  }
}

// By threads and dynamic shared memory alone: registers are ptxas's affair.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads,
                                                                   size_t shared, unsigned) {
  if (threads < 1 || threads > 1024) return result(cudaErrorInvalidValue);
  *blocks = std::min(kThreadsPerMultiprocessor / threads,
                     (kSharedAtMost + kSharedReserved) / static_cast<int>(shared + kSharedReserved));
  return cudaSuccess;
}

}  // extern "C"
