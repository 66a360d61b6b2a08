// What is around a call, and torch's random numbers.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace bnn_fast {

// Whether a call would be made in plain eager mode, with none of what layers have to look at one by one: transforms of torch.func,
// traces, autocast, a backward pass, hooks for saved tensors, modes.
bool eager();
bool ordinary();  // the same, with gradients

// torch.randint(-2^63, 2^63 - 1, (count, 2)).unbind(): the same numbers of the same generator, in one step.
std::vector<at::Tensor> fresh_keys(int64_t count);

}  // namespace bnn_fast
