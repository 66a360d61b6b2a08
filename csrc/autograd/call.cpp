// Calls and their nodes: see call.h.
#include "call.h"

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/version.h>

#include <utility>

namespace bnn_fast {
namespace {

using c10::IValue;
using torch::autograd::collect_next_edges;
using torch::autograd::SavedVariable;
using torch::autograd::set_history;

#define PLAIN " Within `with bnn_fast.plain():` layers run in plain PyTorch, with the same noise and all derivatives."
constexpr const char* kDouble =
    "bnn_fast's operators are differentiable once: their gradients have no gradient (double backward)." PLAIN;
constexpr const char* kForward = "bnn_fast's operators have no forward-mode derivative." PLAIN;

template <class T, class... Args> auto make_node(Args&&... args) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
  return c10::make_intrusive<T>(std::forward<Args>(args)...);
#else
  return std::shared_ptr<T>(new T(std::forward<Args>(args)...), torch::autograd::deleteNode);
#endif
}

IValue optional(const at::Tensor& t) { return t.defined() ? IValue(t) : IValue(); }

bool engine_will_run(Node* node) {
  const auto* info = torch::autograd::get_current_graph_task_exec_info();
  if (!info) return false;
  if (info->empty()) {  // backward(): all that can be reached
    const auto* nodes = torch::autograd::get_current_graph_task_nodes_in_graph();
    return nodes && nodes->count(node) > 0;
  }
  auto found = info->find(node);
  return found != info->end() && found->second.should_execute();
}

struct DrawNode : Node {
  c10::intrusive_ptr<Call> call;
  SavedVariable x;

  ~DrawNode() override { call->set_node(nullptr); }

  std::string name() const override { return "VariationalDraw"; }

  variable_list apply(variable_list&& grads) override {
    at::Tensor grad_kl = call->take(), grad_y = grads[0];
    variable_list none(num_outputs());
    if (!grad_y.defined() && !grad_kl.defined()) return none;
    bool need_x = call->op.has_x && task_should_compute_output(0) && grad_y.defined();
    at::Tensor input = call->op.has_x && grad_y.defined() ? x.unpack() : at::Tensor();
    variable_list found = call->gradients(grad_y, grad_kl, input, need_x);
    if (!call->op.has_x) found.erase(found.begin());
    return found;
  }

  void release_variables() override { x.reset_data(); }
};

struct KlNode : Node {
  std::vector<c10::intrusive_ptr<Call>> calls;

  std::string name() const override { return "VariationalKL"; }

  variable_list apply(variable_list&& grads) override {
    variable_list all;
    for (const auto& call : calls) {
      size_t count = call->op.parameters.size();
      variable_list found;
      if (grads[0].defined()) {
        const at::Tensor& kl = call->kl;
        found = call->kl_gradients(calls.size() == 1 ? grads[0] : grads[0].to(kl.device(), kl.scalar_type()));
      }
      found.resize(count);
      all.insert(all.end(), found.begin(), found.end());
    }
    return all;
  }
};

// A tensor of its own, as the calls' must not get the node. More than two of a GPU's take two launches, whatever their number.
at::Tensor sum_of(const std::vector<c10::intrusive_ptr<Call>>& calls) {
  std::vector<at::Tensor> all;
  for (const auto& call : calls) all.push_back(call->kl.to(calls[0]->kl.device()));
  if (all.size() == 1) return all[0].clone();
  if (all.size() > 2 && all[0].is_cuda()) return at::stack(all).sum();
  at::Tensor total = all[0];
  for (size_t i = 1; i < all.size(); ++i) total = total + all[i];
  return total;
}

// 0 for what has none.
int64_t version(const IValue& argument) {
  if (!argument.isTensor()) return 0;
  const at::Tensor& t = argument.toTensor();
  return t.defined() && !t.is_inference() ? static_cast<int64_t>(t._version()) : 0;
}

}  // namespace

Call::Call(const Operator& op, std::vector<IValue> arguments) : op(op), arguments_(std::move(arguments)) {
  for (const IValue& argument : arguments_) versions_.push_back(version(argument));
}

variable_list Call::parameters() const {
  variable_list found;
  for (size_t i = 0; i < op.parameters.size(); ++i)
    found.push_back(arguments_[i].isTensor() ? arguments_[i].toTensor() : at::Tensor());
  return found;
}

void Call::check_unchanged() const {  // the key and the priors count as much as the parameters
  for (size_t i = 0; i < arguments_.size(); ++i)
    TORCH_CHECK(version(arguments_[i]) == versions_[i], op.forward.schema().arguments()[i + op.has_x].name(),
                ", needed for the gradient, has been modified by an inplace operation: it is at version ",
                version(arguments_[i]), ", expected version ", versions_[i], ".");
}

at::Tensor Call::run(const at::Tensor& x) {
  at::AutoDispatchBelowADInplaceOrView guard;
  torch::jit::Stack stack;
  stack.reserve(arguments_.size() + 1);
  if (op.has_x) stack.emplace_back(x);
  stack.insert(stack.end(), arguments_.begin(), arguments_.end());
  op.forward.callBoxed(stack);
  kl = std::move(stack.back()).toTensor();
  return op.draws ? std::move(stack.front()).toTensor() : at::Tensor();
}

variable_list Call::gradients(const at::Tensor& grad_y, const at::Tensor& grad_kl, const at::Tensor& x, bool need_x) const {
  check_unchanged();
  torch::jit::Stack stack;
  stack.reserve(arguments_.size() + 4);
  if (op.draws) stack.push_back(optional(grad_y));
  stack.push_back(optional(grad_kl));
  if (op.has_x) stack.push_back(optional(x));
  stack.insert(stack.end(), arguments_.begin(), arguments_.end());
  if (op.has_x) stack.emplace_back(need_x);
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.backward.callBoxed(stack);
  }
  variable_list found, given = parameters();
  if (!op.has_x) found.emplace_back();
  for (IValue& value : stack) found.push_back(std::move(value).toTensor());
  if (op.has_x && !need_x) found[0] = at::Tensor();
  for (size_t i = 0; i < given.size(); ++i)
    if (!given[i].defined()) found[i + 1] = at::Tensor();
  if (at::GradMode::is_enabled()) {  // create_graph: what is differentiated again must not be silently constant
    variable_list inputs{grad_y, grad_kl, x};
    inputs.insert(inputs.end(), given.begin(), given.end());
    auto error = make_node<torch::autograd::Error>(kDouble, collect_next_edges(inputs));
    for (at::Tensor& t : found)
      if (t.defined()) set_history(t, error);
  }
  return found;
}

void Call::set_node(Node* node) {
  std::lock_guard<std::mutex> lock(mutex_);
  node_ = node;
}

at::Tensor Call::take() {
  int task = torch::autograd::get_current_graph_task_id();
  std::lock_guard<std::mutex> lock(mutex_);
  task_ = task;
  auto pending = std::exchange(pending_, std::nullopt);
  return pending && pending->first == task ? pending->second : at::Tensor();
}

bool Call::hand_over(const at::Tensor& grad) {
  int task = torch::autograd::get_current_graph_task_id();
  std::lock_guard<std::mutex> lock(mutex_);
  if (!node_ || task_ == task || !engine_will_run(node_)) return false;
  bool again = pending_ && pending_->first == task;
  pending_.emplace(task, again ? grad + pending_->second : grad);
  return true;
}

variable_list Call::kl_gradients(const at::Tensor& grad) {
  if (hand_over(grad)) return {};
  variable_list found = gradients({}, grad, {}, false);
  found.erase(found.begin());
  return found;
}

at::Tensor draw(const c10::intrusive_ptr<Call>& call, const at::Tensor& x) {
  variable_list inputs = call->parameters();
  if (call->op.has_x) inputs.insert(inputs.begin(), x);
  for (const at::Tensor& t : inputs) TORCH_CHECK(!t.defined() || !t._fw_grad(0).defined(), kForward);
  at::Tensor y = call->run(x);
  if (!torch::autograd::compute_requires_grad(inputs)) return y;
  auto node = make_node<DrawNode>();
  node->set_next_edges(collect_next_edges(inputs));
  node->call = call;
  if (call->op.has_x) node->x = SavedVariable(x, false);
  call->set_node(node.get());
  set_history(y, node);
  return y;
}

at::Tensor read(const std::vector<c10::intrusive_ptr<Call>>& calls) {
  at::Tensor total;
  variable_list inputs;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    total = sum_of(calls);
  }
  for (const auto& call : calls)
    for (at::Tensor& p : call->parameters()) inputs.push_back(std::move(p));
  if (!torch::autograd::compute_requires_grad(inputs)) return total;
  auto node = make_node<KlNode>();
  node->set_next_edges(collect_next_edges(inputs));
  node->calls = calls;
  set_history(total, node);
  return total;
}

}  // namespace bnn_fast
