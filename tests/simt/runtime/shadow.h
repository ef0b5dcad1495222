// Shadow of the shared memory: who touched each pair of bytes last, to find accesses that nothing orders.
#pragma once

#include <cstdint>
#include <vector>

#include "clocks.h"

namespace simt {

enum class Access : uint8_t { kRead, kWrite, kAtomic };

class Shadow {
 public:
  // The earlier access that a check objects to.
  struct Conflict {
    bool found = false;
    Access earlier = Access::kRead;
    uint32_t agent = 0;
    uint32_t address = 0;
    bool unfenced = false;  // ordered, but written through the generic proxy with no fence before this async read
  };

  void resize(uint32_t bytes) { cells_.resize((bytes + 1) / 2); }

  // Forgets everything up to this time: it belongs to earlier blocks, whose agents are not those of the next.
  void start_block(uint32_t time) { start_ = time; }

  // Does an access by `agent`, which knows `clock`, conflict with an earlier one?
  Conflict check(uint32_t address, uint32_t bytes, Access access, uint32_t agent, const Clock& clock) const;

  // The same for a read through the async proxy, which also needs a proxy fence after ordinary writes.
  // `async_agent` is the agent whose writes come through the async proxy themselves.
  Conflict check_async_read(uint32_t address, uint32_t bytes, uint32_t async_agent, const Clock& clock) const;

  void record(uint32_t address, uint32_t bytes, Access access, uint32_t agent, uint32_t time);

 private:
  // The masks say which of the two bytes.
  struct Cell {
    uint32_t write_time = 0;
    uint32_t read_time = 0;
    uint16_t writer = 0;
    uint16_t reader = 0;
    uint8_t write_mask = 0;
    uint8_t read_mask = 0;
    bool atomic = false;
  };

  static uint8_t mask_of(uint32_t cell, uint32_t address, uint32_t bytes);

  std::vector<Cell> cells_;
  uint32_t start_ = 0;
};

}  // namespace simt
