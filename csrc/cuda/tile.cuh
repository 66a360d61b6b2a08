// What the fused linear kernels share: how a block is divided, and how activations reach shared memory.
//
// A warp draws weights in tiles of 16 outputs x 16 inputs. Lane 4 g + t draws the quads at rows g and g + 8, columns 4 t to
// 4 t + 3 of the tile. With the inputs of a tile numbered so that 4 t + {0, 1} come before all 4 t + {2, 3}, that is the layout
// in which a tensor core's m16n8k16 product takes its left factor and gives its result: a drawn tile is multiplied from
// registers, with no exchange between lanes.
//
// The eight warps of a block form groups of `members` warps. A group shares one tile, for which sigma is computed once;
// each of its warps draws and multiplies it for a sample of its own.
#pragma once

#include <cuda_pipeline.h>

#include <type_traits>

#include "linear.h"
#include "quad.cuh"

namespace bnn_fast {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kSide = 16;                         // of a tile
constexpr int kQuads = kSide * kSide / 4;         // in a tile; quad 32 h + lane is at row 8 h + g, column 4 t
constexpr int kBlocksPerProcessor = 2;            // what registers are limited for

// How an activation of this type lies in memory.
template <Type type> using Stored = std::conditional_t<type == Type::kFloat32, float, uint16_t>;

// A thread's place in a block.
struct Place {
  int members, group, member, lane, g, t;

  explicit __device__ Place(int members)
      : members(members),
        group(threadIdx.x / 32 / members),
        member(threadIdx.x / 32 % members),
        lane(threadIdx.x % 32),
        g(lane / 4),
        t(lane % 4) {}

  // A lane of a group of one reads nothing but what it wrote itself.
  __device__ void sync_group() const {
    if (members > 1) __syncthreads();
  }
};

// A quad of the weights, which moves as one vector if it is inside and all their tensors are aligned.
struct TileQuad {
  int64_t index, first, columns;  // first: its first column; columns: none in a row that is outside
  bool whole;

  // index: that of row and first, which a walk need not multiply out again.
  __device__ TileQuad(const Posterior& p, bool aligned, int64_t row, int64_t first, int64_t index)
      : index(index), first(first), columns(row < p.rows ? p.columns : 0), whole(aligned && first < columns) {}
  __device__ bool inside(int k) const { return first + k >= 0 && first + k < columns; }
};
template <class F> __device__ __forceinline__ bool is_vector(const void*, Type, const TileQuad& q) { return q.whole; }

inline PriorAt<float> prior_of_numbers(const Prior& prior) {
  float scale = static_cast<float>(prior.scale);
  return {static_cast<float>(prior.loc), 1.0f / scale, log_lane(scale)};
}

// Starts to copy a window of activations [samples * batch, width] into shared memory: columns [first, first + kColumns) of all
// rows, batch padded to kBatch for each of `members` samples; zero outside. A tile's row is kStride long.
template <int kBatch, int kColumns, int kStride, class T>
__device__ __forceinline__ void stage(T* tile, const T* from, int64_t width, int64_t first, int members, int64_t samples,
                                      int64_t batch) {
  auto copy = [&](auto step_of, auto move) {
    constexpr int kStep = decltype(step_of)::value;
#pragma unroll 1
    for (int i = threadIdx.x; i < members * kBatch * (kColumns / kStep); i += kThreads) {
      int row = i / (kColumns / kStep), column = i % (kColumns / kStep) * kStep;
      int sample = row / kBatch, b = row % kBatch;
      bool inside = sample < samples && b < batch && first + column >= 0 && first + column < width;
      move(tile + row * kStride + column, inside ? from + (sample * batch + b) * width + first + column : from, inside);
    }
  };
  constexpr int kVector = 16 / sizeof(T);
  if (width % kVector == 0 && first % kVector == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0)
    copy(std::integral_constant<int, kVector>(),
         [](T* to, const T* at, bool inside) { __pipeline_memcpy_async(to, at, 16, inside ? 0 : 16); });
  else
    copy(std::integral_constant<int, 1>(), [](T* to, const T* at, bool inside) { *to = inside ? *at : T(0); });
  __pipeline_commit();
}

// d += a b: 16 x 16 times 16 x 8, in the tensor cores.
template <Type type>
__device__ __forceinline__ void multiply_accumulate(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                                    uint32_t b1) {
  if constexpr (type == Type::kBFloat16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void unpack(float4 v, float (&out)[4]) { out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w; }
__device__ __forceinline__ float4 pack(const float (&v)[4]) { return make_float4(v[0], v[1], v[2], v[3]); }

// The warps of a group for so many samples: a power of two.
inline int members_for(int64_t samples) {
  int members = 1;
  while (members < samples) members *= 2;
  return members;
}

// A walk of `steps` steps for each of `tiles` tiles is cut into parts, so that the blocks, one for each tile and part, keep
// all processors busy: as many as give the busiest place on the device the fewest steps, counting one for a block's start.
struct Cut {
  int parts, steps_per_part;
};

inline cudaError_t cut(int64_t tiles, int steps, Cut& best) {
  int device, processors;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  int64_t places = int64_t(processors) * kBlocksPerProcessor, fewest = INT64_MAX;
  for (int parts = 1; parts <= steps && parts <= 64; ++parts) {
    int per_part = (steps + parts - 1) / parts, used = (steps + per_part - 1) / per_part;
    int64_t busiest = (tiles * used + places - 1) / places * (per_part + 1);
    if (busiest < fewest) fewest = busiest, best = {used, per_part};
  }
  return cudaSuccess;
}

// Calls launch<type, kBatch>() for the type of x and the fewest rows, of those that kernels are made for, that hold a batch.
template <class Launch> cudaError_t with_type_and_batch(Type type, int64_t batch, Launch launch) {
  auto with_batch = [&]<Type x_type>() {
    constexpr int kFew = x_type == Type::kFloat32 ? 4 : 16, kMany = x_type == Type::kFloat32 ? kFusedBatch : kFusedBatchHalf;
    return batch <= kFew ? launch.template operator()<x_type, kFew>() : launch.template operator()<x_type, kMany>();
  };
  return type == Type::kFloat32    ? with_batch.template operator()<Type::kFloat32>()
         : type == Type::kBFloat16 ? with_batch.template operator()<Type::kBFloat16>()
                                   : with_batch.template operator()<Type::kFloat16>();
}

// A block for each tile and part of the plan, with so many bytes of shared memory.
template <class Problem, class Plan>
cudaError_t launch_tiles(void (*kernel)(Problem, Plan), const Problem& problem, const Plan& plan, size_t bytes, cudaStream_t stream) {
  if (plan.tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)))
    return error;
  dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.cut.parts));
  kernel<<<grid, kThreads, bytes, stream>>>(problem, plan);
  return cudaGetLastError();
}

}  // namespace bnn_fast
