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

std::optional<at::Tensor> optional(const at::Tensor& t) { return t.defined() ? std::make_optional(t) : std::nullopt; }

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
  at::Tensor kept;

  ~DrawNode() override { call->set_node(nullptr); }

  std::string name() const override { return "VariationalDraw"; }

  variable_list apply(variable_list&& grads) override {
    at::Tensor grad_kl = call->take(), grad_y = grads[0];
    variable_list none(num_outputs());
    if (!grad_y.defined() && !grad_kl.defined()) return none;
    bool need_x = call->op.has_x && task_should_compute_output(0) && grad_y.defined();
    at::Tensor input = call->op.has_x && grad_y.defined() ? x.unpack() : at::Tensor();
    variable_list found = call->gradients(grad_y, grad_kl, input, need_x, kept);
    if (!call->op.has_x) found.erase(found.begin());
    return found;
  }

  void release_variables() override {
    x.reset_data();
    kept.reset();
  }
};

struct KlNode : Node {
  std::vector<c10::intrusive_ptr<Call>> calls;

  std::string name() const override { return "VariationalKL"; }

  variable_list apply(variable_list&& grads) override {
    variable_list all;
    for (const auto& call : calls) {
      variable_list found;
      if (grads[0].defined()) {
        const at::Tensor& kl = call->kl;
        found = call->kl_gradients(calls.size() == 1 ? grads[0] : grads[0].to(kl.device(), kl.scalar_type()));
      }
      found.resize(call->parameters().size());
      all.insert(all.end(), found.begin(), found.end());
    }
    return all;
  }
};

// A tensor of its own, as the calls' must not get the node.
at::Tensor sum_of(const std::vector<c10::intrusive_ptr<Call>>& calls) {
  static const auto sum_values = c10::Dispatcher::singleton().findSchemaOrThrow("bnn_fast::_sum_values", "");
  if (calls.size() == 1) return calls[0]->kl.clone();
  at::ScalarType dtype = calls[0]->kl.scalar_type();
  for (const auto& call : calls) dtype = c10::promoteTypes(dtype, call->kl.scalar_type());
  c10::List<at::Tensor> values;
  for (const auto& call : calls) values.push_back(call->kl.to(calls[0]->kl.device(), dtype));
  torch::jit::Stack stack{std::move(values)};
  sum_values.callBoxed(stack);
  return std::move(stack.back()).toTensor();
}

// 0 for what has none.
int64_t version(const at::Tensor& t) { return t.is_inference() ? 0 : static_cast<int64_t>(t._version()); }

// null where there is none, as with fakes.
const void* data_of(const at::Tensor& t) {
  return t.has_storage() && t.storage().unsafeGetStorageImpl()->device_type() != at::kMeta ? t.storage().data() : nullptr;
}

variable_list tensors_of(const IValue& argument) {
  if (argument.isTensor()) return {argument.toTensor()};
  return argument.isTensorList() ? argument.toTensorVector() : variable_list();
}

// With lists of its own: the stable ABI's boxing may take the tensors out of those that it is given.
void push_all(torch::jit::Stack& stack, const std::vector<IValue>& arguments) {
  for (const IValue& argument : arguments)
    stack.push_back(argument.isTensorList() ? IValue(argument.toTensorList().copy()) : argument);
}

}  // namespace

Call::Call(const Operator& op, std::vector<IValue> arguments) : op(op), arguments_(std::move(arguments)) {
  for (size_t i = 0; i < arguments_.size(); ++i) {
    variable_list tensors = tensors_of(arguments_[i]);
    for (size_t j = 0; j < tensors.size(); ++j) given_.push_back({tensors[j], version(tensors[j]), data_of(tensors[j]), i, j});
  }
}

variable_list Call::parameters() const {
  variable_list found;
  for (const Given& given : given_)
    if (given.argument == 0) found.push_back(given.tensor);
  return found;
}

bool Call::unchanged() const {
  for (const Given& given : given_)  // inference tensors have no version: nothing is known
    if (given.tensor.is_inference() || version(given.tensor) != given.version || data_of(given.tensor) != given.data) return false;
  return true;
}

std::string Call::name_of(const Given& given) const {
  if (given.argument == 0 && given.position < op.parameters.size()) return op.parameters[given.position];
  const auto& argument = op.forward.schema().arguments()[given.argument + op.has_x];
  bool one = argument.type()->kind() == c10::TypeKind::TensorType;
  return one ? argument.name() : argument.name() + "[" + std::to_string(given.position) + "]";
}

void Call::check_unchanged() const {
  for (const Given& given : given_)
    TORCH_CHECK(version(given.tensor) == given.version, name_of(given),
                ", needed for the gradient, has been modified by an inplace operation: it is at version ",
                version(given.tensor), ", expected version ", given.version, ".");
}

at::Tensor Call::run(const at::Tensor& x, at::Tensor* kept) {
  at::AutoDispatchBelowADInplaceOrView guard;
  torch::jit::Stack stack;
  stack.reserve(arguments_.size() + 1);
  if (op.has_x) stack.emplace_back(x);
  push_all(stack, arguments_);
  op.forward.callBoxed(stack);
  if (stack.size() == 3) {
    if (kept) *kept = std::move(stack.back()).toTensor();
    stack.pop_back();
  }
  kl = std::move(stack.back()).toTensor();
  return op.draws ? std::move(stack.front()).toTensor() : at::Tensor();
}

variable_list Call::gradients(const at::Tensor& grad_y, const at::Tensor& grad_kl, const at::Tensor& x, bool need_x,
                              const at::Tensor& kept) const {
  check_unchanged();
  c10::List<std::optional<at::Tensor>> grads;
  if (op.draws) grads.push_back(optional(grad_y));
  grads.push_back(optional(grad_kl));
  torch::jit::Stack stack;
  stack.reserve(arguments_.size() + 4);
  stack.emplace_back(std::move(grads));
  if (op.has_x) stack.emplace_back(optional(x));
  push_all(stack, arguments_);
  if (op.has_x) stack.emplace_back(need_x);
  if (op.forward.schema().returns().size() == 3) stack.emplace_back(optional(kept));
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.backward.callBoxed(stack);
  }
  variable_list found = stack.back().toTensorVector();
  if (!op.has_x) found.emplace(found.begin());
  if (!need_x) found[0] = at::Tensor();
  if (at::GradMode::is_enabled()) {  // create_graph: what is differentiated again must not be silently constant
    variable_list inputs = parameters();
    inputs.insert(inputs.end(), {grad_y, grad_kl, x});
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
  at::Tensor kept, y = call->run(x, &kept);
  if (!torch::autograd::compute_requires_grad(inputs)) return y;
  auto node = make_node<DrawNode>();
  node->set_next_edges(collect_next_edges(inputs));
  node->call = call;
  if (call->op.has_x) node->x = SavedVariable(x, false);
  node->kept = std::move(kept);
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
