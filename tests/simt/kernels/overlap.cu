// Two launches that may overlap: out[i] = in[i] + 1, twice, and a fault to choose in the second one.
#include <type_traits>

#include "cuda/common/launch.cuh"
#include "cuda/common/overlap.cuh"

namespace {

using namespace moekernels;

enum Fault : int64_t {
  kReadsTooEarly = 1,
  kNeverWaits = 2,
  kReadsAsConstant = 3,
  kReadsItsOwnAsConstant = 4,
};

__global__ void first_kernel(const uint4* in, uint4* out) {
  begin_overlapped();
  uint4 v = in[threadIdx.x];
  ++v.x;
  out[threadIdx.x] = v;
}

__global__ void second_kernel(const uint4* in, uint4* out, int64_t fault) {
  if (fault == kNeverWaits && threadIdx.x == 3) return;
  uint4 v{};
  if (fault == kReadsTooEarly) v = in[threadIdx.x];
  begin_overlapped();
  if (fault == kReadsAsConstant) {
    v = ptx::ld_global_nc_v4_hint(in + threadIdx.x, ptx::createpolicy_evict_first());
  } else if (fault != kReadsTooEarly) {
    v = ptx::ld_global_v4_keep(in + threadIdx.x);
  }
  ++v.x;
  out[threadIdx.x] = v;
  if (fault == kReadsItsOwnAsConstant) {
    out[threadIdx.x] = ptx::ld_global_nc_v4_hint(out + threadIdx.x, ptx::createpolicy_evict_first());
  }
}

template <auto kKernel, class... Args>
cudaError_t launch_32(bool overlaps, const Args&... args) {
  LaunchConfig config{dim3(1), dim3(32)};
  config.overlap_previous = overlaps && can_overlap_previous<kKernel>();
  return launch<kKernel>(config, args...);
}

}  // namespace

extern "C" {

// in, between, out [32] of 16 bytes
cudaError_t two_launches(const uint4* in, uint4* between, uint4* out, int64_t second_overlaps, int64_t fault) {
  if (const cudaError_t error = launch_32<first_kernel>(true, in, between)) return error;
  return launch_32<second_kernel>(second_overlaps != 0, static_cast<const uint4*>(between), out, fault);
}

cudaError_t first(const uint4* in, uint4* out) {
  return launch_32<first_kernel>(true, in, out);
}

cudaError_t second(const uint4* in, uint4* out, int64_t fault) {
  return launch_32<second_kernel>(true, in, out, fault);
}

}  // extern "C"
