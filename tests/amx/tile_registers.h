// The tile instructions (AMX) as functions, for processors without them: included before everything else, with the flags
// of the AVX-512 kernels alone, it makes csrc/cpu/isa/amx.cpp compile to calls of tile_registers.cpp.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 finds it in its own headers
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

// One set of registers per thread. What a processor answers with an invalid-opcode fault ends the process with a
// sentence on stderr.
namespace tiles {

void load_config(const void* config);
void store_config(void* config);
void release();
void zero(int tile);
void load(int tile, const void* memory, long stride);
void store(int tile, void* memory, long stride);
void dot_bf16(int sums, int left, int right);
void dot_int8(int sums, int left, int right);

}  // namespace tiles

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig(config) ::tiles::load_config(config)
#define _tile_storeconfig(config) ::tiles::store_config(config)
#define _tile_release() ::tiles::release()
#define _tile_zero(tile) ::tiles::zero(tile)
#define _tile_loadd(tile, memory, stride) ::tiles::load(tile, memory, stride)
#define _tile_stored(tile, memory, stride) ::tiles::store(tile, memory, stride)
#define _tile_dpbf16ps(sums, left, right) ::tiles::dot_bf16(sums, left, right)
#define _tile_dpbssd(sums, left, right) ::tiles::dot_int8(sums, left, right)
