// rows [N, K], quantised weight [E, M, K], expert_offsets [E + 1] -> out [N, M], or [N, M / 2] when gated
//
// A task is rows of an expert times a block of its columns. Few rows are multiplied while the codes are widened. For
// many the block is unpacked to the dtype of the rows and multiplied by the grouped GEMM's own kernel. Rows that are
// rounded to 8 bits are multiplied by the codes, however many there are, so many at a time: the tasks of the same rows
// come one after the other and find them packed. Where scales are for groups and unpacking is quicker, many of them are
// copied as rounded and go that way too. Workers take tasks from a common counter; each output belongs to one task, so
// who took it does not matter.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "common/rounding.h"
#include "cpu/gemm_blocking.h"

namespace moekernels {
namespace {

using cpu::GemmBlocking;
using cpu::GemmTask;
using cpu::kLine;

constexpr int64_t kTasksPerWorker = 8;             // as many as let workers finish together
constexpr int64_t kWeightRows = 128;               // of a task at most; gate and value count separately
constexpr int64_t kMinWeightRows = 32;             // at least
constexpr int64_t kWeightsPerWorker = 128 * 1024;  // fewer are not worth waking another thread for

class QuantizedGemm {
 public:
  QuantizedGemm(const QuantizedGemmParams& params, const Parallel& parallel)
      : params_(params),
        p_(params.gemm),
        gemm_(cpu::kernels().gemm[static_cast<int32_t>(p_.dtype)]),
        quantized_(cpu::kernels().quantized),
        codes_(params.int8_rows ? quantized_.integer : quantized_.widening),
        always_streams_(p_.batch_invariant || (params.int8_rows && params.weight.group >= p_.in_features)),
        gates_(p_.gated ? 2 : 1),
        width_(p_.out_features / gates_),
        row_bytes_(p_.in_features * size_of(p_.dtype)),
        unpacked_bytes_(round_up(row_bytes_, kLine) + kLine),
        blocking_(cpu::gemm_blocking(gemm_.k_major, p_.num_rows, p_.in_features, p_.gated)) {
    int64_t end = 0;
    for (int64_t expert = 0; expert < p_.num_experts; ++expert) {
      // Clamped, so that wrong offsets give wrong results but stay inside the tensors.
      const int64_t begin = clamp(p_.expert_offsets[expert], 0, p_.num_rows);
      end = clamp(p_.expert_offsets[expert + 1], begin, p_.num_rows);
      const int64_t rows = end - begin, parts = streams(rows) ? ceil_div(rows, codes_.max_rows) : rows > 0;
      for (int64_t i = 0; i < parts; ++i) {
        visits_.push_back({expert, begin + rows * i / parts, begin + rows * (i + 1) / parts});
      }
    }
    first_unused_row_ = p_.num_experts > 0 ? end : 0;
    const int64_t visits = static_cast<int64_t>(visits_.size());
    num_workers_ = clamp(visits * p_.out_features * p_.in_features / kWeightsPerWorker, 1, parallel.num_threads);
    columns_ = kWeightRows / gates_;
    while (columns_ > kMinWeightRows / gates_ && visits * col_blocks() < kTasksPerWorker * num_workers_) columns_ /= 2;
    scales_offset_ = gates_ * columns_ * unpacked_bytes_;
    gemm_offset_ = scales_offset_ + round_up(p_.in_features / params.weight.group * int64_t{4}, kLine);
    const int64_t unpacking = gemm_offset_ + blocking_.scratch_bytes;
    const int64_t streaming = codes_.scratch_bytes(params, columns_);
    scratch_bytes_ = round_up(unpacking > streaming ? unpacking : streaming, kLine);
    rounds_ = params.int8_rows && std::any_of(visits_.begin(), visits_.end(),
                                              [this](const Visit& visit) { return !streams(visit.end - visit.begin); });
  }

  void run(const Parallel& parallel) {
    const int64_t row_bytes = width_ * size_of(p_.dtype);
    std::memset(static_cast<char*>(p_.out) + first_unused_row_ * row_bytes, 0,
                static_cast<size_t>((p_.num_rows - first_unused_row_) * row_bytes));
    if (visits_.empty()) return;
    const int64_t rounded_bytes = rounds_ ? p_.num_source_rows * row_bytes_ : 0;
    scratch_ = cpu::scratch<char>(parallel, num_workers_ * scratch_bytes_ + rounded_bytes);
    if (rounds_) round_rows(parallel);
    cpu::for_workers(parallel, num_workers_, [this](int64_t worker) { work(worker); });
  }

 private:
  struct Visit {
    int64_t expert, begin, end;  // of its rows
  };

  // Whether so many rows of an expert are multiplied by the codes themselves.
  bool streams(int64_t rows) const {
    return always_streams_ || rows <= codes_.streamed_rows[static_cast<int32_t>(p_.dtype)];
  }
  int64_t col_blocks() const { return ceil_div(width_, columns_); }
  char* rounded_rows() const { return scratch_ + num_workers_ * scratch_bytes_; }

  void round_rows(const Parallel& parallel) {
    constexpr int64_t kRowsPerPiece = 4;
    const auto* rows = static_cast<const char*>(p_.rows);
    const int64_t stride = p_.row_stride * size_of(p_.dtype);
    cpu::for_ranges(parallel, p_.num_source_rows, kRowsPerPiece, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        quantized_.round_row(p_.dtype, rows + row * stride, rounded_rows() + row * row_bytes_, p_.in_features);
      }
    });
  }

  void work(int64_t worker) {
    char* scratch = scratch_ + worker * scratch_bytes_;
    int64_t packed_row = -1;  // where the rows begin that are packed
    const int64_t num_tasks = static_cast<int64_t>(visits_.size()) * col_blocks();
    for (int64_t i; (i = next_task_.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
      const Visit& visit = visits_[static_cast<size_t>(i / col_blocks())];
      const int64_t begin = i % col_blocks() * columns_;
      const int64_t end = clamp(begin + columns_, 0, width_);
      if (streams(visit.end - visit.begin)) {
        codes_.run(params_, {visit.expert, visit.begin, visit.end, begin, end, visit.begin == packed_row}, scratch);
        packed_row = visit.begin;
      } else {
        packed_row = unpack(visit, begin, end, packed_row, scratch);
      }
    }
  }

  // As an expert of its own, whose weight is the block, and whose bias and output begin there. Returns where the rows
  // begin that are packed then.
  int64_t unpack(const Visit& visit, int64_t col_begin, int64_t col_end, int64_t packed_row, char* scratch) const {
    WeightPart parts[2];
    for (int64_t gate = 0; gate < gates_; ++gate) {
      char* block = scratch + gate * (col_end - col_begin) * unpacked_bytes_;
      const int64_t first = gate * width_;
      quantized_.unpack(params_, visit.expert, first + col_begin, first + col_end, block,
                        unpacked_bytes_ / size_of(p_.dtype), reinterpret_cast<float*>(scratch + scales_offset_));
      parts[gate] = {block, unpacked_bytes_ / size_of(p_.dtype)};
    }
    GroupedGemmParams gemm = p_;
    if (rounds_) {
      gemm.rows = rounded_rows();
      gemm.row_stride = p_.in_features;
    }
    gemm.weight_parts = parts;
    gemm.num_parts = static_cast<int32_t>(gates_);
    const int64_t size = size_of(p_.dtype);
    gemm.out = static_cast<char*>(p_.out) + col_begin * size;
    if (p_.bias != nullptr) {
      gemm.bias = static_cast<const char*>(p_.bias) + (visit.expert * p_.bias_stride + col_begin) * size;
    }
    const int64_t rows = visit.end - visit.begin, row_blocks = ceil_div(rows, blocking_.rows);
    for (int64_t i = 0; i < row_blocks; ++i) {
      const int64_t begin = visit.begin + rows * i / row_blocks, end = visit.begin + rows * (i + 1) / row_blocks;
      gemm_.run(gemm, blocking_, {0, begin, end, 0, col_end - col_begin, begin == packed_row}, scratch + gemm_offset_);
      packed_row = begin;
    }
    return packed_row;
  }

  const QuantizedGemmParams& params_;
  const GroupedGemmParams& p_;
  const cpu::GemmKernel& gemm_;
  const cpu::QuantizedKernel& quantized_;
  const cpu::CodesKernel& codes_;
  const bool always_streams_;
  const int64_t gates_;  // 2 where there are gate and value
  const int64_t width_;  // of the output
  const int64_t row_bytes_;
  const int64_t unpacked_bytes_;  // from an unpacked row to the next: a power of two apart, they would displace others
  const GemmBlocking blocking_;
  std::vector<Visit> visits_;
  int64_t columns_;  // of a task
  int64_t first_unused_row_, num_workers_, scales_offset_, gemm_offset_, scratch_bytes_;
  bool rounds_;              // whether tasks that unpack take rows rounded to 8 bits
  char* scratch_ = nullptr;  // of each worker, then rows that are rounded
  std::atomic<int64_t> next_task_{0};
};

}  // namespace

void run(const QuantizedGemmParams& params, const Parallel& parallel) {
  QuantizedGemm(params, parallel).run(parallel);
}

}  // namespace moekernels
