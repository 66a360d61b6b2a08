// Four columns of one row, those of one Philox counter: the unit that the CUDA kernels work on, one to a thread at a time.
// What is stored as float32, bfloat16 or float16 is computed in float, float64 in double.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <initializer_list>

#include "../divergence.h"
#include "../normal.h"
#include "../problem.h"

namespace bnn_fast {

constexpr unsigned kAllLanes = 0xffffffffu;

// A quad of a contiguous [rows, columns] tensor: the flat index of its first column, and which of the four are inside.
struct Quad {
  int64_t index;
  unsigned mask;

  // first: the column of its first element, which may be negative.
  __device__ Quad(int64_t rows, int64_t columns, int64_t row, int64_t first) : index(row * columns + first) {
    int begin = first < 0 ? static_cast<int>(-first) : 0;
    int end = row >= rows || first >= columns ? 0 : columns - first < 4 ? static_cast<int>(columns - first) : 4;
    mask = (15u << begin) & ((1u << end) - 1);
  }
  __device__ bool inside(int k) const { return mask >> k & 1; }
  __device__ bool full() const { return mask == 15; }
};

// A quad that is known to be full and aligned in every tensor.
struct WholeQuad {
  int64_t index;

  __device__ static constexpr bool inside(int) { return true; }
};

// How a number is stored that is computed in F, where nothing smaller is asked for.
template <class F> constexpr Type kTypeOf = sizeof(F) == 8 ? Type::kFloat64 : Type::kFloat32;

template <class F> __device__ __forceinline__ F load_element(const void* data, Type type, int64_t i) {
  if constexpr (sizeof(F) == 8) return static_cast<const double*>(data)[i];
  if (type == Type::kFloat32) return static_cast<const float*>(data)[i];
  if (type == Type::kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  return __half2float(static_cast<const __half*>(data)[i]);
}

template <class F> __device__ __forceinline__ void store_element(void* data, Type type, int64_t i, F value) {
  if constexpr (sizeof(F) == 8) {
    static_cast<double*>(data)[i] = value;
  } else if (type == Type::kFloat32) {
    static_cast<float*>(data)[i] = value;
  } else if (type == Type::kBFloat16) {
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(value);
  } else {
    static_cast<__half*>(data)[i] = __float2half_rn(value);
  }
}

// Whether a quad's elements can be moved as one vector.
template <class F> __device__ __forceinline__ bool is_vector(const void* data, Type type, const Quad& q) {
  unsigned size = sizeof(F) == 8 ? 8 : type == Type::kFloat32 ? 4 : 2;
  return q.full() && (reinterpret_cast<uintptr_t>(data) + q.index * size) % (size == 2 ? 8 : 16) == 0;
}
template <class F> __device__ __forceinline__ bool is_vector(const void*, Type, const WholeQuad&) { return true; }

// The elements of a quad; `outside` where there is none.
template <class F, class AnyQuad>
__device__ __forceinline__ void load_quad(const void* data, Type type, const AnyQuad& q, F outside, F (&out)[4]) {
  if (!is_vector<F>(data, type, q)) {
    BNN_UNROLL
    for (int k = 0; k < 4; ++k) out[k] = q.inside(k) ? load_element<F>(data, type, q.index + k) : outside;
  } else if constexpr (sizeof(F) == 8) {
    auto from = reinterpret_cast<const double2*>(static_cast<const double*>(data) + q.index);
    double2 low = from[0], high = from[1];
    out[0] = low.x, out[1] = low.y, out[2] = high.x, out[3] = high.y;
  } else if (type == Type::kFloat32) {
    float4 v = *reinterpret_cast<const float4*>(static_cast<const float*>(data) + q.index);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
  } else {
    uint2 pair = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(data) + q.index);
    if (type == Type::kBFloat16) {
      out[0] = __uint_as_float(pair.x << 16), out[1] = __uint_as_float(pair.x & 0xffff0000u);
      out[2] = __uint_as_float(pair.y << 16), out[3] = __uint_as_float(pair.y & 0xffff0000u);
    } else {
      float2 low = __half22float2(bit_cast<__half2>(pair.x)), high = __half22float2(bit_cast<__half2>(pair.y));
      out[0] = low.x, out[1] = low.y, out[2] = high.x, out[3] = high.y;
    }
  }
}

// Two values rounded to a 16-bit type, the first in the low half.
__device__ __forceinline__ uint32_t pack_halves(Type type, float low, float high) {
  return type == Type::kBFloat16 ? bit_cast<uint32_t>(__floats2bfloat162_rn(low, high))
                                 : bit_cast<uint32_t>(__floats2half2_rn(low, high));
}

template <class F, class AnyQuad>
__device__ __forceinline__ void store_quad(void* data, Type type, const AnyQuad& q, const F (&value)[4]) {
  if (!is_vector<F>(data, type, q)) {
    BNN_UNROLL
    for (int k = 0; k < 4; ++k)
      if (q.inside(k)) store_element<F>(data, type, q.index + k, value[k]);
  } else if constexpr (sizeof(F) == 8) {
    auto to = reinterpret_cast<double2*>(static_cast<double*>(data) + q.index);
    to[0] = make_double2(value[0], value[1]);
    to[1] = make_double2(value[2], value[3]);
  } else if (type == Type::kFloat32) {
    // An ordinary store may be taken apart again by the compiler.
    __stwb(reinterpret_cast<float4*>(static_cast<float*>(data) + q.index), make_float4(value[0], value[1], value[2], value[3]));
  } else {
    __stwb(reinterpret_cast<uint2*>(static_cast<uint16_t*>(data) + q.index),
           make_uint2(pack_halves(type, value[0], value[1]), pack_halves(type, value[2], value[3])));
  }
}

// Calls body with the prior of each of a quad's four elements, as a function of k. The common prior, made of two numbers, takes
// no loads and no registers for each element.
template <class F, class AnyQuad, class Body>
__device__ __forceinline__ void with_prior(const Prior& prior, const PriorAt<F>& number, Type type, const AnyQuad& q, Body body) {
  if (!prior.loc_tensor && !prior.scale_tensor) {
    body([&](int) { return number; });
  } else {
    F loc[4], scale[4];
    BNN_UNROLL
    for (int k = 0; k < 4; ++k) loc[k] = static_cast<F>(prior.loc), scale[k] = static_cast<F>(prior.scale);
    if (prior.loc_tensor) load_quad<F>(prior.loc_tensor, type, q, F(0), loc);
    if (prior.scale_tensor) load_quad<F>(prior.scale_tensor, type, q, F(1), scale);
    body([&](int k) { return PriorAt<F>{loc[k], quotient(F(1), scale[k]), log_lane(scale[k])}; });
  }
}
template <class F, class Body>
__device__ __forceinline__ void with_prior(const Prior& prior, Type type, const Quad& q, Body body) {
  F scale = static_cast<F>(prior.scale);
  with_prior<F>(prior, PriorAt<F>{static_cast<F>(prior.loc), quotient(F(1), scale), log_lane(scale)}, type, q, body);
}

// Calls body.template operator()<scale>() for the scale given at run time.
template <class Body> __device__ __forceinline__ void with_scale(int scale, Body body) {
  if (scale == kSoftplus)
    body.template operator()<kSoftplus>();
  else if (scale == kExp)
    body.template operator()<kExp>();
  else if (scale == kSqrtExp)
    body.template operator()<kSqrtExp>();
  else if (scale == kSquare)
    body.template operator()<kSquare>();
  else
    body.template operator()<kIdentity>();
}

// The analytic KL of a quad, in one sum. One logarithm does for its four sigmas: log of their product. Pruned elements, and those
// outside (their rho is -inf), add nothing; like other small sigmas (split_log) they take a longer way.
template <int scale, class F, class PriorOf>
__device__ __forceinline__ F quad_kl(const F (&mu)[4], const F (&rho)[4], const Spread<F> (&spreads)[4], PriorOf prior) {
  if (scale == kSoftplus && !(in_tail(rho[0]) || in_tail(rho[1]) || in_tail(rho[2]) || in_tail(rho[3]))) {
    F squares = -4, log_scales = prior(0).log_scale, product = spreads[0].sigma;
    BNN_UNROLL
    for (int k = 0; k < 4; ++k) {
      squares = add_squares(mu[k], spreads[k].sigma, prior(k), squares);
      if (k > 0) log_scales += prior(k).log_scale;
      if (k > 0) product *= spreads[k].sigma;
    }
    return fma_lane(squares, F(0.5), log_scales - log_lane(product));
  }
  F sum = 0, product = 1;
  BNN_UNROLL
  for (int k = 0; k < 4; ++k) {
    LogSigma<F> log_sigma = split_log<scale>(rho[k], spreads[k]);
    product *= log_sigma.factor;
    sum += select(is_pruned(rho[k]), F(0), kl_analytic(mu[k], spreads[k].sigma, log_sigma.term, prior(k)));
  }
  return scale == kSoftplus ? sum - log_lane(product) : sum;
}

// The noise of a posterior's quads: normals of its key, or the products of its factors.
struct QuadNoise {
  const Posterior& p;
  Noise<PhiloxKey> noise;
  uint32_t first_sample, first_row, first_counter;

  explicit __device__ QuadNoise(const Posterior& p)
      : p(p),
        noise{{0, 0}, p.stream},
        first_sample(0),
        first_row(static_cast<uint32_t>(p.row_offset)),
        first_counter(static_cast<uint32_t>(p.column_offset >> 2)) {
    if (!p.key) return;  // a divergence alone draws nothing
    noise.keys.k0 = static_cast<uint32_t>(p.key[0]);
    noise.keys.k1 = static_cast<uint32_t>(static_cast<uint64_t>(p.key[0]) >> 32);
    first_sample = static_cast<uint32_t>(p.key[1]);
  }

  // counter: the quad's place in its row, counted from the one that holds column 0.
  template <class F> __device__ void draw(int64_t sample, int64_t row, int64_t counter, F (&eps)[4]) const {
    if (p.column_factors)
      multiply(row, counter, eps);
    else
      normals(sample, row, counter, eps);
  }

  // The same where there are no factors.
  template <class F> __device__ void normals(int64_t sample, int64_t row, int64_t counter, F (&eps)[4]) const {
    const uint32_t rows[] = {first_row + static_cast<uint32_t>(row)};
    const uint32_t columns[] = {first_counter + static_cast<uint32_t>(counter)};
    F normal[1][4];
    draw_normals<F>(noise, first_sample + static_cast<uint32_t>(sample), rows, columns, normal);
    for (int i = 0; i < 4; ++i) eps[i] = normal[0][i];
  }

 private:
  template <class F> __device__ void multiply(int64_t row, int64_t counter, F (&eps)[4]) const {
    Quad columns(1, p.columns, 0, counter * 4 - (p.column_offset & 3));
    load_quad<F>(p.column_factors, kTypeOf<F>, columns, F(0), eps);
    F factor = p.row_factors && row < p.rows ? static_cast<const F*>(p.row_factors)[row] : F(1);
    for (int i = 0; i < 4; ++i) eps[i] *= factor;
  }
};

// Quads in a row: the first begins column_offset % 4 columns before column 0.
__host__ __device__ inline int64_t quads_in_row(const Posterior& p) { return ((p.column_offset & 3) + p.columns + 3) / 4; }

__device__ __forceinline__ Quad quad_at(const Posterior& p, int64_t row, int64_t counter) {
  return Quad(p.rows, p.columns, row, counter * 4 - (p.column_offset & 3));
}

// The KL of the quad at a row and counter: the analytic one, or the sum of the sampled one over every step-th sample from `first` on.
template <class F>
__device__ double quad_divergence(const Posterior& p, int divergence, int64_t row, int64_t counter, int64_t first, int64_t samples,
                                  int64_t step) {
  Quad quad = quad_at(p, row, counter);
  F mu[4], rho[4];
  load_quad<F>(p.mu, p.type, quad, F(0), mu);
  load_quad<F>(p.rho, p.type, quad, F(-INFINITY), rho);
  PriorAt<F> prior[4];
  with_prior<F>(p.prior, p.type, quad, [&](auto prior_of) {
    BNN_UNROLL
    for (int k = 0; k < 4; ++k) prior[k] = prior_of(k);
  });
  double sum = 0;
  Spread<F> spreads[4];
  with_scale(p.scale, [&]<int scale>() {
    BNN_UNROLL
    for (int k = 0; k < 4; ++k) spreads[k] = spread<scale>(rho[k]);
    if (divergence == kAnalytic) sum = quad_kl<scale>(mu, rho, spreads, [&](int k) { return prior[k]; });
  });
  QuadNoise noise(p);
  for (int64_t s = first; divergence == kSampled && s < samples; s += step) {
    F eps[4];
    noise.normals<F>(s, row, counter, eps);
    BNN_UNROLL
    for (int k = 0; k < 4; ++k) {
      F w = fma_lane(spreads[k].sigma, eps[k], mu[k]);
      sum += select(is_pruned(rho[k]), F(0), kl_sampled(w, eps[k], spreads[k].log_sigma, prior[k]));
    }
  }
  return sum;
}

// Whether every quad is either whole or outside, for tensors like the weights at these addresses.
inline bool all_aligned(const Posterior& p, std::initializer_list<const void*> tensors) {
  bool aligned = p.columns % 4 == 0 && p.column_offset % 4 == 0;
  for (const void* tensor : tensors) aligned = aligned && reinterpret_cast<uintptr_t>(tensor) % 16 == 0;
  return aligned;
}

// The sum over a block of at most 1024 threads, in a fixed order, for thread 0. Every thread must call it.
template <class F> __device__ __forceinline__ F block_sum(F value) {
  __shared__ F warps[32];
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(kAllLanes, value, step);
  __syncthreads();  // a block may sum more than once
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  F sum = 0;
  if (threadIdx.x == 0)
    for (unsigned warp = 0; warp < (blockDim.x + 31) / 32; ++warp) sum += warps[warp];
  return sum;
}

}  // namespace bnn_fast
