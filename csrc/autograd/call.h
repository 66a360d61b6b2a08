// One call of an operator in eager mode, and how the two nodes that it may have in autograd's graph find each other.
//
//   y   from a DrawNode, with edges to x and the parameters
//   KL  from a KlNode, made when somebody reads it, with edges to the parameters of all calls that are read together
//
// One fused pass gives the gradients of both. A KL that came out of y's node would not do: after nll.backward() the engine would
// go on from kl.backward() into the layers below, whose graphs are freed. So where a backward pass runs both nodes, the
// KL's, which comes first, leaves its gradient with the call, and y's node takes it along; else each makes its own pass.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>

#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace bnn_fast {

using torch::autograd::Node;
using torch::autograd::variable_list;

// A raw operator and its backward (../ops.cpp). Arguments are (x if it has one, the parameters in a list, ...); backward takes
// (the list of the results' gradients, *arguments) and, where there is an x, whether its gradient is wanted. An operator with a
// third result, behind y and the KL, has its backward take that last.
struct Operator {
  c10::OperatorHandle forward, backward;
  std::vector<std::string> parameters;  // their names
  bool has_x;
  bool draws;  // (y, kl); without it the KL alone
};

class Call : public c10::intrusive_ptr_target {
 public:
  // arguments without x
  Call(const Operator& op, std::vector<c10::IValue> arguments);

  variable_list parameters() const;

  // Runs the forward; keeps the KL, returns y; puts into `kept` what the backward takes, if there is such a thing.
  at::Tensor run(const at::Tensor& x, at::Tensor* kept = nullptr);

  // Whether all tensors of the arguments are, as far as one can know, what they were.
  bool unchanged() const;

  // Gradients of (x, *parameters), undefined where there is none.
  variable_list gradients(const at::Tensor& grad_y, const at::Tensor& grad_kl, const at::Tensor& x, bool need_x,
                          const at::Tensor& kept = {}) const;

  void set_node(Node* node);
  at::Tensor take();                       // by y's node: the KL's gradient, if its node has run in this backward pass
  variable_list kl_gradients(const at::Tensor& grad);  // by the KL's node: of the parameters; empty where y's node sees to them

  const Operator& op;
  at::Tensor kl;
  int64_t layers = 1;  // whose KL it is: of a chain's, which can only be read together

 private:
  bool hand_over(const at::Tensor& grad);

  struct Given {
    at::Tensor tensor;
    int64_t version;
    const void* data;
    size_t argument, position;  // in which list, and where
  };

  std::string name_of(const Given& given) const;
  void check_unchanged() const;

  std::vector<c10::IValue> arguments_;
  std::vector<Given> given_;  // all tensors of the arguments: the key and the priors as much as the parameters
  std::mutex mutex_;
  Node* node_ = nullptr;  // while it lives
  int task_ = -2;         // the backward pass in which y's node ran last; -1 is none
  std::optional<std::pair<int, at::Tensor>> pending_;
};

// y of a call, and the sum of the KLs of some calls, each with its gradient.
at::Tensor draw(const c10::intrusive_ptr<Call>& call, const at::Tensor& x);
at::Tensor read(const std::vector<c10::intrusive_ptr<Call>>& calls);

}  // namespace bnn_fast
