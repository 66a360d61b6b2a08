// The operator sample_rows, forward and backward, on any device: checks, results, and what is computed. A Device is made for one
// call, with a tensor of that call and the operator's name, and has
//
//   empty(like, shape, dtype)                a result to be filled
//   check(LookUp)                            raises if there are no such rows, where that costs nothing
//   keeps(elements)                          whether so much noise is kept from forward to backward
//   forward(RowsForward, like)               draws; the sum of the KLs as a tensor like `like`, empty without a divergence
//   backward(RowsBackward)                   fills what each look-up adds to the gradients
//   keeps_rows                               whether it also fills the rows that this is added to
//   added(RowsAdded)                         sums this up, if it `adds`; else an operator of torch does
#pragma once

#include "arguments.h"
#include "rows.h"

namespace bnn_fast {

template <class Device> struct SampleRows {
  static std::tuple<Tensor, Tensor, Tensor> forward(const Tensors& posterior, const Tensors& look_up, const Tensor& key,
                                                    const Tensors& prior, const Numbers& numbers, const Integers& options) {
    Device device(first_of(posterior), "_sample_rows");
    Given given(device, posterior, look_up, key, prior, numbers, options);
    const Tensor& mu = posterior[0];
    Shape shape{given.at.count, given.table.view.columns};
    bool keeps = device.keeps(shape[0] * shape[1]);
    Tensor y = device.empty(mu, shape, mu.scalar_type());
    Tensor noise = device.empty(mu, keeps ? shape : Shape{0}, compute_type(mu.scalar_type()));
    Tensor sum = device.forward(RowsForward{given.table.view, given.at, static_cast<int>(given.options.divergence), y.mutable_data_ptr(),
                                            nullptr, keeps ? noise.mutable_data_ptr() : nullptr}, mu);
    return {y, sum, noise};
  }

  static Tensors backward(const OptionalTensors& grads, const Tensors& posterior, const Tensors& look_up, const Tensor& key,
                          const Tensors& prior, const Numbers& numbers, const Integers& options, const OptionalTensor& noise) {
    check_gradients(grads, {"grad_y", "grad_kl"});
    Device device(first_of(posterior), "_sample_rows_backward");
    Given given(device, posterior, look_up, key, prior, numbers, options);
    const Tensor& mu = posterior[0];
    Shape shape{given.at.count, given.table.view.columns};
    if (grads[0]) check_gradient(*grads[0], "grad_y", shape, mu.scalar_type(), mu);
    OptionalTensor grad_kl = given.options.divergence == kNone ? OptionalTensor() : grads[1];
    if (grad_kl) check_gradient(*grad_kl, "grad_kl", {}, compute_type(mu.scalar_type()), mu);
    bool kept = noise && noise->numel() > 0;
    if (kept) check_gradient(*noise, "kept", shape, compute_type(mu.scalar_type()), mu);
    OptionalTensor grad_y = dense(grads[0]), eps = kept ? dense(noise) : OptionalTensor();
    Tensor grad_mu = device.empty(mu, shape, mu.scalar_type()), grad_rho = device.empty(mu, shape, mu.scalar_type());
    Tensor rows = Device::keeps_rows ? device.empty(mu, {given.at.count}, ScalarType::Long) : given.rows;
    device.backward(RowsBackward{given.table.view, given.at, static_cast<int>(given.options.divergence), data_of(grad_y),
                                 make_kl_gradient(grad_kl, false), grad_mu.mutable_data_ptr(), grad_rho.mutable_data_ptr(),
                                 data_of(eps), Device::keeps_rows ? static_cast<int64_t*>(rows.mutable_data_ptr()) : nullptr});
    return given.of_table(device, grad_mu, grad_rho, rows);
  }

 private:
  enum Gradient : int64_t { kDense, kSparse, kByFrequency };

  static const Tensor& first_of(const Tensors& posterior) {
    STD_TORCH_CHECK(!posterior.empty(), "posterior has 0 tensors, expected mu and rho");
    return posterior[0];
  }

  // The arguments, unpacked and checked.
  struct Given {
    Options options;
    int64_t gradient;
    PosteriorTensors table;
    Tensor rows;  // [T] or [2, T]
    OptionalTensor counts;
    LookUp at;

    Given(const Device& device, const Tensors& posterior, const Tensors& look_up, const Tensor& key, const Tensors& prior,
          const Numbers& numbers, const Integers& all) {
      const Tensor& mu = posterior[0];
      STD_TORCH_CHECK(all.size() == 8, "options has ", all.size(), " numbers, expected 8: scale, prior's places, kl, n_samples, "
                      "stream, row_offset, column_offset, gradient");
      STD_TORCH_CHECK(numbers.size() == 3, "numbers has ", numbers.size(), ", expected 3: a loc, a scale, and what a KL counts");
      options = options_of(Integers(all.begin(), all.begin() + 7));
      gradient = all[7];
      STD_TORCH_CHECK(gradient >= kDense && gradient <= kByFrequency, "gradient is ", gradient,
                      ", expected 0 (dense), 1 (sparse) or 2 (dense, by frequency)");
      STD_TORCH_CHECK(mu.dim() == 2, "mu has shape ", describe(shape_of(mu)), ", expected [table's rows, columns]");
      STD_TORCH_CHECK(look_up.size() == 1 || look_up.size() == 2, "look_up has ", look_up.size(), 
                      " tensors, expected rows, and maybe counts");
      Numbers of_prior(numbers.begin(), numbers.begin() + 2);
      table = Lists(posterior, prior, of_prior, false).pair(0, key, options);
      rows = integers(look_up[0], "rows", mu);
      STD_TORCH_CHECK(rows.dim() == 1 || (rows.dim() == 2 && rows.size(0) == 2), "rows has shape ", describe(shape_of(rows)),
                      ", expected [T], or [2, T] with the draw of each");
      int64_t count = rows.size(rows.dim() - 1);
      bool with_draws = rows.dim() == 2;
      STD_TORCH_CHECK(with_draws || count % options.samples == 0, "rows has shape ", describe(shape_of(rows)),
                      ", expected equal parts of the ", options.samples, " draws");
      STD_TORCH_CHECK(count <= kCounterWord, "rows has shape ", describe(shape_of(rows)), ", expected at most 2^32 of them");
      if (look_up.size() == 2) {
        counts = integers(look_up[1], "counts", mu);
        STD_TORCH_CHECK(counts->dim() == 1 && counts->size(0) == mu.size(0), "counts has shape ", describe(shape_of(*counts)),
                        ", expected one for each of the table's rows: ", describe({mu.size(0)}));
      }
      const auto* first = static_cast<const int64_t*>(rows.const_data_ptr());
      at = LookUp{first, with_draws ? first + count : nullptr, count, count > 0 ? count / options.samples : 1, mu.size(0),
                  numbers[2], static_cast<const int64_t*>(data_of(counts))};
      device.check(at);
    }

    static Tensor integers(const Tensor& t, const char* name, const Tensor& mu) {
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long, name, " has dtype number ", static_cast<int>(t.scalar_type()),
                      ", expected int64");
      STD_TORCH_CHECK(on_device_of(t, mu), name, " and mu are on different devices");
      check_storage(t, name);
      return dense(t);
    }

    // The gradients of the table, from what each look-up adds to its row.
    Tensors of_table(const Device& device, const Tensor& by_mu, const Tensor& by_rho, const Tensor& all_rows) const {
      constexpr int64_t no_padding = -1;
      Shape shape{at.table, table.view.columns};
      if (gradient == kDense && Device::adds) {
        Tensor mu = device.empty(by_mu, shape, by_mu.scalar_type()), rho = device.empty(by_mu, shape, by_mu.scalar_type());
        device.added(RowsAdded{at, shape[1], table.view.type, {by_mu.const_data_ptr(), by_rho.const_data_ptr()},
                               {mu.mutable_data_ptr(), rho.mutable_data_ptr()}});
        return {mu, rho};
      }
      Tensor to = all_rows.dim() == 2 ? aten("aten::select", "int", all_rows, int64_t(0), int64_t(0)) : all_rows;
      auto of = [&](const Tensor& values) {
        if (gradient == kSparse) return aten("aten::embedding_sparse_backward", "", values, to, at.table, no_padding, false);
        if (values.numel() == 0 || at.table == 0) return torch::stable::new_zeros(values, shape);
        return aten("aten::embedding_dense_backward", "", values, to, at.table, no_padding, gradient == kByFrequency);
      };
      return {of(by_mu), of(by_rho)};
    }
  };
};

}  // namespace bnn_fast
