// The operators of a chain of narrow layers on CUDA tensors: memory and launches. Kernels: chain_*.cu.
#include <algorithm>

#include "../chain.h"
#include "chain.h"
#include "stream.h"

namespace bnn_fast {
namespace {

// Drawn weights, of some of the samples where there are many: 64 MiB of float32; fewer where an interpreter draws them (tests/ptx).
#ifndef BNN_FAST_STAND_IN
constexpr int64_t kMostDrawn = int64_t(1) << 24;
#else
constexpr int64_t kMostDrawn = int64_t(1) << 12;
#endif

class CudaChain {
 public:
  static void check(const ChainArguments& a, ScalarType type) {
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, "parameters have dtype number ",
                    static_cast<int>(type), ", expected float32, bfloat16 or float16");
    for (const auto& layer : a.layers)
      STD_TORCH_CHECK(layer.inputs <= kChainSide && layer.outputs <= kChainSide, "a layer has ", layer.inputs, " inputs and ",
                      layer.outputs, " outputs, expected at most ", kChainSide, " on CUDA");
  }

  CudaChain(const ChainArguments& a, const Tensor& like) : device(like), a(a), like(like), tensors(empty_tensors()) {
    each_tensor(true, [&](const Posterior& p, size_t) { tensors.add(p, nullptr, nullptr); });
  }

  // Two launches, or two for each part of many samples.
  std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& given) {
    int64_t batch = a.check_input(given, like), drawn = tensors.elements;
    Tensor x = dense(given), y = empty_of(x, a.output_shape(x), x.scalar_type());
    int64_t most = drawn * a.samples > kMostDrawn ? std::max<int64_t>(1, kMostDrawn / drawn) : a.samples, parts = 0;
    Tensor weights = empty_of(x, {most * drawn}, x.scalar_type()), kl = empty_of(like, {}, ScalarType::Float);
    bool with_kl = a.divergence != kNone;
    auto draw_of = [&](int64_t first) { return draw_problem(first, std::min(most, a.samples - first), weights); };
    for (int64_t first = 0; with_kl && first < a.samples; first += most) {
      ChainDraw problem = draw_of(first);
      parts += bnn_fast_cuda_chain_draw_blocks(&problem);
    }
    Tensor sums = empty_of(like, {parts}, ScalarType::Double);
    auto* next = static_cast<double*>(sums.mutable_data_ptr());
    for (int64_t first = 0; first < a.samples; first += most) {
      ChainDraw problem = draw_of(first);
      problem.divergence = static_cast<int>(first > 0 && a.divergence == kAnalytic ? int64_t(kNone) : a.divergence);
      problem.kl = with_kl ? next : nullptr;
      next += with_kl ? bnn_fast_cuda_chain_draw_blocks(&problem) : 0;
      draw(problem, "_variational_chain");
      ChainForwardPass pass{};
      fill(pass, x, batch, weights, first, problem.samples);
      pass.y = at(y, first * batch * a.outputs());
      if (first + problem.samples == a.samples) {
        pass.kl = static_cast<float*>(kl.mutable_data_ptr());
        pass.parts = static_cast<const double*>(sums.const_data_ptr());
        pass.part_count = parts;
        pass.factor = a.divergence == kSampled ? 1.0 / static_cast<double>(a.samples) : 1.0;
      }
      check_cuda(bnn_fast_cuda_chain_forward(&pass, device.stream()), "_variational_chain");
    }
    return {y, kl, most == a.samples && drawn * most <= kKept ? weights : empty_of(x, {0}, x.scalar_type())};
  }

  // Two launches, and one that draws the weights again where they were not kept.
  void backward(const Tensor& given, const Tensor& grad_y, const KlGradient& grad_kl, const OptionalTensor& kept, bool need_x,
                Tensors& grads) {
    int64_t batch = a.check_input(given, like), drawn = tensors.elements;
    check_gradient(grad_y, "grad_y", a.output_shape(given), given.scalar_type(), like);
    Tensor x = dense(given), outputs = dense(grad_y);
    bool keeps = kept && kept->numel() > 0, sum_x = need_x && a.shared && a.samples > 1;
    Tensor weights = keeps ? *kept : empty_of(x, {a.samples * drawn}, x.scalar_type());
    STD_TORCH_CHECK(weights.numel() == a.samples * drawn && weights.scalar_type() == x.scalar_type(), "kept has ", weights.numel(),
                    " elements, expected ", a.samples * drawn, " of x's dtype, or none");
    if (!keeps) draw(draw_problem(0, a.samples, weights), "_variational_chain_backward");
    Tensor grad_x = grads[0];
    if (need_x) grads[0] = grad_x = empty_of(x, sum_x ? with_samples(x, a.samples) : shape_of(x), x.scalar_type());
    ChainBackwardPass pass{};
    fill(pass, x, batch, weights, 0, a.samples);
    pass.grad_y = outputs.const_data_ptr();
    pass.grad_x = need_x ? grad_x.mutable_data_ptr() : nullptr;
    launch(pass, grad_kl, grads);
    if (sum_x) grads[0] = torch::stable::sum(grad_x, Shape{0});
  }

  void put_together(const KlGradient& grad_kl, Tensors& grads) const {
    ChainBackwardPass pass{};
    fill(pass, like, 0, like, 0, a.samples);
    launch(pass, grad_kl, grads);
  }

 private:
  OnDevice device;
  const ChainArguments& a;
  const Tensor& like;
  ChainTensors tensors;  // those that are drawn

  ChainTensors empty_tensors() const {
    int scale = kSoftplus;
    for (const auto& layer : a.layers)
      if (layer.drawn) scale = layer.drawn->weight.view.scale;
    return {{}, 0, 0, 0, scale, type_of_tensor(like, "parameters")};
  }

  void* at(const Tensor& t, int64_t element) const {
    return static_cast<char*>(const_cast<void*>(t.const_data_ptr())) + element * size_of(tensors.type);
  }

  // Calls body(posterior, the place of mu among the parameters) for every weight and bias, layer by layer; one that is not drawn has
  // no rho.
  template <class Body> void each_tensor(bool drawn_alone, Body body) const {
    for (const auto& layer : a.layers) {
      if (layer.drawn) {
        body(layer.drawn->weight.view, layer.parameter);
        if (layer.has_bias) body(layer.drawn->bias->view, layer.parameter + 2);
      } else if (!drawn_alone) {
        Posterior p{};
        p.rows = layer.outputs, p.columns = layer.inputs, p.mu = data_of(layer.weight);
        body(p, layer.parameter);
        p.rows = 1, p.columns = layer.outputs, p.mu = data_of(layer.bias);
        if (layer.has_bias) body(p, layer.parameter + 1);
      }
    }
  }

  ChainDraw draw_problem(int64_t first, int64_t samples, const Tensor& weights) const {
    return {tensors, kNone, first, samples, const_cast<void*>(weights.const_data_ptr()), nullptr};
  }
  void draw(const ChainDraw& problem, const char* name) const { check_cuda(bnn_fast_cuda_chain_draw(&problem, device.stream()), name); }

  // Samples [first, first + samples), whose weights are those given.
  void fill(ChainPass& pass, const Tensor& x, int64_t batch, const Tensor& weights, int64_t first, int64_t samples) const {
    pass.count = static_cast<int>(a.layers.size());
    pass.samples = samples;
    pass.batch = batch;
    pass.shared = a.shared || a.samples == 1;
    pass.type = tensors.type;
    pass.x = at(x, pass.shared ? 0 : first * batch * a.inputs());
    int64_t next = 0;
    for (size_t l = 0; l < a.layers.size(); ++l) {
      const auto& layer = a.layers[l];
      bool drawn = layer.drawn.has_value();
      pass.layers[l] = {layer.inputs, layer.outputs, layer.activation, layer.first, layer.second, data_of(layer.weight),
                        data_of(layer.bias), drawn};
      auto place = [&](int64_t elements) {
        void* found = at(weights, next);
        next += samples * elements;
        return found;
      };
      if (drawn) pass.layers[l].weight = place(layer.inputs * layer.outputs);
      if (drawn && layer.has_bias) pass.layers[l].bias = place(layer.outputs);
    }
  }

  void launch(ChainBackwardPass& pass, const KlGradient& grad_kl, Tensors& grads) const {
    ChainGradients problem{empty_tensors(), static_cast<int>(a.divergence), a.samples, grad_kl};
    each_tensor(false, [&](const Posterior& p, size_t parameter) {
      problem.tensors.add(p, grads[1 + parameter].mutable_data_ptr(), p.rho ? grads[2 + parameter].mutable_data_ptr() : nullptr);
    });
    Tensor workspace = empty_of(like, {(bnn_fast_cuda_chain_backward_workspace(&pass) + 7) / 8}, ScalarType::Double);
    pass.workspace = workspace.mutable_data_ptr();
    check_cuda(bnn_fast_cuda_chain_backward(&pass, &problem, device.stream()), "_variational_chain_backward");
  }
};

}  // namespace
}  // namespace bnn_fast

BNN_FAST_IMPLEMENT(BNN_FAST_LIBRARY, BNN_FAST_CUDA_KEY, m) {
  m.impl("_variational_chain", TORCH_BOX(&bnn_fast::variational_chain<bnn_fast::CudaChain>));
  m.impl("_variational_chain_backward", TORCH_BOX(&bnn_fast::variational_chain_backward<bnn_fast::CudaChain>));
}
