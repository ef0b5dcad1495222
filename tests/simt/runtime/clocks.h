// Vector clocks: who has synchronised with whom inside a block.
//
// Every thread, and every engine that works beside the threads, is an *agent* with a counter that moves on when it
// releases something (arrives at a barrier). A clock holds, for each agent, the latest time of it that is known. An
// access by agent `a` at its time `t` happened before everything that knows `a` at `t` or later.
//
// `seen` is that knowledge. `visible` is the part of it that a proxy fence stood behind: ordinary accesses up to there
// may be read through the async proxy (see ptx::fence_proxy_async). It is empty where nobody has fenced.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace simt {

struct Clock {
  std::vector<uint32_t> seen;
  std::vector<uint32_t> visible;

  void reset(size_t agents, uint32_t time) {
    seen.assign(agents, time);
    visible.clear();
  }

  // Learns what `other` knows.
  void join(const Clock& other) {
    maximum(seen, other.seen);
    if (visible.empty()) {
      visible = other.visible;
    } else if (!other.visible.empty()) {
      maximum(visible, other.visible);
    }
  }

  // Forgets what `other` does not know: the knowledge of a group is what each of its members has.
  void meet(const Clock& other) {
    minimum(seen, other.seen);
    if (other.visible.empty()) {
      visible.clear();
    } else if (!visible.empty()) {
      minimum(visible, other.visible);
    }
  }

  void fence() {
    if (visible.empty()) {
      visible = seen;
    } else {
      maximum(visible, seen);
    }
  }

  bool sees(uint32_t agent, uint32_t time) const { return seen[agent] >= time; }
  bool sees_fenced(uint32_t agent, uint32_t time) const { return !visible.empty() && visible[agent] >= time; }

 private:
  static void maximum(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
    const uint32_t* source = from.data();
    uint32_t* target = to.data();
    for (size_t i = 0, n = to.size(); i < n; ++i) target[i] = std::max(target[i], source[i]);
  }

  static void minimum(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
    const uint32_t* source = from.data();
    uint32_t* target = to.data();
    for (size_t i = 0, n = to.size(); i < n; ++i) target[i] = std::min(target[i], source[i]);
  }
};

}  // namespace simt
