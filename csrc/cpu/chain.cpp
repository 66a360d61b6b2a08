// The operators of a chain of narrow layers on the CPU. Kernels: chain.h, chain_backward.h.
#include <algorithm>

#include "../chain.h"
#include "launch.h"

namespace bnn_fast {
namespace {

class Chain {
 public:
  static void check(const ChainArguments&, ScalarType type) {
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "parameters have dtype number ", static_cast<int>(type),
                    ", expected float32 or float64");
  }

  Chain(const ChainArguments& a, const Tensor& like) : a(a), like(like), wide(like.scalar_type() == ScalarType::Double) {
    for (const auto& layer : a.layers)
      if (layer.drawn) drawn += layer.inputs * layer.outputs + (layer.has_bias ? layer.outputs : 0);
  }

  // (y, KL, the drawn weights)
  std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& given) {
    int64_t batch = a.check_input(given, like);
    Tensor x = dense(given), y = empty_of(x, a.output_shape(x), x.scalar_type());
    int64_t most = drawn > 0 && drawn * a.samples > kKept ? std::max<int64_t>(1, kKept / drawn) : a.samples;
    Tensor weights = empty_of(x, {most * drawn}, x.scalar_type());
    std::vector<double> kl(a.layers.size());
    for (int64_t first = 0; first < a.samples; first += most) {
      int64_t samples = std::min(most, a.samples - first);
      draw(weights, first, samples, first > 0 && a.divergence != kSampled ? int64_t(kNone) : a.divergence, kl.data());
      std::vector<ChainLayer> layers = layers_of(weights, samples);
      bool shared = a.shared || a.samples == 1;
      ChainForward problem{layers.data(), static_cast<int64_t>(layers.size()), samples, batch, shared, wide,
                           at(x, shared ? 0 : first * batch * a.inputs()), at(y, first * batch * a.outputs())};
      ChainTasks tasks(samples, batch, ChainForward::kMostRows);
      run(cpu_kernels().chain_forward, problem, tasks.count, std::min(tasks.rows, batch) * row_cost());
    }
    double total = 0;  // of each layer's as its own operator rounds it
    for (double part : kl) total += wide ? part : static_cast<double>(static_cast<float>(part));
    return {y, scalar_tensor(total, like), most == a.samples ? weights : empty_of(x, {0}, x.scalar_type())};
  }

  // grads: of x, empty if it is not needed, and of all parameters.
  void backward(const Tensor& given, const Tensor& grad_y, const KlGradient& grad_kl, const OptionalTensor& kept, bool need_x,
                Tensors& grads) {
    int64_t batch = a.check_input(given, like), size = 0;
    check_gradient(grad_y, "grad_y", a.output_shape(given), given.scalar_type(), like);
    Tensor x = dense(given), outputs = dense(grad_y);
    Tensor weights = kept && kept->numel() > 0 ? *kept : empty_of(x, {a.samples * drawn}, x.scalar_type());
    STD_TORCH_CHECK(weights.numel() == a.samples * drawn && weights.scalar_type() == x.scalar_type(), "kept has ", weights.numel(),
                    " elements, expected ", a.samples * drawn, " of x's dtype, or none");
    if (!kept || kept->numel() == 0) draw(weights, 0, a.samples, kNone, nullptr);
    std::vector<ChainLayer> layers = layers_of(weights, a.samples);
    for (const ChainLayer& layer : layers) size += layer.parameters();
    bool shared = a.shared || a.samples == 1, sum_x = need_x && a.shared && a.samples > 1;
    Tensor grad_x = grads[0];
    if (need_x) grads[0] = grad_x = empty_of(x, sum_x ? with_samples(x, a.samples) : shape_of(x), x.scalar_type());
    ChainTasks tasks(a.samples, batch, ChainBackward::kMostRows);
    Tensor partial = empty_of(x, {tasks.count, size}, x.scalar_type());
    ChainBackward problem{layers.data(), static_cast<int64_t>(layers.size()), a.samples, batch, shared, wide, x.const_data_ptr(),
                          outputs.const_data_ptr(), need_x ? grad_x.mutable_data_ptr() : nullptr, partial.mutable_data_ptr()};
    run(cpu_kernels().chain_backward, problem, tasks.count, 3 * std::min(tasks.rows, batch) * row_cost());
    if (sum_x) grads[0] = torch::stable::sum(grad_x, Shape{0});
    put_together(batch > 0 ? partial.mutable_data_ptr() : nullptr, tasks.per_sample, size, grad_kl, grads);
  }

  void put_together(const KlGradient& grad_kl, Tensors& grads) const { put_together(nullptr, 0, 0, grad_kl, grads); }

 private:
  const ChainArguments& a;
  const Tensor& like;
  bool wide;
  int64_t drawn = 0;  // weights and biases of a sample

  // A row's part in the work, on the scale of weights that are drawn.
  int64_t row_cost() const {
    int64_t products = 0;
    for (const auto& layer : a.layers) products += layer.inputs * layer.outputs;
    return 1 + products / 64;
  }

  void* at(const Tensor& t, int64_t element) const {
    return static_cast<char*>(const_cast<void*>(t.const_data_ptr())) + element * (wide ? 8 : 4);
  }

  // Calls body(layer, posterior, elements before it in `weights`) for every posterior.
  template <class Body> void for_drawn(int64_t samples, Body body) const {
    int64_t offset = 0;
    for (const auto& layer : a.layers) {
      if (!layer.drawn) continue;
      body(layer, layer.drawn->weight.view, offset);
      offset += samples * layer.inputs * layer.outputs;
      if (!layer.has_bias) continue;
      body(layer, layer.drawn->bias->view, offset);
      offset += samples * layer.outputs;
    }
  }

  // Draws samples [first, first + samples) of all weights, and adds up each layer's KL.
  void draw(const Tensor& weights, int64_t first, int64_t samples, int64_t divergence, double* kl) const {
    for_drawn(samples, [&](const auto& layer, Posterior p, int64_t offset) {
      int64_t key[2] = {p.key[0], p.key[1] + first};
      p.key = key;
      double part = sample(p, divergence, samples, at(weights, offset), p.type);
      if (divergence == kSampled) part *= static_cast<double>(samples) / static_cast<double>(a.samples);
      if (divergence != kNone) kl[&layer - a.layers.data()] += part;
    });
  }

  // The gradients of the parameters from each task's part of dW, or of the KL alone if that is null.
  void put_together(void* partial, int64_t per_sample, int64_t size, const KlGradient& grad_kl, Tensors& grads) const {
    if (wide)
      put_together_as(static_cast<double*>(partial), per_sample, size, grad_kl, grads);
    else
      put_together_as(static_cast<float*>(partial), per_sample, size, grad_kl, grads);
  }

  std::vector<ChainLayer> layers_of(const Tensor& weights, int64_t samples) const {
    std::vector<ChainLayer> layers;
    for (const auto& layer : a.layers)
      layers.push_back({layer.inputs, layer.outputs, layer.activation, layer.first, layer.second, data_of(layer.weight),
                        data_of(layer.bias), layer.drawn.has_value()});
    for_drawn(samples, [&](const auto& layer, const Posterior& p, int64_t offset) {
      ChainLayer& found = layers[&layer - a.layers.data()];
      (p.mu == layer.drawn->weight.view.mu ? found.weight : found.bias) = at(weights, offset);
    });
    return layers;
  }

  template <class T>
  void put_together_as(T* partial, int64_t per_sample, int64_t size, const KlGradient& grad_kl, Tensors& grads) const {
    for (int64_t s = 0; s < a.samples && partial; ++s) {
      T* total = partial + s * per_sample * size;
      for (int64_t t = 1; t < per_sample; ++t)
        for (int64_t i = 0; i < size; ++i) total[i] += total[t * size + i];
    }
    std::vector<T> of_samples;
    auto tensor = [&](const auto& layer, size_t pair, int64_t n, int64_t offset) {
      auto of_sample = [&](int64_t s) { return partial + s * per_sample * size + offset; };
      size_t where = 1 + layer.parameter + (layer.drawn ? 2 * pair : pair);
      if (!layer.drawn) {
        T* sum = static_cast<T*>(grads[where].mutable_data_ptr());
        std::fill(sum, sum + n, T(0));
        for (int64_t s = 0; s < a.samples && partial; ++s)
          for (int64_t i = 0; i < n; ++i) sum[i] += of_sample(s)[i];
        return;
      }
      of_samples.clear();
      for (int64_t s = 0; s < a.samples && partial; ++s) of_samples.insert(of_samples.end(), of_sample(s), of_sample(s) + n);
      const Posterior& p = pair ? layer.drawn->bias->view : layer.drawn->weight.view;
      run_spans(cpu_kernels().sample_backward,
                SampleBackward{p, static_cast<int>(a.divergence), a.samples, partial ? of_samples.data() : nullptr, p.type, grad_kl,
                               grads[where].mutable_data_ptr(), grads[where + 1].mutable_data_ptr()});
    };
    int64_t offset = 0;
    for (const auto& layer : a.layers) {
      tensor(layer, 0, layer.inputs * layer.outputs, offset);
      offset += layer.inputs * layer.outputs;
      if (!layer.has_bias) continue;
      tensor(layer, 1, layer.outputs, offset);
      offset += layer.outputs;
    }
  }
};

}  // namespace
}  // namespace bnn_fast

STABLE_TORCH_LIBRARY_IMPL(bnn_fast, CPU, m) {
  m.impl("_variational_chain", TORCH_BOX(&bnn_fast::variational_chain<bnn_fast::Chain>));
  m.impl("_variational_chain_backward", TORCH_BOX(&bnn_fast::variational_chain_backward<bnn_fast::Chain>));
}
