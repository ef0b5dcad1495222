// What Intel's manual says that the tile instructions do (Software Developer's Manual, volume 2: LDTILECFG, STTILECFG,
// TILERELEASE, TILEZERO, TILELOADD, TILESTORED, TDPBF16PS, TDPBSSD).
#include "tile_registers.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace tiles {
namespace {

constexpr int kTiles = 8, kMaxRows = 16, kMaxBytes = 64;

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct Registers {
  bool configured = false;
  Config config = {};
  int rows[kTiles] = {}, bytes_per_row[kTiles] = {};
  alignas(64) uint8_t data[kTiles][kMaxRows][kMaxBytes] = {};
};

thread_local Registers registers;

void require(bool holds, const char* rule) {
  if (holds) return;
  std::fprintf(stderr, "tile registers: %s\n", rule);
  std::abort();
}

void require_configured(int tile) {
  require(registers.configured, "used without a configuration");
  require(tile >= 0 && tile < kTiles && registers.rows[tile] > 0, "a tile that the configuration leaves out");
}

void require_product(int sums, int left, int right) {
  require_configured(sums);
  require_configured(left);
  require_configured(right);
  const Registers& r = registers;
  require(sums != left && sums != right && left != right, "a product of a tile with itself");
  require(r.rows[sums] == r.rows[left] && r.bytes_per_row[sums] == r.bytes_per_row[right] &&
              r.bytes_per_row[left] / 4 == r.rows[right],
          "a product of tiles that do not fit");
}

// Rounds to the nearest, flushes what is subnormal on the way in and out and reports no exception, while it lives. The
// barriers keep the arithmetic inside: it loads its operands behind the first and stores its results before the second.
class TileArithmetic {
 public:
  TileArithmetic() : before_(_mm_getcsr()) { set(0x9fc0); }
  ~TileArithmetic() { set(before_); }

 private:
  static void set(unsigned value) { asm volatile("ldmxcsr %0" : : "m"(value) : "memory"); }
  unsigned before_;
};

}  // namespace

void load_config(const void* memory) {
  Config config;
  std::memcpy(&config, memory, sizeof(config));
  require(config.palette == 1 && config.start_row == 0, "only palette 1 from row 0 is here");
  for (uint8_t byte : config.reserved) require(byte == 0, "reserved bytes of a configuration must be zero");
  for (int tile = kTiles; tile < 16; ++tile) {
    require(config.rows[tile] == 0 && config.bytes_per_row[tile] == 0, "a configuration of tiles that do not exist");
  }
  registers = {};
  for (int tile = 0; tile < kTiles; ++tile) {
    const int rows = config.rows[tile], bytes = config.bytes_per_row[tile];
    require(rows <= kMaxRows && bytes <= kMaxBytes && bytes % 4 == 0, "a tile larger than 16 rows of 64 bytes");
    require((rows == 0) == (bytes == 0), "a tile with rows or columns alone");
    registers.rows[tile] = rows;
    registers.bytes_per_row[tile] = bytes;
  }
  registers.config = config;
  registers.configured = true;
}

void store_config(void* memory) {
  std::memcpy(memory, &registers.config, sizeof(registers.config));
}

void release() {
  registers = {};
}

void zero(int tile) {
  require_configured(tile);
  std::memset(registers.data[tile], 0, sizeof(registers.data[tile]));
}

void load(int tile, const void* memory, long stride) {
  zero(tile);
  for (int row = 0; row < registers.rows[tile]; ++row) {
    std::memcpy(registers.data[tile][row], static_cast<const char*>(memory) + row * stride,
                registers.bytes_per_row[tile]);
  }
}

void store(int tile, void* memory, long stride) {
  require_configured(tile);
  for (int row = 0; row < registers.rows[tile]; ++row) {
    std::memcpy(static_cast<char*>(memory) + row * stride, registers.data[tile][row], registers.bytes_per_row[tile]);
  }
}

// The first elements of all pairs add up, in the order of K and from zero, and so do the second ones; then the two, and
// that goes to the sums.
void dot_bf16(int sums, int left, int right) {
  require_product(sums, left, right);
  const Registers& r = registers;
  const TileArithmetic mode;
  for (int row = 0; row < r.rows[left]; ++row) {
    __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
    for (int pair = 0; pair < r.rows[right]; ++pair) {
      uint32_t of_left;
      std::memcpy(&of_left, &r.data[left][row][4 * pair], sizeof(of_left));
      const __m512i of_right = _mm512_load_si512(r.data[right][pair]);
      const __m512i upper = _mm512_set1_epi32(int(0xffff0000u));
      first = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(int(of_left << 16))),
                              _mm512_castsi512_ps(_mm512_slli_epi32(of_right, 16)), first);
      second = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(int(of_left & 0xffff0000u))),
                               _mm512_castsi512_ps(_mm512_and_si512(of_right, upper)), second);
    }
    float* out = reinterpret_cast<float*>(registers.data[sums][row]);
    const __mmask16 columns = __mmask16((1u << (r.bytes_per_row[sums] / 4)) - 1);
    _mm512_mask_store_ps(out, columns, _mm512_add_ps(_mm512_load_ps(out), _mm512_add_ps(first, second)));
  }
}

// Signed bytes, four to a word; sums wrap around.
void dot_int8(int sums, int left, int right) {
  require_product(sums, left, right);
  Registers& r = registers;
  for (int row = 0; row < r.rows[left]; ++row) {
    auto* out = reinterpret_cast<uint32_t*>(r.data[sums][row]);
    for (int column = 0; column < r.bytes_per_row[sums] / 4; ++column) {
      for (int k = 0; k < r.bytes_per_row[left]; ++k) {
        const int a = static_cast<int8_t>(r.data[left][row][k]);
        out[column] += uint32_t(a * static_cast<int8_t>(r.data[right][k / 4][4 * column + k % 4]));
      }
    }
  }
}

}  // namespace tiles
