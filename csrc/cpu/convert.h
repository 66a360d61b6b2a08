// Between the types tensors are stored in and the type that is computed in (float, or double for double).
#pragma once

#include "../lane.h"
#include "../problem.h"

BNN_FAST_BEGIN

template <class S> constexpr Type type_of() { return sizeof(S) == 8 ? Type::kFloat64 : Type::kFloat32; }

BNN_FN float from_bfloat16(uint16_t h) { return bit_cast<float>(static_cast<uint32_t>(h) << 16); }

BNN_FN uint16_t to_bfloat16(float x) {
  uint32_t bits = bit_cast<uint32_t>(x);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

BNN_FN float from_float16(uint16_t h) {
  // The exponent is moved by a multiplication, which also makes denormals right; inf and NaN get theirs set.
  float magnitude = bit_cast<float>(static_cast<uint32_t>(h & 0x7fffu) << 13) * 0x1p112f;
  uint32_t bits = bit_cast<uint32_t>(magnitude);
  if (magnitude >= 65536.0f) bits |= 0x7f800000u;
  return bit_cast<float>(bits | static_cast<uint32_t>(h & 0x8000u) << 16);
}

BNN_FN uint16_t to_float16(float x) {
  uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (bits >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to inf
  } else if (bits < 0x38800000u) {
    half = bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f) - 0x3f000000u;  // denormal: the sum rounds at 2^-24
  } else {
    half = (bits + 0xc8000fffu + ((bits >> 13) & 1u)) >> 13;  // to nearest, ties to even
  }
  return static_cast<uint16_t>(sign | half);
}

template <class S> inline void convert_from(const void* data, Type type, int64_t offset, int64_t n, S* to) {
  const auto* half = static_cast<const uint16_t*>(data) + offset;
  switch (type) {
    case Type::kFloat32:
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<S>((static_cast<const float*>(data) + offset)[i]);
      break;
    case Type::kFloat64:
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<S>((static_cast<const double*>(data) + offset)[i]);
      break;
    case Type::kBFloat16:
      for (int64_t i = 0; i < n; ++i) to[i] = from_bfloat16(half[i]);
      break;
    case Type::kFloat16:
      for (int64_t i = 0; i < n; ++i) to[i] = from_float16(half[i]);
  }
}

template <class S> inline void convert_to(const S* from, int64_t n, void* data, Type type, int64_t offset) {
  auto* half = static_cast<uint16_t*>(data) + offset;
  switch (type) {
    case Type::kFloat32:
      for (int64_t i = 0; i < n; ++i) (static_cast<float*>(data) + offset)[i] = static_cast<float>(from[i]);
      break;
    case Type::kFloat64:
      for (int64_t i = 0; i < n; ++i) (static_cast<double*>(data) + offset)[i] = from[i];
      break;
    case Type::kBFloat16:
      for (int64_t i = 0; i < n; ++i) half[i] = to_bfloat16(static_cast<float>(from[i]));
      break;
    case Type::kFloat16:
      for (int64_t i = 0; i < n; ++i) half[i] = to_float16(static_cast<float>(from[i]));
  }
}

BNN_FAST_END
