// permute:   hidden [T, H], token_of_row [N] -> rows [N, H]
// unpermute: rows [N, H], row_of_slot [T, K], weights [T, K] -> out [T, H]
//
// Both only move memory. A warp makes a piece of an output row, kVectors neighbouring words to a lane, and has all of
// its loads under way before it uses the first. Nothing is summed across threads: un-permutation adds a token's slots
// in order, in float32 registers.
//
// permute gathers, and a token is gathered once for each of its K rows. Rows are sorted by expert, and by token within
// an expert, so in row order these K come far apart. Hence the rows are worked on as kStreams runs side by side: where
// every expert has about as many rows, as many experts as there are runs (or a multiple or a fraction of them) pass
// over the tokens together, and a token read for one is still in the L2 cache for the others.
#include "moekernels/cuda.h"
#include "rows.cuh"

namespace moekernels {
namespace {

// ---- permute ----
// The dtype does not matter: rows are runs of words.

template <class Word_>
struct PermuteTraits {
  using Word = Word_;
  static constexpr int kVectors = 4;
  static constexpr int kStreams = 128;
};

struct PermuteWords {
  const void* hidden;
  const int32_t* token_of_row;
  void* rows;
  int64_t num_tokens;
  int64_t num_rows;
  int64_t rows_per_stream;
  int64_t row_words;
  int64_t hidden_stride;  // in words
  int64_t row_pieces;
  int64_t num_pieces;
  bool streamed;
};

template <class Traits>
__global__ void __launch_bounds__(kThreads) permute_kernel(PermuteWords params) {
  using Word = typename Traits::Word;
  begin_overlapped();
  for (int64_t piece = first_piece(); piece < params.num_pieces; piece += piece_stride()) {
    const int64_t turn = piece / params.row_pieces;
    const int64_t row = turn % Traits::kStreams * params.rows_per_stream + turn / Traits::kStreams;
    if (row >= params.num_rows) continue;
    const int64_t first_word =
        piece % params.row_pieces * (Traits::kVectors * kWarpSize) + static_cast<int>(threadIdx.x % kWarpSize);
    const int64_t token = params.token_of_row[row];
    const bool is_token = token >= 0 && token < params.num_tokens;
    const Word* source = static_cast<const Word*>(params.hidden) + token * params.hidden_stride;
    Word* target = static_cast<Word*>(params.rows) + row * params.row_words;
    Word words[Traits::kVectors];
#pragma unroll
    for (int v = 0; v < Traits::kVectors; ++v) {
      const int64_t i = first_word + v * kWarpSize;
      words[v] = load_if<Word>(source + i, is_token && i < params.row_words);
    }
#pragma unroll
    for (int v = 0; v < Traits::kVectors; ++v) {
      const int64_t i = first_word + v * kWarpSize;
      if (i < params.row_words) store(target + i, words[v], params.streamed);
    }
  }
}

template <class Word>
cudaError_t launch_permute(const PermuteParams& params, cudaStream_t stream) {
  using Traits = PermuteTraits<Word>;
  const int64_t row_bytes = params.hidden_size * size_of(params.dtype);
  PermuteWords words{};
  words.hidden = params.hidden;
  words.token_of_row = params.token_of_row;
  words.rows = params.rows;
  words.num_tokens = params.num_tokens;
  words.num_rows = params.num_rows;
  words.rows_per_stream = ceil_div(params.num_rows, Traits::kStreams);
  words.row_words = row_bytes / static_cast<int64_t>(sizeof(Word));
  words.hidden_stride = params.hidden_stride * size_of(params.dtype) / static_cast<int64_t>(sizeof(Word));
  words.row_pieces = ceil_div(words.row_words, Traits::kVectors * kWarpSize);
  words.num_pieces = words.rows_per_stream * Traits::kStreams * words.row_pieces;
  words.streamed = params.num_rows * row_bytes > kStreamedBytes;
  return launch_warps<permute_kernel<Traits>>(words.num_pieces, words, stream);
}

// ---- un-permute ----

// kSlots slots at a time, kVectors vectors of kVecSize elements each: kSlots * kVectors loads under way per lane.
template <class T_, int kVecSize_, int kSlots_, int kVectors_>
struct UnpermuteTraits {
  using T = T_;
  static constexpr int kVecSize = kVecSize_;
  static constexpr int kSlots = kSlots_;
  static constexpr int kVectors = kVectors_;

  using Vec = RowVec<T, kVecSize>;
};

template <class Traits>
__global__ void __launch_bounds__(kThreads, 3) unpermute_kernel(UnpermuteParams params) {
  using T = typename Traits::T;
  using Vec = typename Traits::Vec;
  constexpr int64_t kPiece = static_cast<int64_t>(Traits::kVectors) * kWarpSize * Traits::kVecSize;
  begin_overlapped();
  const int64_t row_pieces = (params.hidden_size + kPiece - 1) / kPiece;
  const int64_t num_pieces = params.num_tokens * row_pieces;
  for (int64_t piece = first_piece(); piece < num_pieces; piece += piece_stride()) {
    const int64_t token = piece / row_pieces;
    const int64_t first_column =
        piece % row_pieces * kPiece + static_cast<int>(threadIdx.x % kWarpSize) * Traits::kVecSize;
    const int32_t* row_of_slot = params.row_of_slot + token * params.top_k;
    const float* weights = params.weights == nullptr ? nullptr : params.weights + token * params.top_k;

    float sums[Traits::kVectors][Traits::kVecSize] = {};
    for (int first = 0; first < params.top_k; first += Traits::kSlots) {
      float weight[Traits::kSlots];
      Vec loaded[Traits::kSlots][Traits::kVectors];
#pragma unroll
      for (int s = 0; s < Traits::kSlots; ++s) {
        const int k = first + s;
        const int64_t row = k < params.top_k ? row_of_slot[k] : -1;
        const bool kept = row >= 0 && row < params.num_rows;
        weight[s] = weights != nullptr && k < params.top_k ? weights[k] : 1.0f;
        if (!kept) weight[s] = 0.0f;
        const T* source = static_cast<const T*>(params.rows) + row * params.row_stride;
#pragma unroll
        for (int v = 0; v < Traits::kVectors; ++v) {
          const int64_t column = first_column + v * kWarpSize * Traits::kVecSize;
          loaded[s][v] = load_if<Vec>(source + column, kept && column < params.hidden_size);
        }
      }
#pragma unroll
      for (int s = 0; s < Traits::kSlots; ++s) {
#pragma unroll
        for (int v = 0; v < Traits::kVectors; ++v) {
#pragma unroll
          for (int i = 0; i < Traits::kVecSize; ++i) {
            sums[v][i] = fmaf(weight[s], to_float(loaded[s][v].values[i]), sums[v][i]);
          }
        }
      }
    }

    T* target = static_cast<T*>(params.out) + token * params.hidden_size;
#pragma unroll
    for (int v = 0; v < Traits::kVectors; ++v) {
      const int64_t column = first_column + v * kWarpSize * Traits::kVecSize;
      if (column >= params.hidden_size) continue;
      Vec sum;
#pragma unroll
      for (int i = 0; i < Traits::kVecSize; ++i) sum.values[i] = from_float<T>(sums[v][i]);
      store(target + column, sum, /*streamed=*/false);
    }
  }
}

template <class T, int kVecSize, int kSlots, int kVectors>
cudaError_t launch_unpermute(const UnpermuteParams& params, cudaStream_t stream) {
  using Traits = UnpermuteTraits<T, kVecSize, kSlots, kVectors>;
  const int64_t row_pieces = ceil_div(params.hidden_size, Traits::kVectors * kWarpSize * Traits::kVecSize);
  return launch_warps<unpermute_kernel<Traits>>(params.num_tokens * row_pieces, params, stream);
}

}  // namespace

cudaError_t permute_cuda(const PermuteParams& params, cudaStream_t stream) {
  if (params.num_rows <= 0 || params.hidden_size <= 0) return cudaSuccess;
  const auto element = static_cast<uintptr_t>(size_of(params.dtype));
  const uintptr_t bits = reinterpret_cast<uintptr_t>(params.hidden) | reinterpret_cast<uintptr_t>(params.rows) |
                         static_cast<uintptr_t>(params.hidden_size) * element |
                         static_cast<uintptr_t>(params.hidden_stride) * element;
  if (bits % 16 == 0) return launch_permute<uint4>(params, stream);
  if (bits % 4 == 0) return launch_permute<uint32_t>(params, stream);
  return launch_permute<uint16_t>(params, stream);
}

cudaError_t unpermute_cuda(const UnpermuteParams& params, cudaStream_t stream) {
  if (params.num_tokens <= 0 || params.hidden_size <= 0) return cudaSuccess;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    constexpr int kVecSize = Vec16<T>::kSize;
    const bool vectorized =
        is_vec16_aligned<T>(params.rows, params.row_stride) && is_vec16_aligned<T>(params.out, params.hidden_size);
    if (!vectorized) return launch_unpermute<T, 1, 4, 2>(params, stream);
    if (params.top_k == 1) return launch_unpermute<T, kVecSize, 1, 4>(params, stream);
    if (params.top_k == 2) return launch_unpermute<T, kVecSize, 2, 2>(params, stream);
    if (params.top_k <= 4) return launch_unpermute<T, kVecSize, 4, 1>(params, stream);
    return launch_unpermute<T, kVecSize, 8, 1>(params, stream);
  });
}

}  // namespace moekernels
