// What the launch side and the control interface share.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <string>

namespace simt {

// One kernel launch: `invoke(closure)` is the kernel's body with its arguments bound.
struct KernelCall {
  const char* name;
  dim3 grid;
  dim3 block;
  size_t smem_bytes;
  bool overlapped;        // the launch before it may still run: griddepcontrol.wait tells when it has ended
  unsigned cluster_size;  // blocks, neighbours along x
  void (*invoke)(const void* closure);
  const void* closure;
  size_t closure_bytes;
  const void* shared_anchor;  // some thread_local of the library that holds the kernel
};

struct DeviceProperties {
  int compute_capability;
  int sm_count;
  int max_smem_bytes() const;
};

extern std::string last_error;      // of the first launch that failed; later launches fail until it is cleared
extern std::string launch_log;      // one line per launch
extern std::string tensor_map_log;  // one line per tensor map: the numbers the encoder got
extern std::string running_kernel;

const DeviceProperties& current_device();
void set_device(int compute_capability, int sm_count);
bool is_overlapped();                                // the running kernel
bool in_closure(const void* pointer, size_t bytes);  // the kernel's arguments
bool in_kernel_library(const void* pointer);         // its code, constants and __device__ variables

}  // namespace simt
