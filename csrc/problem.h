// The plain structs that cross from the operators (ops.cpp, linear.cpp) to the kernels: shapes, strides, pointers. No torch here.
#pragma once

#include <cstdint>

namespace bnn_fast {

enum class Type : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

inline int64_t size_of(Type type) {
  return type == Type::kFloat64 ? 8 : type == Type::kFloat32 ? 4 : 2;
}

// N(loc, scale^2). A tensor, where there is one, replaces the number.
struct Prior {
  double loc, scale;
  const void* loc_tensor;    // [rows, columns] or null
  const void* scale_tensor;  // [rows, columns] or null
};

// A Gaussian over a tensor seen as a contiguous [rows, columns], and where its noise is counted from.
struct Posterior {
  int64_t rows, columns;
  Type type;         // of mu, rho and the prior's tensors
  const void* mu;    // [rows, columns]
  const void* rho;   // [rows, columns]
  int scale;         // what rho means: enum Scale
  Prior prior;
  const int64_t* key;  // [2]: seed, first sample
  uint32_t stream;
  int64_t row_offset, column_offset;
  // Of factorised noise, eps[o, i] = row[o] column[i], the factors in the type computed in; null where every weight has its own. Columns are
  // readable from 3 elements before their beginning to kFactorTail behind their end. A bias has no row.
  const void* row_factors = nullptr;
  const void* column_factors = nullptr;
  static constexpr int64_t kFactorTail = 64;

  // The rows [begin, begin + count) of this posterior, with the noise they have in it.
  Posterior slice(int64_t begin, int64_t count) const {
    auto advance = [&](const void* p) {
      return p ? static_cast<const char*>(p) + begin * columns * size_of(type) : nullptr;
    };
    Posterior part = *this;
    part.rows = count;
    part.row_offset += begin;
    part.mu = advance(mu);
    part.rho = advance(rho);
    part.prior.loc_tensor = advance(prior.loc_tensor);
    part.prior.scale_tensor = advance(prior.scale_tensor);
    if (row_factors) part.row_factors = static_cast<const char*>(row_factors) + begin * (type == Type::kFloat64 ? 8 : 4);
    return part;
  }
};

// How a kernel over all elements is cut into tasks. It depends on the shape alone, never on the number of threads, so that
// sums over tasks are the same for any number.
struct Tasks {
  static constexpr int64_t kElements = 4096;
  int64_t rows_per_task, columns_per_task, across, count;

  explicit Tasks(const Posterior& p) {
    columns_per_task = kElements;
    across = (p.columns + 3 + kElements - 1) / kElements;
    rows_per_task = across > 1 ? 1 : kElements / (p.columns > 0 ? p.columns : 1);
    if (rows_per_task < 1) rows_per_task = 1;
    count = (p.rows + rows_per_task - 1) / rows_per_task * across;
  }
};

// The gradient that reaches a KL divergence: one number, or one for each element.
struct KlGradient {
  const void* data;  // scalar or [rows, columns]; null where there is none
  Type type;
  bool elementwise;
};

// What a variational linear layer draws (estimators: cpu/estimators.h): its weights, its outputs, or perturbations of the means
// with signs of their own for every example.
enum Estimator : int { kWeight = 0, kLocal = 1, kFlipout = 2 };
constexpr uint32_t kOutputNoise = 2, kInputSigns = 3, kOutputSigns = 4;  // streams of the last two

struct SampleForward {
  Posterior posterior;
  int divergence;     // enum Divergence
  int64_t samples;
  void* weight;       // [samples, rows, columns], or null
  Type weight_type;
  double* kl;         // [tasks]: each task's part of the sum over elements and samples; null without a divergence
  int estimator = kWeight;  // weight holds w = mu + sigma eps, or of local sigma^2 [rows, columns], or of flipout sigma eps
  void* noise = nullptr;    // eps beside w, [samples, rows, columns] of weight_type, that which is computed in; or null. On the CPU alone
};

struct KlElements {
  Posterior posterior;
  void* kl;  // [rows, columns], the posterior's type: the analytic divergence of each element
};

struct SampleBackward {
  Posterior posterior;
  int divergence;
  int64_t samples;
  const void* grad_weight;  // [samples, rows, columns], or null
  Type weight_type;
  KlGradient grad_kl;
  void* grad_mu;   // [rows, columns], the posterior's type
  void* grad_rho;  // [rows, columns]
  int estimator = kWeight;
  const void* grad_second = nullptr;  // beside grad_weight, which is then that of mu [rows, columns] (estimators.h), alike in type:
                                      // of local [rows, columns], of flipout [samples, rows, columns]
  const void* noise = nullptr;  // eps as SampleForward left it, may be where grad_mu will; null: drawn again
};

// Activations from the caller's layout to the kernels': [vectors][batch][lanes], where vector v holds the columns
// v * lanes - shift onwards, zero outside, in the type that is computed in.
struct Pack {
  int64_t batch, columns, shift;
  Type type;           // of rows
  bool wide;           // computed in double
  const void* rows;    // [batch, columns]
  void* packed;
};

struct LinearForward {
  Posterior weight;   // rows: outputs, columns: inputs
  int divergence;
  int64_t samples, batch;  // batch: of one sample
  const void* x;      // packed, batch = samples * batch, or batch if the samples share it
  bool shared;
  const void* bias;   // [samples, rows] in the type computed in, or null
  void* y;            // [samples * batch, rows]
  Type y_type;
  double* kl;         // [tasks] or null
};

struct LinearBackward {
  Posterior weight;
  int divergence;
  int64_t samples, batch;
  Type type;           // of x and grad_x
  const void* x;       // [samples * batch, columns], or [batch, columns] if they share it
  bool shared;
  const void* grad_y;  // [samples * batch, rows] in the type computed in
  void* grad_x;        // [samples * batch, columns] or null
  KlGradient grad_kl;
  void* grad_mu;
  void* grad_rho;
};

// The small-batch layer by an estimator: two products at once (cpu/estimators.h).
struct EstimatedForward {
  Posterior weight;
  int divergence, estimator;
  int64_t samples, batch;  // batch: activations' rows of one sample; of local, which does not tell samples apart, all of them
  const void* x;       // packed
  const void* second;  // packed: what meets sigma^2 or sigma eps
  void* first_sum;     // [activations' rows, rows] in the type computed in
  void* second_sum;    // [activations' rows, rows]
  double* kl;          // [tasks] or null
  int64_t activations() const { return estimator == kLocal ? batch : samples * batch; }
};

struct EstimatedBackward {
  Posterior weight;
  int divergence, estimator;
  int64_t samples, batch;   // as above
  const void* x;            // packed, as are second and factor
  const void* second;
  const void* factor;
  const void* grad;         // [activations' rows, rows] in the type computed in
  const void* grad_second;  // [activations' rows, rows]
  void* grad_x;             // each task's part of it, packed, or null
  KlGradient grad_kl;
  void* grad_mu;
  void* grad_rho;
  int64_t activations() const { return estimator == kLocal ? batch : samples * batch; }
  // Outputs: at most 16 tasks, as the parts of grad_x are summed, and a cache line of gradients at least.
  static int64_t rows_per_task(int64_t rows) { return rows < 256 ? 16 : (rows + 255) / 256 * 16; }
};

// The outputs of "local", y = m + sqrt(v) eps, and kept = eps / sqrt(v), 0 where v is.
struct LocalOutputs {
  Posterior posterior;  // of one sample: rows are examples, mu points at m, rho at v, both [samples, rows, columns]
  int64_t samples;
  bool shared;          // m and v are the same for all samples, [rows, columns]
  void* y;              // [samples, rows, columns]
  Type y_type;
  void* kept;           // the posterior's type
};

// Layers of at most kNarrow inputs and outputs, in float32 (cpu/narrow.h).
constexpr int64_t kNarrow = 64;

// How the batch rows of all samples are cut into tasks, by the shape alone: each has rows of one sample.
struct NarrowTasks {
  int64_t batch, per_sample, rows, count;

  NarrowTasks(int64_t samples, int64_t batch) : batch(batch) {
    int64_t wanted = samples < 64 ? 64 / samples : 1, most = (batch + 255) / 256;
    per_sample = most < wanted ? most : wanted;
    rows = per_sample > 0 ? (batch + per_sample - 1) / per_sample : 0;
    count = samples * per_sample;
  }
  int64_t first_row(int64_t t) const { return t / per_sample * batch + t % per_sample * rows; }
  int64_t end_row(int64_t t) const {
    int64_t end = first_row(t) + rows, of_sample = (t / per_sample + 1) * batch;
    return end < of_sample ? end : of_sample;
  }
};

struct NarrowForward {
  int64_t inputs, outputs, samples, batch;  // batch: of one sample
  const float* x;       // [samples * batch, inputs], or [batch, inputs] if they share it
  bool shared;
  const float* weight;  // [samples, outputs, inputs]
  const float* bias;    // [samples, outputs] or null
  float* y;             // [samples * batch, outputs]
};

struct NarrowBackward {
  int64_t inputs, outputs, samples, batch;
  const float* x;       // [samples * batch, inputs], or [batch, inputs] if they share it
  bool shared;
  const float* grad_y;  // [samples * batch, outputs]
  const float* weight;  // [samples, outputs, inputs], readable 16 elements beyond its end, or null without grad_x
  float* grad_x;        // [samples * batch, inputs] or null
  float* partial;       // [tasks, inputs + 1, outputs]: each task's part of the weights' gradient, then the bias's
};

// A chain of layers y = act(x W^T + b), in float32 or float64 (cpu/chain.h).
constexpr int64_t kChainWidth = 1024, kChainLayers = 15;

struct ChainLayer {
  int64_t inputs, outputs;
  int activation;         // enum Activation
  double first, second;   // its numbers
  const void* weight;     // [samples, outputs, inputs]; or [outputs, inputs], the same for all samples
  const void* bias;       // [samples, outputs] or [outputs], or null
  bool drawn;             // whether each sample has its own
  int64_t parameters() const { return inputs * outputs + (bias ? outputs : 0); }
};

// How the rows of all samples are cut into tasks, by the shape alone: each has rows of one sample, a multiple of kStrip of them but
// for the last.
struct ChainTasks {
  static constexpr int64_t kStrip = 64;
  int64_t batch, per_sample, rows, count;

  // most_rows: a task begins and ends with sums over its parameters, which 256 rows are worth; where there are many tasks each
  // rather has more rows, up to these.
  ChainTasks(int64_t samples, int64_t batch, int64_t most_rows) : batch(batch) {
    int64_t fair = batch / 16 < 256 ? 256 : batch / 16 < most_rows ? batch / 16 : most_rows;
    int64_t wanted = samples < 64 ? 64 / samples : 1, most = (batch + fair - 1) / fair, parts = most < wanted ? most : wanted;
    rows = parts > 0 ? ((batch + parts - 1) / parts + kStrip - 1) / kStrip * kStrip : 0;
    per_sample = parts > 0 ? (batch + rows - 1) / rows : 0;
    count = samples * per_sample;
  }
  int64_t sample(int64_t t) const { return t / per_sample; }
  int64_t first_row(int64_t t) const { return t % per_sample * rows; }  // of the sample's
  int64_t end_row(int64_t t) const { return first_row(t) + rows < batch ? first_row(t) + rows : batch; }
};

struct ChainForward {
  const ChainLayer* layers;
  int64_t count, samples, batch;  // batch: of one sample
  bool shared;                    // all samples have the same x
  bool wide;                      // float64
  const void* x;                  // [samples, batch, inputs] or [batch, inputs]
  void* y;                        // [samples, batch, outputs]
  static constexpr int64_t kMostRows = 256;
};

struct ChainBackward {
  const ChainLayer* layers;
  int64_t count, samples, batch;
  bool shared, wide;
  const void* x;
  const void* grad_y;  // [samples, batch, outputs]
  void* grad_x;        // [samples, batch, inputs] or null
  void* partial;       // [tasks, parameters]: each task's part of the gradients of weight and bias, layer after layer
  static constexpr int64_t kMostRows = 1024;
};

}  // namespace bnn_fast
