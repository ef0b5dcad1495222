// wgmma: each warp of a warpgroup computes its 16 of the 64 rows, from operands that descriptors find in shared memory.
//
// A multiplication takes effect when it is waited for (or at once, when eager). Until then the lanes' accumulators hold
// a poison: whoever reads them reads NaN, whoever writes them is found at the next multiplication or at the wait.
#include <algorithm>
#include <cstring>

#include "emulated.h"
#include "numbers.h"
#include "state.h"
#include "tensor_map.h"

namespace simt {
namespace {

constexpr uint32_t kFullMask = 0xFFFFFFFF;
constexpr uint32_t kPoison = 0x7FA0DEAD;  // a signalling NaN: copying keeps it, any arithmetic changes it
constexpr unsigned kDepth = 16;
constexpr unsigned kRows = 16;  // of one warp
constexpr uint32_t kChunk = 16;

struct Descriptor {
  uint32_t start;
  uint32_t leading;
  uint32_t stride;
  uint32_t span;  // bytes of the swizzle, 0: none

  explicit Descriptor(uint64_t bits)
      : start(field(bits, 0)), leading(field(bits, 16)), stride(field(bits, 32)), span(span_of(bits >> 62)) {
    if ((bits >> 49 & 7) != 0) fail("wgmma: a descriptor with a base offset is not modelled");
  }

  static uint32_t field(uint64_t bits, int at) { return static_cast<uint32_t>(bits >> at & 0x3FFF) << 4; }
  static uint32_t span_of(uint64_t mode) { return mode == 0 ? 0 : 256u >> mode; }
};

// Where 8 consecutive elements of the operand lie: K-major, elements k .. k + 7 of row i.
uint32_t chunk_along_k(const Descriptor& d, unsigned i, unsigned k) {
  if (d.span == 0) return d.start + i % 8 * kChunk + i / 8 * d.stride + k / 8 * d.leading;
  return swizzled(d.start + i % 8 * d.span + i / 8 * d.stride + k * 2, d.span);
}

// MN-major: rows i .. i + 7 at depth k.
uint32_t chunk_along_rows(const Descriptor& d, unsigned i, unsigned k) {
  const unsigned block = d.span / 2;
  return swizzled(d.start + i % block * 2 + i / block * d.leading + k % 8 * d.span + k / 8 * d.stride, d.span);
}

void check_descriptor(const Descriptor& d, bool transposed) {
  if (d.span == 0) {
    if (transposed) fail("wgmma: an MN-major operand without swizzle is not modelled");
    return;
  }
  // Base offset 0 is right only if the tile starts where the swizzle pattern does.
  const uint32_t inside = d.start % (8 * d.span);
  if (transposed ? inside != 0 : inside >= d.span) {
    fail("wgmma: the operand at shared address 0x%x does not start with its %u-byte swizzle pattern", d.start, d.span);
  }
}

// Reads rows first .. first + count - 1 of an operand into out[k * count + row].
void read_operand(const WarpMultiply& work, bool is_b, unsigned first, unsigned count, std::vector<float>& out) {
  const Descriptor d(is_b ? work.desc_b : work.desc_a);
  const bool transposed = is_b ? work.transposed_b : work.transposed_a;
  out.resize(size_t{kDepth} * count);
  const auto convert = work.half ? float_of_half : float_of_bfloat16;
  const auto fetch = [&](uint32_t address, uint16_t (&elements)[8]) {
    memcpy(elements, shared_pointer(address, kChunk, kChunk, "wgmma"), kChunk);
    check_async_read(address, kChunk, work.clock, "wgmma");
    if (options.check_races) {
      shadow().record(address, kChunk, Access::kRead, block->matrix_agent(*self->warp), work.time);
    }
  };
  uint16_t elements[8];
  if (transposed) {
    for (unsigned i = 0; i < count; i += 8) {
      for (unsigned k = 0; k < kDepth; ++k) {
        fetch(chunk_along_rows(d, first + i, k), elements);
        for (unsigned j = 0; j < 8; ++j) out[k * count + i + j] = convert(elements[j]);
      }
    }
  } else {
    for (unsigned i = 0; i < count; ++i) {
      for (unsigned k = 0; k < kDepth; k += 8) {
        fetch(chunk_along_k(d, first + i, k), elements);
        for (unsigned j = 0; j < 8; ++j) out[(k + j) * count + i] = convert(elements[j]);
      }
    }
  }
}

void execute(WarpMultiply& work, WarpMatrix& matrix, unsigned warp_in_group) {
  if (work.done) return;
  work.done = true;
  FlightAccumulator& accumulator = matrix.accumulators[work.accumulator];
  const unsigned n = accumulator.columns;
  std::vector<float> a;
  std::vector<float> b;
  read_operand(work, false, kRows * warp_in_group, kRows, a);
  read_operand(work, true, 0, n, b);
  if (!work.accumulate) std::fill(accumulator.values.begin(), accumulator.values.end(), 0.f);
  for (unsigned row = 0; row < kRows; ++row) {
    float* sum = &accumulator.values[size_t{row} * n];
    for (unsigned k = 0; k < kDepth; ++k) {
      const float factor = a[k * kRows + row];
      const float* other = &b[size_t{k} * n];
      for (unsigned j = 0; j < n; ++j) sum[j] += factor * other[j];
    }
  }
}

// Calls each(lane's register, element of `values`) for every place of the accumulator.
template <class Each>
void for_each_register(FlightAccumulator& accumulator, Each&& each) {
  for (unsigned l = 0; l < kWarpSize; ++l) {
    for (unsigned i = 0; i < accumulator.columns / 2; ++i) {
      const unsigned row = l / 4 + 8 * (i / 2 % 2);
      const unsigned column = 8 * (i / 4) + 2 * (l % 4) + i % 2;
      each(accumulator.lanes[l][i], accumulator.values[size_t{row} * accumulator.columns + column]);
    }
  }
}

void expect_poison(FlightAccumulator& accumulator) {
  for_each_register(accumulator, [](const float& held, float&) {
    uint32_t bits;
    memcpy(&bits, &held, sizeof bits);
    if (bits != kPoison) fail("wgmma: an accumulator was written while a multiplication into it was in flight");
  });
}

struct Lane {
  float* d;
  unsigned columns;
  unsigned flags;
  uint64_t desc_a;
  uint64_t desc_b;
  bool accumulate;
};

enum Flags : unsigned { kHalf = 1, kTransposedA = 2, kTransposedB = 4 };

unsigned find_accumulator(WarpMatrix& matrix, void* const data[]) {
  const auto& first = *static_cast<const Lane*>(data[0]);
  auto& all = matrix.accumulators;
  for (unsigned i = 0; i < all.size(); ++i) {
    if (all[i].users == 0 || all[i].lanes[0] != first.d) continue;
    if (all[i].columns != first.columns) fail("wgmma: two shapes in flight with one accumulator");
    expect_poison(all[i]);
    return i;
  }
  unsigned index = 0;
  while (index < all.size() && all[index].users != 0) ++index;
  if (index == all.size()) all.emplace_back();
  FlightAccumulator& fresh = all[index];
  fresh.columns = first.columns;
  fresh.values.resize(size_t{kRows} * first.columns);
  for (unsigned l = 0; l < kWarpSize; ++l) fresh.lanes[l] = static_cast<const Lane*>(data[l])->d;
  for_each_register(fresh, [](float& held, float& value) {
    value = held;
    memcpy(&held, &kPoison, sizeof kPoison);
  });
  return index;
}

// The four warps of a warpgroup must issue the same sequence.
void compare_with_group(const Warp& warp, const Lane& lane) {
  auto& log = block->multiply_log[warp.index / 4];
  const MultiplyShape shape{lane.desc_a, lane.desc_b, lane.columns, lane.flags};
  if (warp.matrix.issued == log.size()) {
    log.push_back(shape);
  } else if (!(log[warp.matrix.issued] == shape)) {
    fail("wgmma: the warps of a warpgroup issue different multiplications (descriptors 0x%llx, 0x%llx in warp %u)",
         static_cast<unsigned long long>(lane.desc_a), static_cast<unsigned long long>(lane.desc_b), warp.index);
  }
}

void issue(Warp& warp, Thread* const lanes[], void* const data[], uint32_t) {
  WarpMatrix& matrix = warp.matrix;
  const auto& first = *static_cast<const Lane*>(data[0]);
  if (!matrix.fenced) fail("wgmma: no wgmma.fence since the last commit_group");
  WarpMultiply work{};
  work.clock = lanes[0]->clock;
  for (unsigned l = 1; l < kWarpSize; ++l) {
    const auto& lane = *static_cast<const Lane*>(data[l]);
    if (lane.desc_a != first.desc_a || lane.desc_b != first.desc_b || lane.accumulate != first.accumulate) {
      fail("wgmma: the descriptors or the scale differ between the lanes of a warp");
    }
    work.clock.meet(lanes[l]->clock);
  }
  compare_with_group(warp, first);
  check_descriptor(Descriptor(first.desc_a), (first.flags & kTransposedA) != 0);
  check_descriptor(Descriptor(first.desc_b), (first.flags & kTransposedB) != 0);
  ++matrix.issued;
  work.time = ++matrix.time;
  work.accumulator = find_accumulator(matrix, data);
  ++matrix.accumulators[work.accumulator].users;
  work.desc_a = first.desc_a;
  work.desc_b = first.desc_b;
  work.transposed_a = (first.flags & kTransposedA) != 0;
  work.transposed_b = (first.flags & kTransposedB) != 0;
  work.half = (first.flags & kHalf) != 0;
  work.accumulate = first.accumulate;
  if (options.timing == Timing::kEager) execute(work, matrix, warp.index % 4);
  matrix.multiplies.open.push_back(std::move(work));
}

void retire(Warp& warp, Thread* const lanes[], size_t pending) {
  WarpMatrix& matrix = warp.matrix;
  matrix.multiplies.retire(pending, [&](WarpMultiply& work) {
    execute(work, matrix, warp.index % 4);
    FlightAccumulator& accumulator = matrix.accumulators[work.accumulator];
    matrix.retired = work.time;
    if (--accumulator.users != 0) return;
    expect_poison(accumulator);
    for_each_register(accumulator, [](float& held, float& value) { held = value; });
  });
  // What was read is read: later writers may rely on each lane's word for it.
  for (unsigned l = 0; l < kWarpSize; ++l) {
    uint32_t& known = lanes[l]->clock.seen[block->matrix_agent(warp)];
    known = std::max(known, matrix.retired);
  }
}

void check_warpgroup(const char* what) {
  const Warp& warp = *self->warp;
  if (warp.live != kFullMask || warp.index / 4 * 4 + 4 > block->warps.size()) {
    fail("%s needs a whole warpgroup of 128 threads", what);
  }
}

}  // namespace

void wgmma_fence() {
  check_warpgroup("wgmma.fence");
  meet("wgmma.fence", kFullMask, nullptr,
       [](Warp& warp, Thread* const[], void* const[], uint32_t) { warp.matrix.fenced = true; });
}

void wgmma_commit_group() {
  check_warpgroup("wgmma.commit_group");
  meet("wgmma.commit_group", kFullMask, nullptr, [](Warp& warp, Thread* const[], void* const[], uint32_t) {
    warp.matrix.multiplies.commit();
    warp.matrix.fenced = false;
  });
}

void wgmma_wait_group(size_t pending) {
  check_warpgroup("wgmma.wait_group");
  meet("wgmma.wait_group", kFullMask, &pending, [](Warp& warp, Thread* const lanes[], void* const data[], uint32_t) {
    retire(warp, lanes, *static_cast<const size_t*>(data[0]));
  });
}

void wgmma(bool half, unsigned columns, bool transposed_a, bool transposed_b, float* d, uint64_t desc_a,
           uint64_t desc_b, bool accumulate) {
  check_warpgroup("wgmma");
  const unsigned flags = (half ? kHalf : 0u) | (transposed_a ? kTransposedA : 0u) | (transposed_b ? kTransposedB : 0u);
  Lane lane{d, columns, flags, desc_a, desc_b, accumulate};
  meet("wgmma.mma_async", kFullMask, &lane, issue);
}

void check_matrix_done(const Warp& warp) {
  if (!warp.matrix.multiplies.empty()) fail("a warp exits with a wgmma that it never waited for");
}

}  // namespace simt
