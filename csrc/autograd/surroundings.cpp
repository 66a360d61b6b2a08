// See surroundings.h.
#include "surroundings.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <mutex>

namespace bnn_fast {

bool eager() {
  auto included = [](c10::DispatchKey key) { return c10::impl::tls_is_dispatch_key_included(key); };
  return !included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !torch::jit::tracer::isTracing() && !at::autocast::is_autocast_enabled(at::kCPU) &&
         !at::autocast::is_autocast_enabled(at::kCUDA) && torch::autograd::get_current_graph_task_id() == -1 &&
         !at::SavedTensorDefaultHooks::get_hooks(true) && !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

bool ordinary() { return at::GradMode::is_enabled() && eager(); }

std::vector<at::Tensor> fresh_keys(int64_t count) {
  auto* generator = at::check_generator<at::CPUGeneratorImpl>(at::detail::getDefaultCPUGenerator());
  std::lock_guard<std::mutex> lock(generator->mutex_);
  std::vector<at::Tensor> keys;
  for (int64_t i = 0; i < count; ++i) {
    keys.push_back(at::empty({2}, at::kLong));
    for (int64_t word = 0; word < 2; ++word)
      keys.back().mutable_data_ptr<int64_t>()[word] =
          static_cast<int64_t>(generator->random64() % UINT64_MAX + (uint64_t(1) << 63));
  }
  return keys;
}

}  // namespace bnn_fast
