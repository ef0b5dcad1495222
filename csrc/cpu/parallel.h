// Helpers over `Parallel`: when to use other threads at all, and how to share work that is uneven.
#pragma once

#include <cstdint>

#include "moekernels/cpu.h"

namespace moekernels::cpu {

template <class T>
T* scratch(const Parallel& parallel, int64_t count) {
  if (count <= 0) return nullptr;
  return static_cast<T*>(parallel.scratch(parallel.pool, count * static_cast<int64_t>(sizeof(T))));
}

// Runs body(begin, end) over [0, n) in pieces of at least `grain`, on the calling thread alone where one piece is all.
template <class Function>
void for_ranges(const Parallel& parallel, int64_t n, int64_t grain, const Function& body) {
  constexpr int64_t kPiecesPerThread = 4;  // evens out threads that start late
  if (n <= 0) return;
  int64_t pieces = n / (grain > 0 ? grain : 1);
  if (pieces > parallel.num_threads * kPiecesPerThread) pieces = parallel.num_threads * kPiecesPerThread;
  if (pieces <= 1 || parallel.num_threads <= 1) {
    body(int64_t{0}, n);
    return;
  }
  struct Context {
    const Function& body;
    int64_t n, pieces;
  } context{body, n, pieces};
  parallel.run(
      parallel.pool, pieces,
      [](void* opaque, int64_t begin, int64_t end) {
        const auto& c = *static_cast<const Context*>(opaque);
        c.body(begin * c.n / c.pieces, end * c.n / c.pieces);
      },
      &context);
}

// Runs body(worker) once for every worker in [0, workers): each then takes its share from a common counter.
template <class Function>
void for_workers(const Parallel& parallel, int64_t workers, const Function& body) {
  if (workers <= 1 || parallel.num_threads <= 1) {
    for (int64_t worker = 0; worker < workers; ++worker) body(worker);
    return;
  }
  parallel.run(
      parallel.pool, workers,
      [](void* opaque, int64_t begin, int64_t end) {
        for (int64_t worker = begin; worker < end; ++worker) (*static_cast<const Function*>(opaque))(worker);
      },
      const_cast<Function*>(&body));
}

}  // namespace moekernels::cpu
