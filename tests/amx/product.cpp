// sums += left * right, by the tile instructions of the processor or of tile_registers.cpp.
#include <immintrin.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

struct alignas(64) Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};

// rows x words, words x columns, rows x columns; words are pairs of bfloat16 or four integers.
extern "C" void product(const void* left, const void* right, void* sums, int rows, int words, int columns,
                        bool integers) {
  Config config = {};
  config.palette = 1;
  const int shapes[3][2] = {{rows, columns}, {rows, words}, {words, columns}};
  for (int tile = 0; tile < 3; ++tile) {
    config.rows[tile] = uint8_t(shapes[tile][0]);
    config.bytes_per_row[tile] = uint16_t(4 * shapes[tile][1]);
  }
  _tile_loadconfig(&config);
  _tile_loadd(0, sums, 4 * columns);
  _tile_loadd(1, left, 4 * words);
  _tile_loadd(2, right, 4 * columns);
  if (integers) {
    _tile_dpbssd(0, 1, 2);
  } else {
    _tile_dpbf16ps(0, 1, 2);
  }
  _tile_stored(0, sums, 4 * columns);
  _tile_release();
}

// The calling thread gets tiles of so many rows, or none; and what it has, 64 bytes.
extern "C" void configure(int rows) {
  Config config = {};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = uint8_t(rows);
    config.bytes_per_row[tile] = 64;
  }
  if (rows > 0) {
    _tile_loadconfig(&config);
  } else {
    _tile_release();
  }
}
extern "C" void configuration(void* config) {
  _tile_storeconfig(config);
}

#if defined(MOEKERNELS_EMULATED_TILES)  // assemblers know some of the rules
// Each breaks one rule.
extern "C" void break_rule(int rule) {
  Config config = {};
  alignas(64) char memory[1024] = {};
  config.palette = rule == 0 ? 2 : 1;
  config.rows[0] = config.rows[1] = config.rows[2] = 16;
  config.bytes_per_row[0] = config.bytes_per_row[1] = 64;
  config.bytes_per_row[2] = rule == 1 ? 128 : rule == 2 ? 32 : 64;
  if (rule != 3) _tile_loadconfig(&config);
  if (rule == 4) _tile_zero(7);
  if (rule == 5) _tile_dpbf16ps(0, 1, 1);
  if (rule == 6) _tile_release();
  _tile_loadd(1, memory, 64);
  _tile_dpbf16ps(0, 1, 2);
}
#endif

// Whether Linux lets this process use tile registers.
extern "C" bool request_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  return syscall(SYS_arch_prctl, 0x1023L, 18L) == 0;
#else
  return false;
#endif
}
