// hidden [T, H], token_of_row [N] -> rows [N, H]
//
// Only moves memory, so the dtype does not matter: rows are runs of words. A warp makes a piece of a row, kVectors
// neighbouring words to a lane, and has all of its loads under way before it uses the first.
//
// A token is gathered once for each of its K rows. Rows are sorted by expert, and by token within an expert, so in row
// order these K come far apart. Hence the rows are worked on as kStreams runs side by side: where every expert has
// about as many rows, as many experts as there are runs (or a multiple or a fraction of them) pass over the tokens
// together, and a token read for one is still in the L2 cache for the others.
#include "common/rounding.h"
#include "cuda/rows/rows.cuh"
#include "moekernels/cuda.h"

namespace moekernels {
namespace {

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

}  // namespace

cudaError_t run(const PermuteParams& params, cudaStream_t stream) {
  if (params.num_rows <= 0 || params.hidden_size <= 0) return cudaSuccess;
  const auto element = static_cast<uintptr_t>(size_of(params.dtype));
  const uintptr_t bits = reinterpret_cast<uintptr_t>(params.hidden) | reinterpret_cast<uintptr_t>(params.rows) |
                         static_cast<uintptr_t>(params.hidden_size) * element |
                         static_cast<uintptr_t>(params.hidden_stride) * element;
  if (bits % 16 == 0) return launch_permute<uint4>(params, stream);
  if (bits % 4 == 0) return launch_permute<uint32_t>(params, stream);
  return launch_permute<uint16_t>(params, stream);
}

}  // namespace moekernels
