// Counts the bytes that a process has allocated, whoever asks: PyTorch, operator new, a library's
// scratch. Preloaded, it stands before glibc's allocator and hands every call on to it. A block
// counts with all that malloc made usable; stacks, and what is mapped without malloc, do not.
#include <errno.h>
#include <malloc.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);
}

namespace {

std::atomic<int64_t> live{0}, most{0};

void* counted(void* block) {
  if (block == nullptr) return block;
  const int64_t now = live += static_cast<int64_t>(malloc_usable_size(block));
  for (int64_t seen = most; seen < now && !most.compare_exchange_weak(seen, now);) {
  }
  return block;
}

void uncount(size_t bytes) { live -= static_cast<int64_t>(bytes); }

}  // namespace

extern "C" {

int64_t heap_live() { return live; }

// The most since the last call, in which the count begins anew.
int64_t heap_peak() { return most.exchange(live); }

void* malloc(size_t size) { return counted(__libc_malloc(size)); }

void* calloc(size_t count, size_t size) { return counted(__libc_calloc(count, size)); }

void* realloc(void* block, size_t size) {
  const size_t before = malloc_usable_size(block);
  void* moved = __libc_realloc(block, size);
  if (moved != nullptr || size == 0) uncount(before);
  return counted(moved);
}

void free(void* block) {
  uncount(malloc_usable_size(block));
  __libc_free(block);
}

void* memalign(size_t alignment, size_t size) { return counted(__libc_memalign(alignment, size)); }

void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void** block, size_t alignment, size_t size) {
  void* found = memalign(alignment, size);
  if (found == nullptr) return ENOMEM;
  *block = found;
  return 0;
}

void* valloc(size_t size) { return memalign(static_cast<size_t>(sysconf(_SC_PAGESIZE)), size); }

}  // extern "C"
