// What the kernels of the router share: rows of logits, and what the lanes that hold one do together.
//
// A group of kLanes lanes (a whole warp, or a quarter of one where there are few experts) works on one token. The
// token's logits stay in the group's registers, kPerLane to a lane; groups never meet, so what they find for a token
// depends on nothing but its own logits. Beyond 1024 experts the logits are read again whenever they are needed.
// Scores of every dtype are widened to float32 as they are loaded. The dtype is a run-time value: a branch that all
// threads take alike is cheap here, and a third of the instances compile in a third of the time.
#pragma once

#include "common/rounding.h"
#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/overlap.cuh"
#include "moekernels/params.h"

namespace moekernels {

// ---- scores as integers ----

constexpr uint32_t kNanKey = 0xffffffffu;
constexpr uint32_t kNoKey = 0;  // below every score's key

// Orders floats as integers: NaN above everything, -0 equal to +0.
__device__ __forceinline__ uint32_t key_of(float score) {
  if (score != score) return kNanKey;
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float score_of(uint32_t key) {
  return __uint_as_float(key >> 31 != 0 ? key & 0x7fffffffu : ~key);
}

struct Choice {
  uint32_t key;
  int32_t expert_id;
};

// ---- what the lanes of a group do together ----

template <int kLanes_>
struct Group {
  static constexpr int kLanes = kLanes_;
  static_assert(kWarpSize % kLanes == 0);

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % kLanes); }

  static __device__ __forceinline__ uint32_t mask() {
    if constexpr (kLanes == kWarpSize) {
      return kFullWarp;
    } else {
      return ((1u << kLanes) - 1) << (threadIdx.x % kWarpSize / kLanes * kLanes);
    }
  }

  static __device__ __forceinline__ uint32_t max(uint32_t x) {
    if constexpr (kLanes == kWarpSize) {
      return __reduce_max_sync(kFullWarp, x);
    } else {
      return butterfly(x, [](uint32_t a, uint32_t b) { return a < b ? b : a; });
    }
  }

  static __device__ __forceinline__ uint32_t min(uint32_t x) {
    if constexpr (kLanes == kWarpSize) {
      return __reduce_min_sync(kFullWarp, x);
    } else {
      return butterfly(x, [](uint32_t a, uint32_t b) { return a < b ? a : b; });
    }
  }

  static __device__ __forceinline__ float sum(float x) {
    return butterfly(x, [](float a, float b) { return a + b; });
  }

 private:
  template <class X, class Combine>
  static __device__ __forceinline__ X butterfly(X x, Combine combine) {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      x = combine(x, __shfl_xor_sync(mask(), x, distance));
    }
    return x;
  }
};

// ---- a token's logits ----
// A row gives
//   for_each(body)        calls body(expert, logit) for each expert of this lane, in ascending order
//   for_each_place(body)  the same with body(place, expert, logit): places count the lane's experts
//   store(base, token, value_at)  writes value_at(expert, logit), in the dtype of the logits, to row `token` of the
//                         contiguous [T, E] at `base`
//   keys(key_at)          from which pick() takes the experts by descending key_at(expert, logit), each once, and
//                         is_picked(place, expert, logit) says what it took. Experts whose key is kNoKey are never
//                         picked.

struct Logits {
  const void* data;  // [T, E]
  int64_t stride;
  int32_t num_experts;
  DType dtype;
};

template <class Params>
__device__ __forceinline__ Logits logits_of(const Params& params) {
  return {params.logits, params.logits_stride, params.num_experts, params.logits_dtype};
}

// In registers. Lane l holds kVec neighbours out of every kLanes * kVec experts, and loads them together.
template <int kLanes, int kPerLane>
class RegisterRow {
 public:
  using Lanes = Group<kLanes>;

  static constexpr int kPlaces = kPerLane;

  __device__ __forceinline__ RegisterRow(const Logits& logits, int64_t token)
      : num_experts_(logits.num_experts), dtype_(logits.dtype) {
    switch (logits.dtype) {
      case DType::kFloat32:
        load<float>(logits, token);
        break;
      case DType::kBFloat16:
        load<__nv_bfloat16>(logits, token);
        break;
      case DType::kFloat16:
        load<__half>(logits, token);
        break;
    }
  }

  template <class Body>
  __device__ __forceinline__ void for_each_place(Body body) const {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (expert(i) < num_experts_) body(i, expert(i), logits_[i]);
    }
  }

  template <class Body>
  __device__ __forceinline__ void for_each(Body body) const {
    for_each_place([&](int, int expert, float logit) { body(expert, logit); });
  }

  template <class ValueAt>
  __device__ __forceinline__ void store(void* base, int64_t token, ValueAt value_at) const {
    switch (dtype_) {
      case DType::kFloat32:
        return store_as<float>(base, token, value_at);
      case DType::kBFloat16:
        return store_as<__nv_bfloat16>(base, token, value_at);
      case DType::kFloat16:
        return store_as<__half>(base, token, value_at);
    }
  }

  // The expert at a place of this lane; it may be past the last one.
  static __device__ __forceinline__ int expert(int i) { return (i / kVec * kLanes + Lanes::lane()) * kVec + i % kVec; }

  template <class KeyAt>
  __device__ __forceinline__ auto keys(KeyAt key_at) const {
    Keys keys;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      keys.values[i] = expert(i) < num_experts_ ? key_at(expert(i), logits_[i]) : kNoKey;
    }
    return keys;
  }

 private:
  static constexpr int kVec = kPerLane < 4 ? kPerLane : 4;
  static_assert(kPerLane % kVec == 0);

  template <class T>
  struct alignas(kVec * sizeof(T)) Vec {
    T values[kVec];
  };

  template <class T>
  __device__ __forceinline__ bool vectorized(const void* rows, int64_t stride) const {
    return num_experts_ % kVec == 0 && stride % kVec == 0 && reinterpret_cast<uintptr_t>(rows) % sizeof(Vec<T>) == 0;
  }

  template <class T>
  __device__ __forceinline__ void load(const Logits& logits, int64_t token) {
    const T* row = static_cast<const T*>(logits.data) + token * logits.stride;
    const bool whole = vectorized<T>(logits.data, logits.stride);
#pragma unroll
    for (int i = 0; i < kPerLane; i += kVec) {
      Vec<T> vec{};
      if (whole) {
        if (expert(i) < num_experts_) vec = *reinterpret_cast<const Vec<T>*>(row + expert(i));
      } else {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          if (expert(i + j) < num_experts_) vec.values[j] = row[expert(i + j)];
        }
      }
#pragma unroll
      for (int j = 0; j < kVec; ++j) logits_[i + j] = to_float(vec.values[j]);
    }
  }

  template <class T, class ValueAt>
  __device__ __forceinline__ void store_as(void* base, int64_t token, ValueAt value_at) const {
    T* row = static_cast<T*>(base) + token * num_experts_;
    const bool whole = vectorized<T>(base, num_experts_);
#pragma unroll
    for (int i = 0; i < kPerLane; i += kVec) {
      Vec<T> vec{};
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        if (expert(i + j) < num_experts_) vec.values[j] = from_float<T>(value_at(expert(i + j), logits_[i + j]));
      }
      if (whole) {
        if (expert(i) < num_experts_) *reinterpret_cast<Vec<T>*>(row + expert(i)) = vec;
      } else {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          if (expert(i + j) < num_experts_) row[expert(i + j)] = vec.values[j];
        }
      }
    }
  }

  struct Keys {
    __device__ __forceinline__ Choice pick() {
      uint32_t best = kNoKey;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) best = values[i] > best ? values[i] : best;
      best = Lanes::max(best);
      uint32_t chosen = ~0u;
#pragma unroll
      for (int i = kPerLane - 1; i >= 0; --i) {
        if (values[i] == best) chosen = static_cast<uint32_t>(expert(i));
      }
      chosen = Lanes::min(chosen);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (static_cast<uint32_t>(expert(i)) == chosen) values[i] = kNoKey;
      }
      return {best, static_cast<int32_t>(chosen)};
    }

    __device__ __forceinline__ bool is_picked(int place, int, float) const { return values[place] == kNoKey; }

    uint32_t values[kPerLane];
  };

  int num_experts_;
  DType dtype_;
  float logits_[kPerLane];
};

// In global memory, for any number of experts.
class StreamedRow {
 public:
  using Lanes = Group<kWarpSize>;

  __device__ __forceinline__ StreamedRow(const Logits& logits, int64_t token)
      : logits_(logits), first_(token * logits.stride) {}

  template <class Body>
  __device__ __forceinline__ void for_each_place(Body body) const {
    int place = 0;
#pragma unroll 1
    for (int64_t e = Lanes::lane(); e < logits_.num_experts; e += kWarpSize) {
      body(place++, static_cast<int>(e), logit(e));
    }
  }

  template <class Body>
  __device__ __forceinline__ void for_each(Body body) const {
    for_each_place([&](int, int expert, float logit) { body(expert, logit); });
  }

  template <class ValueAt>
  __device__ __forceinline__ void store(void* base, int64_t token, ValueAt value_at) const {
    const int64_t first = token * logits_.num_experts;
    for_each([&](int expert, float logit) {
      const float value = value_at(expert, logit);
      switch (logits_.dtype) {
        case DType::kFloat32:
          static_cast<float*>(base)[first + expert] = value;
          break;
        case DType::kBFloat16:
          static_cast<__nv_bfloat16*>(base)[first + expert] = from_float<__nv_bfloat16>(value);
          break;
        case DType::kFloat16:
          static_cast<__half*>(base)[first + expert] = from_float<__half>(value);
          break;
      }
    });
  }

  template <class KeyAt>
  __device__ __forceinline__ auto keys(KeyAt key_at) const {
    return Keys<KeyAt>{*this, key_at, {kNanKey, -1}};
  }

 private:
  // Remembers the last choice instead of all of them: what follows has a lower key, or the same and a higher index.
  template <class KeyAt>
  struct Keys {
    __device__ __forceinline__ Choice pick() {
      uint32_t best = kNoKey;
      int32_t best_expert = -1;
      row.for_each([&](int expert, float logit) {
        const uint32_t key = key_at(expert, logit);
        if (follows(key, expert) && key > best) {
          best = key;
          best_expert = expert;
        }
      });
      const uint32_t key = Lanes::max(best);
      last = {key, static_cast<int32_t>(Lanes::min(best == key ? static_cast<uint32_t>(best_expert) : ~0u))};
      return last;
    }

    __device__ __forceinline__ bool is_picked(int, int expert, float logit) const {
      return !follows(key_at(expert, logit), expert);
    }

    __device__ __forceinline__ bool follows(uint32_t key, int expert) const {
      return key < last.key || (key == last.key && expert > last.expert_id);
    }

    const StreamedRow& row;
    KeyAt key_at;
    Choice last;
  };

  __device__ __forceinline__ float logit(int64_t e) const {
    switch (logits_.dtype) {
      case DType::kBFloat16:
        return to_float(static_cast<const __nv_bfloat16*>(logits_.data)[first_ + e]);
      case DType::kFloat16:
        return to_float(static_cast<const __half*>(logits_.data)[first_ + e]);
      case DType::kFloat32:
        break;
    }
    return static_cast<const float*>(logits_.data)[first_ + e];
  }

  Logits logits_;
  int64_t first_;
};

// The expert of the largest key, the lowest on ties: what keys(key_at).pick() gives first, without the keys.
template <class Row, class KeyAt>
__device__ __forceinline__ Choice pick_largest(const Row& row, KeyAt key_at) {
  uint32_t best = kNoKey;
  uint32_t chosen = ~0u;
  row.for_each([&](int expert, float logit) {
    const uint32_t key = key_at(expert, logit);
    if (key > best) {
      best = key;
      chosen = static_cast<uint32_t>(expert);
    }
  });
  const uint32_t key = Row::Lanes::max(best);
  return {key, static_cast<int32_t>(Row::Lanes::min(best == key ? chosen : ~0u))};
}

// ---- launching ----

template <class Row_>
struct RouterTraits {
  using Row = Row_;
  static constexpr int kThreads = 128;
  static constexpr int kTokensPerBlock = kThreads / Row::Lanes::kLanes;
};

// The token of this thread's group; may be past the last.
template <class Traits>
__device__ __forceinline__ int64_t token_of_group() {
  return static_cast<int64_t>(blockIdx.x) * Traits::kTokensPerBlock + threadIdx.x / Traits::Row::Lanes::kLanes;
}

// A group for every token.
template <class Traits, auto kKernel, class Params>
cudaError_t launch_tokens(const Params& params, int64_t num_tokens, cudaStream_t stream) {
  const int64_t blocks = ceil_div(num_tokens, Traits::kTokensPerBlock);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(Traits::kThreads), 0, stream};
  config.overlap_previous = can_overlap_previous<kKernel>();
  return launch<kKernel>(config, params);
}

// dispatch_row(params.num_experts, [&](auto tag) { using Row = typename decltype(tag)::Type; ... });
template <class Body>
cudaError_t dispatch_row(int32_t num_experts, Body&& body) {
  if (num_experts <= 16) return body(TypeTag<RegisterRow<8, 2>>{});
  if (num_experts <= 64) return body(TypeTag<RegisterRow<32, 2>>{});
  if (num_experts <= 128) return body(TypeTag<RegisterRow<32, 4>>{});
  if (num_experts <= 256) return body(TypeTag<RegisterRow<32, 8>>{});
  if (num_experts <= 512) return body(TypeTag<RegisterRow<32, 16>>{});
  if (num_experts <= 1024) return body(TypeTag<RegisterRow<32, 32>>{});
  return body(TypeTag<StreamedRow>{});
}

}  // namespace moekernels
