// Bulk copies between global and shared memory, by tensor map or of consecutive bytes.
#include <algorithm>
#include <cstring>

#include "emulated.h"
#include "state.h"
#include "tensor_map.h"

namespace simt {
namespace {

uint32_t swizzle_bytes(const TensorMap& map) {
  switch (map.swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE:
      return 0;
    case CU_TENSOR_MAP_SWIZZLE_32B:
      return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      return 64;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      return 128;
    default:
      fail("TMA: this swizzle is not modelled");
  }
}

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = map.element_bytes;
  for (uint32_t i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

TensorMap read_map(const CUtensorMap* opaque, const Coordinates& box, const char* what) {
  TensorMap map;
  memcpy(&map, opaque, sizeof map);
  if (map.magic != TensorMap::kMagic) fail("%s: the tensor map was never encoded", what);
  if (static_cast<int>(map.rank) != box.rank) {
    fail("%s: the tensor map has rank %u, the copy %d", what, map.rank, box.rank);
  }
  return map;
}

void check_shared_side(const TensorMap& map, uint32_t address, const char* what) {
  // A swizzle repeats after 8 rows; a box must start where its pattern does.
  const uint32_t swizzle = swizzle_bytes(map);
  shared_pointer(address, box_bytes(map), swizzle > 16 ? swizzle * 8 : 128, what);
  if (address % 128 != 0) fail("%s: shared address 0x%x is not a multiple of 128", what, address);
  if (swizzle != 0 && map.box[0] * map.element_bytes != swizzle) {
    fail("%s: boxes of %u bytes per row under a swizzle of %u bytes are not modelled", what,
         map.box[0] * map.element_bytes, swizzle);
  }
}

constexpr uint32_t kChunk = 16;  // what a swizzle moves as one

// Calls chunk(shared address, global address, first and last byte inside the tensor) for every 16 bytes of the box.
template <class Chunk>
void for_each_chunk(const TensorMap& map, const Coordinates& box, uint32_t address, Chunk&& chunk) {
  const int64_t width = map.element_bytes;
  const int64_t row_bytes = map.box[0] * width;
  const int64_t x = box.at[0] * width;
  const int64_t row_end = static_cast<int64_t>(map.dims[0]) * width;
  const uint32_t swizzle = swizzle_bytes(map);
  const int64_t rows = box_bytes(map) / row_bytes;
  for (int64_t r = 0; r < rows; ++r) {
    unsigned char* global = map.base;
    bool inside = true;
    int64_t rest = r;
    for (uint32_t d = 1; d < map.rank; ++d) {
      const int64_t at = box.at[d] + rest % map.box[d];
      rest /= map.box[d];
      inside = inside && at >= 0 && at < static_cast<int64_t>(map.dims[d]);
      global += at * static_cast<int64_t>(map.strides[d]);
    }
    for (int64_t c = 0; c < row_bytes; c += kChunk) {
      const int64_t first = std::clamp<int64_t>(-(x + c), 0, kChunk);
      const int64_t last = inside ? std::clamp<int64_t>(row_end - (x + c), first, kChunk) : first;
      chunk(swizzled(address + static_cast<uint32_t>(r * row_bytes + c), swizzle), global + x + c, first, last);
    }
  }
}

void record_engine_write(uint32_t address, uint32_t bytes, MBarrier& mbarrier) {
  const uint32_t time = ++block->engine_time;
  shadow().record(address, bytes, Access::kWrite, block->engine_agent(), time);
  mbarrier.arriving.seen[block->engine_agent()] = time;
}

MBarrier& fenced_mbarrier(uint32_t address, const char* what) {
  MBarrier& mbarrier = mbarrier_at(address, what);
  if (!mbarrier.fenced) fail("%s: no fence_mbarrier_init followed the initialisation of mbarrier 0x%x", what, address);
  return mbarrier;
}

// To the shared memory of `block`, whose mbarrier counts the bytes.
void load_box(const TensorMap& map, uint32_t dst, uint32_t mbarrier, const Coordinates& box) {
  constexpr const char* kWhat = "TMA load";
  check_shared_side(map, dst, kWhat);
  check_shared_write(dst, box_bytes(map), kWhat);
  fenced_mbarrier(mbarrier, kWhat);
  submit([=] {
    for_each_chunk(map, box, dst, [&](uint32_t address, const unsigned char* global, int64_t first, int64_t last) {
      unsigned char chunk[kChunk] = {};
      if (last > first) {
        check_global(global + first, last - first, Access::kRead, kWhat);
        memcpy(chunk + first, global + first, last - first);
      }
      memcpy(shared_pointer(address, kChunk, kChunk, kWhat), chunk, kChunk);
    });
    MBarrier& target = mbarrier_at(mbarrier, kWhat);
    record_engine_write(dst, box_bytes(map), target);
    mbarrier_complete_bytes(target, box_bytes(map));
  });
}

void submit_store(uint32_t src, uint32_t bytes, std::function<void()> work) {
  const uint32_t time = ++block->engine_time;
  shadow().record(src, bytes, Access::kRead, block->engine_agent(), time);
  if (options.timing == Timing::kEager) {
    work();
    work = [] {};
  }
  self->bulk_stores.open.push_back({std::move(work), time});
}

}  // namespace

void fence_proxy_async() {
  self->clock.fence();
  maybe_step_aside();
}

void prefetch_tensormap(const CUtensorMap* opaque) {
  TensorMap map;
  memcpy(&map, opaque, sizeof map);
  if (map.magic != TensorMap::kMagic) fail("prefetch.tensormap: the tensor map was never encoded");
}

void tma_load(uint32_t dst, const CUtensorMap* opaque, uint32_t mbarrier, const Coordinates& box) {
  tma_load_multicast(dst, opaque, mbarrier, box, 1u << block->rank);
}

void tma_load_multicast(uint32_t dst, const CUtensorMap* opaque, uint32_t mbarrier, const Coordinates& box,
                        uint32_t ranks) {
  constexpr const char* kWhat = "TMA load";
  check_waited(kWhat);
  const TensorMap map = read_map(opaque, box, kWhat);
  if (ranks == 0 || ranks >> cluster->blocks.size() != 0) {
    fail("%s to the blocks 0x%x of a cluster of %zu", kWhat, ranks, cluster->blocks.size());
  }
  for (unsigned rank = 0; rank < cluster->blocks.size(); ++rank) {
    if ((ranks >> rank & 1) == 0) continue;
    const InBlock there(cluster->blocks[rank]);
    check_block_lives();
    load_box(map, dst, mbarrier, box);
  }
  maybe_step_aside();
}

void tma_store(const CUtensorMap* opaque, uint32_t src, const Coordinates& box) {
  constexpr const char* kWhat = "TMA store";
  check_waited(kWhat);
  const TensorMap map = read_map(opaque, box, kWhat);
  check_shared_side(map, src, kWhat);
  check_async_read(src, box_bytes(map), self->clock, kWhat);
  submit_store(src, box_bytes(map), [=] {
    for_each_chunk(map, box, src, [&](uint32_t address, unsigned char* global, int64_t first, int64_t last) {
      if (last <= first) return;
      check_global(global + first, last - first, Access::kWrite, kWhat);
      memcpy(global + first, shared_pointer(address, kChunk, kChunk, kWhat) + first, last - first);
    });
  });
}

void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbarrier) {
  constexpr const char* kWhat = "bulk load";
  check_waited(kWhat);
  shared_pointer(dst, bytes, 16, kWhat);
  if (reinterpret_cast<uintptr_t>(src) % 16 != 0) fail("%s: global address %p is not a multiple of 16", kWhat, src);
  if (bytes == 0 || bytes % 16 != 0) fail("%s: %u bytes are not a positive multiple of 16", kWhat, bytes);
  check_global(src, bytes, Access::kRead, kWhat);
  check_shared_write(dst, bytes, kWhat);
  fenced_mbarrier(mbarrier, kWhat);
  submit([=] {
    memcpy(shared_pointer(dst, bytes, 16, kWhat), src, bytes);
    MBarrier& target = mbarrier_at(mbarrier, kWhat);
    record_engine_write(dst, bytes, target);
    mbarrier_complete_bytes(target, bytes);
  });
}

void bulk_store(void* dst, uint32_t src, uint32_t bytes) {
  constexpr const char* kWhat = "bulk store";
  check_waited(kWhat);
  shared_pointer(src, bytes, 16, kWhat);
  if (reinterpret_cast<uintptr_t>(dst) % 16 != 0) fail("%s: global address %p is not a multiple of 16", kWhat, dst);
  if (bytes == 0 || bytes % 16 != 0) fail("%s: %u bytes are not a positive multiple of 16", kWhat, bytes);
  check_global(dst, bytes, Access::kWrite, kWhat);
  check_async_read(src, bytes, self->clock, kWhat);
  submit_store(src, bytes, [=] { memcpy(dst, shared_pointer(src, bytes, 16, kWhat), bytes); });
}

void bulk_commit_group() {
  self->bulk_stores.commit();
}

void bulk_wait_group(size_t pending) {
  self->bulk_stores.retire(pending, [](const BulkStore& store) {
    store.work();
    uint32_t& known = self->clock.seen[block->engine_agent()];
    known = std::max(known, store.time);
  });
}

}  // namespace simt
