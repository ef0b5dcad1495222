// What the compiler calls at every memory access of a kernel.
//
// Kernels are compiled with -fsanitize=thread and -fsanitize=alignment,bounds, but linked with neither sanitizer's
// library: the calls that the compiler inserts arrive here instead.
#include <cstdint>
#include <cstdlib>

#include "state.h"

using simt::Access;
using simt::on_access;

namespace {

void on_read(const void* p, size_t bytes) {
  on_access(p, bytes, Access::kRead);
}
void on_write(const void* p, size_t bytes) {
  on_access(p, bytes, Access::kWrite);
}

// The beginning of the compiler's own record of a checked place.
struct SourceLocation {
  const char* file;
  uint32_t line;
  uint32_t column;
};

struct TypeDescriptor {
  uint16_t kind;
  uint16_t info;
  char name[1];
};

struct TypeMismatch {
  SourceLocation location;
  const TypeDescriptor* type;
  unsigned char log_alignment;
  unsigned char check_kind;
};

struct OutOfBounds {
  SourceLocation location;
  const TypeDescriptor* array_type;
  const TypeDescriptor* index_type;
};

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

#define SIMT_HOOKS(bytes)                       \
  void __tsan_read##bytes(void* p) {            \
    on_read(p, bytes);                          \
  }                                             \
  void __tsan_write##bytes(void* p) {           \
    on_write(p, bytes);                         \
  }                                             \
  void __tsan_volatile_read##bytes(void* p) {   \
    on_read(p, bytes);                          \
  }                                             \
  void __tsan_volatile_write##bytes(void* p) {  \
    on_write(p, bytes);                         \
  }                                             \
  void __tsan_unaligned_read##bytes(void* p) {  \
    on_read(p, bytes);                          \
  }                                             \
  void __tsan_unaligned_write##bytes(void* p) { \
    on_write(p, bytes);                         \
  }
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
#undef SIMT_HOOKS

void __tsan_read_range(void* p, size_t bytes) {
  if (bytes != 0) on_read(p, bytes);
}
void __tsan_write_range(void* p, size_t bytes) {
  if (bytes != 0) on_write(p, bytes);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Host code's atomics (guards of static variables); kernels use the functions of cuda_builtins.h.
#define SIMT_ATOMICS(bits)                                                                                \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) {                      \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                       \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t value, int) {               \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                       \
  uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* p, uint##bits##_t value, int) {  \
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);                                               \
  }                                                                                                       \
  uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t* p, uint##bits##_t value, int) { \
    return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);                                                \
  }                                                                                                       \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile uint##bits##_t* p, uint##bits##_t* expected, \
                                                    uint##bits##_t value, int, int) {                     \
    return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);    \
  }
SIMT_ATOMICS(8)
SIMT_ATOMICS(32)
SIMT_ATOMICS(64)
#undef SIMT_ATOMICS

void __assert_fail(const char* assertion, const char* file, unsigned line, const char*) {
  if (simt::self == nullptr) abort();
  simt::fail("assertion '%s' at %s:%u", assertion, file, line);
}

void __ubsan_handle_type_mismatch_v1_abort(const TypeMismatch* mismatch, uintptr_t pointer) {
  if (pointer == 0) {
    simt::fail("null pointer: access as %s at %s:%u", mismatch->type->name, mismatch->location.file,
               mismatch->location.line);
  }
  simt::fail("misaligned address: %p accessed as %s, which needs %u bytes, at %s:%u", reinterpret_cast<void*>(pointer),
             mismatch->type->name, 1u << mismatch->log_alignment, mismatch->location.file, mismatch->location.line);
}

void __ubsan_handle_out_of_bounds_abort(const OutOfBounds* what, uintptr_t index) {
  simt::fail("index %td out of bounds of %s at %s:%u", static_cast<ptrdiff_t>(index), what->array_type->name,
             what->location.file, what->location.line);
}

}  // extern "C"
