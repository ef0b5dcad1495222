// logits [T, E] -> weights [T, K], expert_ids [T, K]
//
// A group of kLanes lanes (a whole warp, or a quarter of one where there are few experts) routes one token. The token's
// logits stay in the group's registers, kPerLane to a lane; groups never meet, so a token's result depends on nothing
// but its own logits. Beyond 1024 experts the logits are read again for every choice instead.
//
//   keys    Every score becomes a 32-bit integer that orders as the definition orders scores (see key_of).
//   pick    The largest key of the group, then the lowest expert that has it: two reductions of 32 bits, which a warp
//           does in one instruction each. Nothing of the score is given up to make room for the index, and the key of
//           the chosen expert turns back into its score, so that nobody has to ask the lane that holds it.
//   write   Lane k of the group computes and writes choice k.
//
// Scores of every dtype are widened to float32 as they are loaded. The dtypes and the rule are run-time values: a
// branch that all threads take alike is cheap here, and a third of the instances compile in a third of the time. The
// rules are those of ops/reference.py.
#include "dtype.cuh"
#include "launch.cuh"
#include "moekernels/cuda.h"
#include "overlap.cuh"

namespace moekernels {
namespace {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;

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

// ---- rounding ----

// By selection, not by branches: it stands in unrolled loops.
__device__ __forceinline__ float round_to(DType dtype, float x) {
  const float bf16 = to_float(from_float<__nv_bfloat16>(x));
  const float fp16 = to_float(from_float<__half>(x));
  return dtype == DType::kFloat32 ? x : dtype == DType::kBFloat16 ? bf16 : fp16;
}

// The unit in the last place of 1.
__device__ __forceinline__ float epsilon_of(DType dtype) {
  return dtype == DType::kBFloat16 ? 0x1p-7f : dtype == DType::kFloat16 ? 0x1p-10f : 0x1p-23f;
}

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
// A row gives: for_each(body), which calls body(expert, logit) for each expert of this lane, in ascending order; and
// keys(key_at), from which pick() takes the experts by descending key_at(expert, logit), each once. Experts whose key
// is kNoKey are never picked.

// In registers. Lane l holds kVec neighbours out of every kLanes * kVec experts, and loads them together.
template <int kLanes, int kPerLane>
class RegisterRow {
 public:
  using Lanes = Group<kLanes>;

  __device__ __forceinline__ RegisterRow(const RouteParams& params, int64_t token) : num_experts_(params.num_experts) {
    switch (params.logits_dtype) {
      case DType::kFloat32:
        load<float>(params, token);
        break;
      case DType::kBFloat16:
        load<__nv_bfloat16>(params, token);
        break;
      case DType::kFloat16:
        load<__half>(params, token);
        break;
    }
  }

  template <class Body>
  __device__ __forceinline__ void for_each(Body body) const {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (expert(i) < num_experts_) body(expert(i), logits_[i]);
    }
  }

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
  __device__ __forceinline__ void load(const RouteParams& params, int64_t token) {
    struct alignas(kVec * sizeof(T)) Vec {
      T values[kVec];
    };
    const T* row = static_cast<const T*>(params.logits) + token * params.logits_stride;
    const bool vectorized = num_experts_ % kVec == 0 && params.logits_stride % kVec == 0 &&
                            reinterpret_cast<uintptr_t>(params.logits) % sizeof(Vec) == 0;
#pragma unroll
    for (int i = 0; i < kPerLane; i += kVec) {
      Vec vec{};
      if (vectorized) {
        if (expert(i) < num_experts_) vec = *reinterpret_cast<const Vec*>(row + expert(i));
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

    uint32_t values[kPerLane];
  };

  static __device__ __forceinline__ int expert(int i) { return (i / kVec * kLanes + Lanes::lane()) * kVec + i % kVec; }

  int num_experts_;
  float logits_[kPerLane];
};

// In global memory, for any number of experts.
class StreamedRow {
 public:
  using Lanes = Group<kWarpSize>;

  __device__ __forceinline__ StreamedRow(const RouteParams& params, int64_t token)
      : params_(params), first_(token * params.logits_stride) {}

  template <class Body>
  __device__ __forceinline__ void for_each(Body body) const {
#pragma unroll 1
    for (int64_t e = Lanes::lane(); e < params_.num_experts; e += kWarpSize) body(static_cast<int>(e), logit(e));
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
        const bool follows = key < last.key || (key == last.key && expert > last.expert_id);
        if (follows && key > best) {
          best = key;
          best_expert = expert;
        }
      });
      const uint32_t key = Lanes::max(best);
      last = {key, static_cast<int32_t>(Lanes::min(best == key ? static_cast<uint32_t>(best_expert) : ~0u))};
      return last;
    }

    const StreamedRow& row;
    KeyAt key_at;
    Choice last;
  };

  __device__ __forceinline__ float logit(int64_t e) const {
    switch (params_.logits_dtype) {
      case DType::kBFloat16:
        return to_float(static_cast<const __nv_bfloat16*>(params_.logits)[first_ + e]);
      case DType::kFloat16:
        return to_float(static_cast<const __half*>(params_.logits)[first_ + e]);
      case DType::kFloat32:
        break;
    }
    return static_cast<const float*>(params_.logits)[first_ + e];
  }

  const RouteParams& params_;
  int64_t first_;
};

// ---- the rules ----

// Where a token's choices go: choice k through lane k % kLanes.
template <class Lanes>
class Output {
 public:
  __device__ __forceinline__ Output(const RouteParams& params, int64_t token)
      : weights_(params.weights + token * params.top_k),
        expert_ids_(params.expert_ids + token * params.top_k),
        top_k_(params.top_k) {}

  __device__ __forceinline__ void put(int k, float weight, int32_t expert_id) {
    if (Lanes::lane() != k % Lanes::kLanes) return;
    weights_[k] = weight;
    expert_ids_[k] = expert_id;
    last_ = weight;
    sum_ += weight;
  }

  // Divides all weights by their sum, or by `smallest` if that is more.
  __device__ __forceinline__ void renormalize(float smallest) {
    const float sum = Lanes::sum(sum_);
    const float divisor = sum < smallest ? smallest : sum;
#pragma unroll 1
    for (int k = Lanes::lane(); k < top_k_; k += Lanes::kLanes) {
      weights_[k] = (top_k_ <= Lanes::kLanes ? last_ : weights_[k]) / divisor;
    }
  }

  __device__ __forceinline__ void put_unrouted() {
#pragma unroll 1
    for (int k = Lanes::lane(); k < top_k_; k += Lanes::kLanes) put(k, 0.0f, -1);
  }

 private:
  float* weights_;
  int32_t* expert_ids_;
  int top_k_;
  float last_ = 0.0f;  // this lane's newest weight
  float sum_ = 0.0f;   // of this lane's weights
};

// Probabilities over a row, rounded to `dtype`. A NaN anywhere, a +inf, or nothing but -inf makes all of them NaN.
struct Softmax {
  float maximum;
  float sum;
  float reciprocal;  // of the sum
  DType dtype;

  template <class Row>
  __device__ __forceinline__ Softmax(const Row& row, DType dtype_) : dtype(dtype_) {
    uint32_t best = kNoKey;
    row.for_each([&](int, float logit) {
      const uint32_t key = key_of(logit);
      best = key > best ? key : best;
    });
    maximum = score_of(Row::Lanes::max(best));
    float part = 0.0f;
    row.for_each([&](int, float logit) { part += expf(logit - maximum); });
    sum = Row::Lanes::sum(part);
    reciprocal = 1.0f / sum;
  }

  __device__ __forceinline__ float operator()(float logit) const {
    // exp / sum, rounded correctly like a division but without its branch: the sum is at least 1 (or NaN), so that no
    // step overflows.
    const float numerator = expf(logit - maximum);
    const float quotient = numerator * reciprocal;
    return round_to(dtype, fmaf(fmaf(-quotient, sum, numerator), reciprocal, quotient));
  }
};

template <class Row>
__device__ __forceinline__ void softmax_top_k(const RouteParams& params, const Row& row,
                                              Output<typename Row::Lanes>& out) {
  using Lanes = typename Row::Lanes;
  const Softmax probability(row, params.probs_dtype);
  // Float32 probabilities have the order of the logits, except that their rounding can make ties.
  const bool by_logit = params.probs_dtype == DType::kFloat32;
  auto keys = row.keys([&](int, float logit) { return by_logit ? key_of(logit) : key_of(probability(logit)); });
#pragma unroll 1
  for (int first = 0; first < params.top_k; first += Lanes::kLanes) {
    const int count = params.top_k - first < Lanes::kLanes ? params.top_k - first : Lanes::kLanes;
    Choice mine{};
#pragma unroll 1
    for (int k = 0; k < count; ++k) {
      const Choice choice = keys.pick();
      if (Lanes::lane() == k) mine = choice;
    }
    if (Lanes::lane() < count) {
      const float score = score_of(mine.key);
      out.put(first + Lanes::lane(), by_logit ? probability(score) : score, mine.expert_id);
    }
  }
}

template <class Row>
__device__ __forceinline__ void top2_gate(const RouteParams& params, int64_t token, const Row& row,
                                          Output<typename Row::Lanes>& out) {
  const Softmax probability(row, params.probs_dtype);
  auto by_probability = row.keys([&](int, float logit) { return key_of(probability(logit)); });
  const Choice first = by_probability.pick();
  out.put(0, score_of(first.key), first.expert_id);
  // The first expert is removed rather than given a low score, which a row of -inf would not notice.
  const float* noise = params.noise == nullptr ? nullptr : params.noise + token * params.num_experts;
  auto by_logit = row.keys([&](int expert, float logit) {
    return expert == first.expert_id ? kNoKey : key_of(noise == nullptr ? logit : logit + noise[expert]);
  });
  const int32_t second = by_logit.pick().expert_id;
  uint32_t found = kNoKey;
  row.for_each([&](int expert, float logit) {
    if (expert == second) found = key_of(probability(logit));
  });
  out.put(1, score_of(Row::Lanes::max(found)), second);
}

// The weight of the chosen expert, which has the largest candidate: a softmax over the candidates that lie within the
// threshold of it. Each operation is rounded to the dtype of the logits, as PyTorch rounds it.
template <class Row, class CandidateAt>
__device__ __forceinline__ float weight_among_near_ties(const RouteParams& params, const Row& row, float maximum,
                                                        CandidateAt candidate_at) {
  const auto round = [&](float x) { return round_to(params.logits_dtype, x); };
  const float threshold = round(2.0f * params.epsilon);
  float part = 0.0f;
  row.for_each([&](int expert, float logit) {
    const float size = fabsf(logit);
    const float factor = size < maximum || maximum != maximum ? maximum : size;
    const float distance = round(round(maximum - logit) / factor);
    if (!(distance > threshold)) part += expf(candidate_at(expert, logit) - maximum);
  });
  return round(expf(maximum - maximum) / Row::Lanes::sum(part));
}

template <class Row>
__device__ __forceinline__ void sparsemixer(const RouteParams& params, const Row& row,
                                            Output<typename Row::Lanes>& out) {
  const float lowest = -__uint_as_float(0x7f800000u);
  int32_t removed = -1;
#pragma unroll 1
  for (int k = 0; k < 2; ++k) {
    const auto candidate_at = [&](int expert, float logit) { return expert == removed ? lowest : logit; };
    auto keys = row.keys([&](int expert, float logit) { return key_of(candidate_at(expert, logit)); });
    const Choice choice = keys.pick();
    const float weight = weight_among_near_ties(params, row, score_of(choice.key), candidate_at);
    out.put(k, weight, choice.expert_id);
    removed = choice.expert_id;
  }
}

// ---- kernel ----

template <class Row_>
struct RouterTraits {
  using Row = Row_;
  static constexpr int kThreads = 128;
  static constexpr int kTokensPerBlock = kThreads / Row::Lanes::kLanes;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads) route_kernel(RouteParams params) {
  using Row = typename Traits::Row;
  begin_overlapped();
  const int64_t token = static_cast<int64_t>(blockIdx.x) * Traits::kTokensPerBlock + threadIdx.x / Row::Lanes::kLanes;
  if (token >= params.num_tokens) return;
  Output<typename Row::Lanes> out(params, token);
  if (params.mask != nullptr && params.mask[token] == 0) {
    out.put_unrouted();
    return;
  }
  const Row row(params, token);
  switch (params.scoring) {
    case Scoring::kSoftmax:
      softmax_top_k(params, row, out);
      break;
    case Scoring::kTop2Gate:
      top2_gate(params, token, row, out);
      break;
    case Scoring::kSparsemixer:
      sparsemixer(params, row, out);
      break;
  }
  if (params.renormalize) {
    out.renormalize(params.scoring == Scoring::kTop2Gate ? epsilon_of(params.probs_dtype) : 0.0f);
  }
}

template <class Row>
cudaError_t launch_route(const RouteParams& params, cudaStream_t stream) {
  using Traits = RouterTraits<Row>;
  const int64_t blocks = (params.num_tokens + Traits::kTokensPerBlock - 1) / Traits::kTokensPerBlock;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(Traits::kThreads), 0, stream};
  config.overlap_previous = can_overlap_previous<route_kernel<Traits>>();
  return launch<route_kernel<Traits>>(config, params);
}

}  // namespace

cudaError_t route_cuda(const RouteParams& params, cudaStream_t stream) {
  if (params.num_tokens <= 0 || params.num_experts <= 0 || params.top_k <= 0) return cudaSuccess;
  if (params.top_k > params.num_experts) return cudaErrorInvalidValue;
  if (params.scoring != Scoring::kSoftmax && params.top_k != 2) return cudaErrorInvalidValue;
  const int num_experts = params.num_experts;
  if (num_experts <= 16) return launch_route<RegisterRow<8, 2>>(params, stream);
  if (num_experts <= 64) return launch_route<RegisterRow<32, 2>>(params, stream);
  if (num_experts <= 128) return launch_route<RegisterRow<32, 4>>(params, stream);
  if (num_experts <= 256) return launch_route<RegisterRow<32, 8>>(params, stream);
  if (num_experts <= 512) return launch_route<RegisterRow<32, 16>>(params, stream);
  if (num_experts <= 1024) return launch_route<RegisterRow<32, 32>>(params, stream);
  return launch_route<StreamedRow>(params, stream);
}

}  // namespace moekernels
