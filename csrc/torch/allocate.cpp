#include "allocate.h"

#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace moekernels {
namespace {

void ask_for_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 * 1024 * 1024;
  constexpr size_t kLarge = 4 * kHugePage;
  if (num_bytes < kLarge) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + num_bytes) / kHugePage * kHugePage;
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: refused, nothing is lost
#endif
}

}  // namespace

torch::stable::Tensor new_empty(const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes) {
  torch::stable::Tensor tensor =
      torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()));
  if (tensor.is_cpu() && tensor.numel() > 0) {
    ask_for_huge_pages(tensor.mutable_data_ptr(), static_cast<size_t>(tensor.numel() * tensor.element_size()));
  }
  return tensor;
}

}  // namespace moekernels
