// The C interface for tests: options, buffers, the outcome.
#include "global_memory.h"
#include "launch_emulated.h"
#include "state.h"

namespace {
bool chained = false;
}

extern "C" {

void simt_configure(uint64_t seed, int timing, int check_races, int smem_offset, double watchdog_seconds) {
  simt::options = {seed, static_cast<simt::Timing>(timing), check_races != 0, static_cast<uint32_t>(smem_offset),
                   watchdog_seconds};
}

// Between a call with 1 and one with 0, launches may overlap those of earlier calls too.
void simt_chain(int begins) {
  chained = begins != 0;
  simt::forget_writes();
}

void simt_set_device(int compute_capability, int sm_count) {
  simt::set_device(compute_capability, sm_count);
}

void simt_add_buffer(const char* name, const void* data, size_t bytes, int writable) {
  simt::add_buffer(name, data, bytes, writable != 0);
}

// Forgets the buffers, the last error, the launches and the tensor maps.
void simt_reset() {
  simt::clear_buffers();
  if (!chained) simt::forget_writes();
  simt::last_error.clear();
  simt::launch_log.clear();
  simt::tensor_map_log.clear();
}

// Empty when every launch went well.
const char* simt_last_error() {
  return simt::last_error.c_str();
}

// One line per launch since the last reset.
const char* simt_launch_log() {
  return simt::launch_log.c_str();
}

// One line per tensor map since then: type, rank, interleave, swizzle, fill, then dimensions, strides, box and steps.
const char* simt_tensor_map_log() {
  return simt::tensor_map_log.c_str();
}

}  // extern "C"
