// Torch's tensors: checks, conversions, and the ATen operators that are called.
// Written against the stable ABI alone (torch/csrc/stable).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "problem.h"

// The tests build the CUDA operators a second time, under another name and for CPU tensors (tests/ptx).
#ifndef BNN_FAST_LIBRARY
#define BNN_FAST_LIBRARY bnn_fast
#endif
#ifndef BNN_FAST_CUDA_KEY
#define BNN_FAST_CUDA_KEY CUDA
#endif
#define BNN_FAST_DEFINE(library, m) STABLE_TORCH_LIBRARY(library, m)
#define BNN_FAST_IMPLEMENT(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

namespace bnn_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<OptionalTensor>;
using Shape = std::vector<int64_t>;

inline Shape shape_of(const Tensor& t) { return Shape(t.sizes().begin(), t.sizes().end()); }

// The shape of so many draws of a tensor.
inline Shape with_samples(const Tensor& t, int64_t samples) {
  Shape shape = shape_of(t);
  shape.insert(shape.begin(), samples);
  return shape;
}

inline std::string describe(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Calls an ATen operator.
template <class... Args> Tensor aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Contiguous, on like's device. Without new_empty's way through the dispatcher, which a small layer would feel.
inline Tensor empty_of(const Tensor& like, const Shape& shape, ScalarType dtype) {
  Shape strides(shape.size());
  int64_t step = 1;
  for (size_t d = shape.size(); d-- > 0; step *= shape[d] > 0 ? shape[d] : 1) strides[d] = step;
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, device_index, &handle));
  return Tensor(handle);
}

// The stable ABI passes Scalar arguments to few operators; subtract is one, add is not.
inline Tensor add(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }

// Calls of ATen cost about a microsecond each, much beside a small layer: none is made where there is nothing to do.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline OptionalTensor dense(const OptionalTensor& t) { return t ? OptionalTensor(dense(*t)) : OptionalTensor(); }

inline const void* data_of(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

inline Tensor reshaped(const Tensor& t, const Shape& shape) {
  return t.sizes() == shape ? t : aten("aten::reshape", "", t, shape);
}

// For tensors that go on into ATen: detached, so that no gradient is recorded there.
inline Tensor detached(const Tensor& t) { return aten("aten::detach", "", t); }
inline Tensor dense_detached(const Tensor& t) { return dense(detached(t)); }

inline Type type_of_tensor(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::kFloat32;
    case ScalarType::Double: return Type::kFloat64;
    case ScalarType::BFloat16: return Type::kBFloat16;
    case ScalarType::Half: return Type::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " has dtype number ", static_cast<int>(t.scalar_type()),
                      ", expected float32, float64, bfloat16 or float16");
  }
}

// The type that a tensor's elements are computed in, and that its KL is returned in.
inline ScalarType compute_type(ScalarType stored) {
  return stored == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool on_device_of(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline void check_like(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(t.sizes() == like.sizes(), name, " has shape ", describe(shape_of(t)), ", expected that of ", like_name,
                  ": ", describe(shape_of(like)));
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " and ", like_name, " have different dtypes");
  STD_TORCH_CHECK(on_device_of(t, like), name, " and ", like_name, " are on different devices");
}

// That a tensor's elements are in its storage, which can be made smaller behind its back.
inline void check_storage(const Tensor& t, const char* name) {
  int64_t bytes = 0, last = 0, offset = 0;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 0) return;
    last += (t.size(d) - 1) * t.stride(d);
  }
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
  int64_t needed = (offset + last + 1) * static_cast<int64_t>(t.element_size());
  STD_TORCH_CHECK(needed <= bytes, name, " has shape ", describe(shape_of(t)), " and a storage of ", bytes,
                  " bytes, expected at least ", needed);
}

inline void check_storage(const OptionalTensor& t, const char* name) {
  if (t) check_storage(*t, name);
}

inline void check_gradients(const OptionalTensors& grads, std::initializer_list<const char*> names) {
  if (grads.size() == names.size()) return;
  std::string expected;
  for (const char* name : names) expected += (expected.empty() ? "" : ", ") + std::string(name);
  STD_TORCH_CHECK(false, "grads has ", grads.size(), " tensors, expected ", expected, ": a tensor or None of each result");
}

inline void check_gradient(const Tensor& grad, const char* name, const Shape& shape, ScalarType dtype, const Tensor& mu) {
  STD_TORCH_CHECK(grad.sizes() == shape, name, " has shape ", describe(shape_of(grad)), ", expected ", describe(shape));
  STD_TORCH_CHECK(grad.scalar_type() == dtype, name, " has dtype number ", static_cast<int>(grad.scalar_type()),
                  ", expected that of the result it belongs to: number ", static_cast<int>(dtype));
  STD_TORCH_CHECK(on_device_of(grad, mu), name, " and mu are on different devices");
  check_storage(grad, name);
}

// A KL gradient that has one element for each of mu's, or is one number; absent if the tensor is.
inline KlGradient make_kl_gradient(const OptionalTensor& grad, bool elementwise) {
  if (!grad) return {nullptr, Type::kFloat32, false};
  return {grad->const_data_ptr(), type_of_tensor(*grad, "grad_kl"), elementwise};
}

}  // namespace bnn_fast
