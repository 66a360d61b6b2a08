// Between torch's tensors and the kernels' structs: checks, conversions, and the ATen operators that are called.
// Written against the stable ABI alone (torch/csrc/stable).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
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
using Shape = std::vector<int64_t>;

constexpr int64_t kCounterWord = int64_t(1) << 32;  // values of one word of the noise counter

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

inline Tensor reshaped(const Tensor& t, const Shape& shape) {
  return t.sizes() == shape ? t : aten("aten::reshape", "", t, shape);
}

// For tensors that go on into ATen: detached, so that no gradient is recorded there.
inline Tensor dense_detached(const Tensor& t) { return dense(aten("aten::detach", "", t)); }

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

// Options as the operators take them; each number's meaning is in posterior.h and divergence.h.
struct PriorArguments {
  OptionalTensor loc_tensor, scale_tensor;
  double loc, scale;
};

// A posterior with the contiguous tensors that its pointers look into.
struct PosteriorTensors {
  Tensor mu, rho;
  OptionalTensor loc, scale, key;
  Posterior view;
};

// A tensor of any shape counts as [first dimension, everything else]; a vector as one row, like a bias.
inline PosteriorTensors make_posterior(const Tensor& mu, const Tensor& rho, const OptionalTensor& key, const PriorArguments& prior,
                                       int64_t scale, int64_t stream, int64_t row_offset, int64_t column_offset) {
  check_like(rho, "rho", mu, "mu");
  if (prior.loc_tensor) check_like(*prior.loc_tensor, "the prior's loc", mu, "mu");
  if (prior.scale_tensor) check_like(*prior.scale_tensor, "the prior's scale", mu, "mu");
  STD_TORCH_CHECK(scale >= 0 && scale <= 2, "scale is ", scale, ", expected 0 (softplus), 1 (exp) or 2 (sqrt_exp)");
  STD_TORCH_CHECK(row_offset >= 0 && column_offset >= 0, "row_offset and column_offset are ", row_offset, " and ",
                  column_offset, ", expected no negative number");
  STD_TORCH_CHECK(stream >= 0 && stream < kCounterWord, "stream is ", stream, ", expected 0 to 2^32 - 1");
  check_storage(mu, "mu");
  check_storage(rho, "rho");
  check_storage(prior.loc_tensor, "the prior's loc");
  check_storage(prior.scale_tensor, "the prior's scale");
  PosteriorTensors p{dense(mu), dense(rho), std::nullopt, std::nullopt, std::nullopt, {}};
  if (prior.loc_tensor) p.loc = dense(*prior.loc_tensor);
  if (prior.scale_tensor) p.scale = dense(*prior.scale_tensor);
  int64_t rows = mu.dim() > 1 ? mu.size(0) : 1;
  int64_t columns = 1;
  for (int64_t d = mu.dim() > 1 ? 1 : 0; d < mu.dim(); ++d) columns *= mu.size(d);
  STD_TORCH_CHECK(rows <= kCounterWord && row_offset <= kCounterWord - rows && columns <= 4 * kCounterWord &&
                      column_offset <= 4 * kCounterWord - columns,
                  "mu with its offsets has more rows or columns than the noise counter: 2^32 and 2^34");
  const int64_t* key_data = nullptr;
  if (key) {
    STD_TORCH_CHECK(key->scalar_type() == ScalarType::Long && key->dim() == 1 && key->size(0) == 2,
                    "key has shape ", describe(shape_of(*key)), ", expected an int64 tensor of shape [2]: (seed, first_sample)");
    STD_TORCH_CHECK(on_device_of(*key, mu), "key and mu are on different devices");
    check_storage(*key, "key");
    p.key = dense(*key);
    key_data = static_cast<const int64_t*>(p.key->const_data_ptr());
  }
  p.view = Posterior{rows,
                     columns,
                     type_of_tensor(mu, "mu"),
                     p.mu.const_data_ptr(),
                     p.rho.const_data_ptr(),
                     static_cast<int>(scale),
                     {prior.loc, prior.scale, p.loc ? p.loc->const_data_ptr() : nullptr, p.scale ? p.scale->const_data_ptr() : nullptr},
                     key_data,
                     static_cast<uint32_t>(stream),
                     row_offset,
                     column_offset};
  return p;
}

inline void check_samples(int64_t samples) {
  STD_TORCH_CHECK(samples >= 1 && samples <= kCounterWord, "n_samples is ", samples, ", expected 1 to 2^32");
}

inline void check_divergence(int64_t divergence) {
  STD_TORCH_CHECK(divergence >= 0 && divergence <= 2, "kl is ", divergence, ", expected 0 (none), 1 (analytic) or 2 (sampled)");
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
