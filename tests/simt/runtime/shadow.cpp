#include "shadow.h"

namespace simt {

uint8_t Shadow::mask_of(uint32_t cell, uint32_t address, uint32_t bytes) {
  const uint32_t first = cell * 2;
  const bool low = address <= first;
  const bool high = first + 1 < address + bytes;
  return static_cast<uint8_t>((low ? 1 : 0) | (high ? 2 : 0));
}

Shadow::Conflict Shadow::check(uint32_t address, uint32_t bytes, Access access, uint32_t agent,
                               const Clock& clock) const {
  const uint32_t last = (address + bytes - 1) / 2;
  for (uint32_t i = address / 2; i <= last; ++i) {
    const Cell& cell = cells_[i];
    const uint8_t mask = mask_of(i, address, bytes);
    const bool both_atomic = cell.atomic && access == Access::kAtomic;
    if ((cell.write_mask & mask) != 0 && cell.write_time > start_ && cell.writer != agent &&
        !clock.sees(cell.writer, cell.write_time) && !both_atomic) {
      return {true, cell.atomic ? Access::kAtomic : Access::kWrite, cell.writer, i * 2, false};
    }
    if (access != Access::kRead && (cell.read_mask & mask) != 0 && cell.read_time > start_ && cell.reader != agent &&
        !clock.sees(cell.reader, cell.read_time)) {
      return {true, Access::kRead, cell.reader, i * 2, false};
    }
  }
  return {};
}

Shadow::Conflict Shadow::check_async_read(uint32_t address, uint32_t bytes, uint32_t async_agent,
                                          const Clock& clock) const {
  const uint32_t last = (address + bytes - 1) / 2;
  for (uint32_t i = address / 2; i <= last; ++i) {
    const Cell& cell = cells_[i];
    if (cell.write_mask == 0 || cell.write_time <= start_) continue;
    if (!clock.sees(cell.writer, cell.write_time)) return {true, Access::kWrite, cell.writer, i * 2, false};
    if (cell.writer != async_agent && !clock.sees_fenced(cell.writer, cell.write_time)) {
      return {true, Access::kWrite, cell.writer, i * 2, true};
    }
  }
  return {};
}

void Shadow::record(uint32_t address, uint32_t bytes, Access access, uint32_t agent, uint32_t time) {
  const uint32_t last = (address + bytes - 1) / 2;
  for (uint32_t i = address / 2; i <= last; ++i) {
    Cell& cell = cells_[i];
    const uint8_t mask = mask_of(i, address, bytes);
    if (access == Access::kRead) {
      // A second reader replaces the first, except at the same time as itself: then the masks add up.
      const bool again = cell.reader == agent && cell.read_time == time;
      cell.read_mask = again ? (cell.read_mask | mask) : mask;
      cell.reader = static_cast<uint16_t>(agent);
      cell.read_time = time;
    } else {
      const bool again = cell.writer == agent && cell.write_time == time;
      cell.write_mask = again ? (cell.write_mask | mask) : mask;
      cell.writer = static_cast<uint16_t>(agent);
      cell.write_time = time;
      cell.atomic = access == Access::kAtomic;
    }
  }
}

}  // namespace simt
