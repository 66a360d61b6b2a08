// The operator sum_values for any device: the sum of numbers that lie in tensors of their own, as the KLs of a model's layers do, which
// would take two launches otherwise (torch.stack, sum). Added in their order, in float64.
//
// A Device brings
//   static void sum(pointers to the numbers, how many, their type, out, a tensor of the device)
#pragma once

#include "tensors.h"

namespace bnn_fast {

template <class Device> Tensor sum_values(const Tensors& values) {
  const Tensor& first = values[0];  // without any torch finds no kernel to call
  Type type = type_of_tensor(first, "values[0]");
  STD_TORCH_CHECK(type == Type::kFloat32 || type == Type::kFloat64, "values[0] has dtype number ",
                  static_cast<int>(first.scalar_type()), ", expected float32 or float64");
  std::vector<const void*> numbers;
  for (const Tensor& value : values) {
    STD_TORCH_CHECK(value.dim() == 0, "a tensor of values has shape ", describe(shape_of(value)), ", expected []");
    check_like(value, "a tensor of values", first, "values[0]");
    check_storage(value, "a tensor of values");
    numbers.push_back(value.const_data_ptr());
  }
  Tensor total = empty_of(first, {}, first.scalar_type());
  Device::sum(numbers.data(), static_cast<int64_t>(numbers.size()), type, total.mutable_data_ptr(), first);
  return total;
}

}  // namespace bnn_fast
