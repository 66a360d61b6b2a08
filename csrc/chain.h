// A chain of linear layers with activations as every device sees it: arguments and their checks (ops.cpp has what is in the lists), and
// the two operators.
//
// A Device brings what differs (cpu/chain.cpp, cuda/bind_chain.cpp):
//   static void check(arguments, dtype)                  whether it takes these types and widths
//   Device(arguments, like)                              like: the first parameter
//   (y, KL, the drawn weights or nothing) forward(x)
//   void backward(x, grad_y, grad_kl, kept, need_x, grads)   grads: of x, empty where it is not needed, and of all parameters
//   void put_together(grad_kl, grads)                    the parameters' alone, of the KL alone
#pragma once

#include "activation.h"
#include "layer.h"

namespace bnn_fast {

struct ChainArguments {
  struct Layer {
    std::optional<LinearArguments> drawn;
    OptionalTensor weight, bias;  // of one that is not
    int activation;
    double first, second;
    size_t parameter;  // the first of its tensors
    size_t tensors;
    int64_t inputs, outputs;
    bool has_bias;
  };
  std::vector<Layer> layers;
  int64_t divergence, samples;
  bool shared;

  ChainArguments(const Tensors& parameters, const Tensors& keys, const Tensors& prior, const Numbers& numbers, const Integers& given) {
    STD_TORCH_CHECK(given.size() >= 7 && given.size() % 2 == 1, "options has ", given.size(),
                    " numbers, expected scale, prior's places, kl, n_samples, shared, and two of every layer");
    Options options = options_of({given[0], 0, given[2], given[3], 0, 0, 0});
    divergence = options.divergence;
    samples = options.samples;
    STD_TORCH_CHECK(given[4] == 0 || given[4] == 1, "shared is ", given[4], ", expected 0 or 1");
    shared = given[4] == 1;
    size_t count = (given.size() - 5) / 2, tensor = 0, key = 0, number = 0, of_prior = 0;
    STD_TORCH_CHECK(count <= kChainLayers, "the chain has ", count, " layers, expected at most ", kChainLayers);
    for (size_t l = 0; l < count; ++l) {
      int64_t kind = given[5 + 2 * l], activation = given[6 + 2 * l];
      STD_TORCH_CHECK(kind >= 0 && kind < 4, "layer ", l, " is of kind ", kind, ", expected 1 (drawn) and 2 (bias), or their sum, or 0");
      STD_TORCH_CHECK(activation >= 0 && activation < kActivations, "layer ", l, " has activation ", activation, ", expected 0 to ",
                      kActivations - 1);
      bool is_drawn = kind & 1;
      Layer layer{{}, {}, {}, static_cast<int>(activation), 0, 1, tensor, 0, 0, 0, (kind & 2) != 0};
      layer.tensors = (is_drawn ? 2 : 1) * (layer.has_bias ? 2 : 1);
      STD_TORCH_CHECK(tensor + layer.tensors <= parameters.size(), "parameters has ", parameters.size(), " tensors, expected more");
      Tensors own(parameters.begin() + tensor, parameters.begin() + tensor + layer.tensors);
      tensor += layer.tensors;
      if (is_drawn) {
        STD_TORCH_CHECK(key < keys.size() && number + own.size() <= numbers.size(), "keys has ", keys.size(), " and numbers ",
                        numbers.size(), ", expected one for each layer that is drawn, and a loc and a scale for each mu and rho");
        Numbers of_own(numbers.begin() + number, numbers.begin() + number + own.size());
        options.places = given[1] >> number & ((int64_t(1) << own.size()) - 1);
        number += own.size();
        size_t there = std::popcount(static_cast<uint64_t>(options.places));
        STD_TORCH_CHECK(of_prior + there <= prior.size(), "prior has ", prior.size(), " tensors, expected one for each of its places");
        Tensors priors(prior.begin() + of_prior, prior.begin() + of_prior + there);
        of_prior += there;
        layer.drawn.emplace(Lists(own, priors, of_own, true), keys[key++], options);
        layer.outputs = layer.drawn->outputs();
        layer.inputs = layer.drawn->inputs();
      } else {
        STD_TORCH_CHECK(own[0].dim() == 2, "weight has shape ", describe(shape_of(own[0])), ", expected [out, in]");
        layer.outputs = own[0].size(0);
        layer.inputs = own[0].size(1);
        layer.weight = checked(own[0], own[0], {layer.outputs, layer.inputs});
        if (layer.has_bias) layer.bias = checked(own[1], own[0], {layer.outputs});
      }
      const Tensor& first = parameters[0];
      STD_TORCH_CHECK(own[0].scalar_type() == first.scalar_type() && on_device_of(own[0], first), "layer ", l,
                      " has another dtype or device than the first");
      STD_TORCH_CHECK(layer.inputs <= kChainWidth && layer.outputs <= kChainWidth, "layer ", l, " has ", layer.inputs, " inputs and ",
                      layer.outputs, " outputs, expected at most ", kChainWidth);
      STD_TORCH_CHECK(l == 0 || layer.inputs == layers.back().outputs, "layer ", l, " has ", layer.inputs, " inputs, expected ",
                      l == 0 ? 0 : layers.back().outputs, ", the outputs of the one before");
      layers.push_back(std::move(layer));
    }
    STD_TORCH_CHECK(tensor == parameters.size() && key == keys.size() && of_prior == prior.size() && number + 2 * count == numbers.size(),
                    "parameters, keys, prior and numbers have ", parameters.size(), ", ", keys.size(), ", ", prior.size(), " and ",
                    numbers.size(), ", expected ", tensor, ", ", key, ", ", of_prior, " and ", number + 2 * count, " for these options");
    for (Layer& layer : layers) layer.first = numbers[number++], layer.second = numbers[number++];
  }

  int64_t inputs() const { return layers.front().inputs; }
  int64_t outputs() const { return layers.back().outputs; }

  // Rows of one sample.
  int64_t check_input(const Tensor& x, const Tensor& like) const {
    STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) == inputs(), "x has shape ", describe(shape_of(x)), ", expected [..., ", inputs(), "]");
    STD_TORCH_CHECK(x.scalar_type() == like.scalar_type() && on_device_of(x, like), "x has another dtype or device than the parameters");
    check_storage(x, "x");
    int64_t rows = LinearArguments::rows_of(x);
    STD_TORCH_CHECK(samples == 1 || (x.dim() >= 2 && (shared || x.size(0) % samples == 0)), "x has shape ", describe(shape_of(x)),
                    ", expected its first dimension to be a multiple of n_samples = ", samples);
    return shared ? rows : rows / samples;
  }

  Shape output_shape(const Tensor& x) const {
    Shape shape = shape_of(x);
    shape.back() = outputs();
    if (shared && shape.size() > 1) shape[0] *= samples;
    return shape;
  }

 private:
  static Tensor checked(const Tensor& t, const Tensor& like, const Shape& shape) {
    STD_TORCH_CHECK(t.sizes() == shape && t.scalar_type() == like.scalar_type() && on_device_of(t, like), "a layer's bias has shape ",
                    describe(shape_of(t)), ", expected ", describe(shape), " and its weight's dtype and device");
    check_storage(t, "weight or bias");
    return dense(t);
  }
};

// (y, KL, kept)
template <class Device>
std::tuple<Tensor, Tensor, Tensor> variational_chain(const Tensor& x, const Tensors& parameters, const Tensors& keys, const Tensors& prior,
                                                     const Numbers& numbers, const Integers& options) {
  ChainArguments a(parameters, keys, prior, numbers, options);
  Device::check(a, parameters[0].scalar_type());
  return Device(a, parameters[0]).forward(x);
}

template <class Device>
Tensors variational_chain_backward(const OptionalTensors& given, const OptionalTensor& x, const Tensors& parameters, const Tensors& keys,
                                   const Tensors& prior, const Numbers& numbers, const Integers& options, bool need_grad_x,
                                   const OptionalTensor& kept) {
  ChainArguments a(parameters, keys, prior, numbers, options);
  const Tensor& like = parameters[0];
  Device::check(a, like.scalar_type());
  check_gradients(given, {"grad_y", "grad_kl"});
  const OptionalTensor &grad_y = given[0], &grad_kl = given[1];
  STD_TORCH_CHECK(x || !grad_y, "x is absent, expected it with grad_y");
  if (grad_kl) check_gradient(*grad_kl, "grad_kl", {}, compute_type(like.scalar_type()), like);
  KlGradient k = make_kl_gradient(grad_kl, false);
  Tensors grads{empty_of(like, {0}, like.scalar_type())};
  for (const Tensor& t : parameters) grads.push_back(empty_of(t, shape_of(t), t.scalar_type()));
  Device chain(a, like);
  if (grad_y)
    chain.backward(*x, *grad_y, k, kept, need_grad_x, grads);
  else
    chain.put_together(k, grads);
  return grads;
}

}  // namespace bnn_fast
