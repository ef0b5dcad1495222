// What the lanes of a warp do together: shuffles, votes, reductions, __syncwarp, elect.
#include <algorithm>

#include "emulated.h"
#include "state.h"

namespace simt {
namespace {

constexpr uint32_t kFullMask = 0xFFFFFFFF;

bool complete(const Meeting& meeting, const Warp& warp) {
  return (meeting.mask & warp.live & ~meeting.arrived) == 0;
}

// Ends the meeting at `position`; everyone but `caller` waits and is woken.
void conclude(Warp& warp, size_t position, const Thread* caller) {
  const Meeting meeting = warp.meetings[position];
  warp.meetings.erase(warp.meetings.begin() + static_cast<std::ptrdiff_t>(position));
  meeting.finish(warp, meeting.lanes, meeting.data, meeting.arrived);
  for (Thread* lane : meeting.lanes) {
    if (lane != nullptr && lane != caller) wake(lane);
  }
}

}  // namespace

void meet(const char* name, uint32_t mask, void* data, Meeting::Finish finish) {
  Warp& warp = *self->warp;
  const uint32_t bit = 1u << self->lane;
  if ((mask & bit) == 0) fail("%s: the mask 0x%08x does not name the calling lane %u", name, mask, self->lane);
  size_t position = 0;
  while (position < warp.meetings.size() && warp.meetings[position].mask != mask) ++position;
  if (position == warp.meetings.size()) {
    Meeting meeting{};
    meeting.name = name;
    meeting.mask = mask;
    meeting.finish = finish;
    warp.meetings.push_back(meeting);
  }
  Meeting& meeting = warp.meetings[position];
  if (meeting.finish != finish || std::string(meeting.name) != name) {
    fail("divergence: lane %u of warp %u is at %s, others of its mask 0x%08x are at %s", self->lane, warp.index, name,
         mask, meeting.name);
  }
  meeting.arrived |= bit;
  meeting.lanes[self->lane] = self;
  meeting.data[self->lane] = data;
  if (complete(meeting, warp)) {
    conclude(warp, position, self);
    maybe_step_aside();
  } else {
    wait_here({name, ", where lanes meet (mask 0x%08llx)", {mask}});
  }
}

void finish_meetings_after_exit(Warp& warp) {
  for (size_t i = warp.meetings.size(); i > 0; --i) {
    if (complete(warp.meetings[i - 1], warp)) conclude(warp, i - 1, nullptr);
  }
}

void syncwarp(uint32_t mask) {
  meet("__syncwarp", mask, nullptr, [](Warp&, Thread* const lanes[], void* const[], uint32_t) {
    Clock all;
    all.reset(block->num_agents(), 0);
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if (lanes[i] != nullptr) all.join(lanes[i]->clock);
    }
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if (lanes[i] == nullptr) continue;
      lanes[i]->clock.join(all);
      lanes[i]->release();
    }
  });
}

namespace {

struct ShuffleLane {
  Shuffle kind;
  uint64_t value;
  int operand;
  int width;
  uint64_t result;
};

unsigned shuffle_source(const ShuffleLane& lane, unsigned me) {
  const auto width = static_cast<unsigned>(lane.width);
  const auto operand = static_cast<unsigned>(lane.operand);
  const unsigned base = me & ~(width - 1);
  switch (lane.kind) {
    case Shuffle::kIndex:
      return base + (operand & (width - 1));
    case Shuffle::kUp:
      return me < base + operand ? me : me - operand;
    case Shuffle::kDown:
      return me + operand >= base + width ? me : me + operand;
    case Shuffle::kXor:
      break;
  }
  return (me ^ operand) >= base + width ? me : (me ^ operand);
}

}  // namespace

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int operand, int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail("a shuffle's width must be a power of two up to 32, got %d", width);
  }
  ShuffleLane lane{kind, value, operand, width, 0};
  meet("a shuffle", mask, &lane, [](Warp&, Thread* const[], void* const data[], uint32_t active) {
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if ((active >> i & 1) == 0) continue;
      auto& mine = *static_cast<ShuffleLane*>(data[i]);
      const unsigned source = shuffle_source(mine, i);
      // What a lane outside the mask would give is undefined.
      const bool defined = source < kWarpSize && (active >> source & 1) != 0;
      mine.result = defined ? static_cast<const ShuffleLane*>(data[source])->value : ~uint64_t{0};
    }
  });
  return lane.result;
}

uint32_t ballot(uint32_t mask, bool predicate) {
  struct Lane {
    bool predicate;
    uint32_t result;
  } lane{predicate, 0};
  meet("a vote", mask, &lane, [](Warp&, Thread* const[], void* const data[], uint32_t active) {
    uint32_t votes = 0;
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if ((active >> i & 1) != 0 && static_cast<Lane*>(data[i])->predicate) votes |= 1u << i;
    }
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if ((active >> i & 1) != 0) static_cast<Lane*>(data[i])->result = votes;
    }
  });
  return lane.result;
}

uint32_t match_any(uint32_t mask, uint64_t value) {
  struct Lane {
    uint64_t value;
    uint32_t result;
  } lane{value, 0};
  meet("__match_any_sync", mask, &lane, [](Warp&, Thread* const[], void* const data[], uint32_t active) {
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if ((active >> i & 1) == 0) continue;
      auto& mine = *static_cast<Lane*>(data[i]);
      for (unsigned j = 0; j < kWarpSize; ++j) {
        if ((active >> j & 1) != 0 && static_cast<Lane*>(data[j])->value == mine.value) mine.result |= 1u << j;
      }
    }
  });
  return lane.result;
}

uint32_t reduce(Reduce kind, uint32_t mask, uint32_t value) {
  struct Lane {
    Reduce kind;
    uint32_t value;
    uint32_t result;
  } lane{kind, value, 0};
  meet("a __reduce_*_sync", mask, &lane, [](Warp&, Thread* const[], void* const data[], uint32_t active) {
    bool first = true;
    uint32_t result = 0;
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if ((active >> i & 1) == 0) continue;
      const auto& mine = *static_cast<const Lane*>(data[i]);
      const uint32_t v = mine.value;
      if (first) {
        result = v;
        first = false;
        continue;
      }
      switch (mine.kind) {
        case Reduce::kAdd:
          result += v;
          break;
        case Reduce::kMin:
          result = std::min(result, v);
          break;
        case Reduce::kMax:
          result = std::max(result, v);
          break;
        case Reduce::kSignedMin:
          result = static_cast<uint32_t>(std::min(static_cast<int32_t>(result), static_cast<int32_t>(v)));
          break;
        case Reduce::kSignedMax:
          result = static_cast<uint32_t>(std::max(static_cast<int32_t>(result), static_cast<int32_t>(v)));
          break;
        case Reduce::kAnd:
          result &= v;
          break;
        case Reduce::kOr:
          result |= v;
          break;
        case Reduce::kXor:
          result ^= v;
          break;
      }
    }
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if ((active >> i & 1) != 0) static_cast<Lane*>(data[i])->result = result;
    }
  });
  return lane.result;
}

bool elect_one() {
  // Which lane is the hardware's choice, but always the same one.
  const unsigned elected = options.seed == 0 ? 0 : static_cast<unsigned>(options.seed * 7 % kWarpSize);
  if (self->warp->live != kFullMask) fail("elect_one needs all 32 lanes of the warp");
  meet("elect.sync", kFullMask, nullptr, [](Warp&, Thread* const[], void* const[], uint32_t) {});
  return self->lane == elected;
}

uint3 thread_index() {
  return self->index;
}

uint3 block_index() {
  return block->index;
}

dim3 block_shape() {
  return block->shape;
}

dim3 grid_shape() {
  return block->grid;
}

}  // namespace simt
