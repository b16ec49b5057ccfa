// The GPU's own instructions, each under a name.
#pragma once

#include <cuda.h>

#include <cstdint>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "compute capability 8.0 is the oldest: bf16 conversions, cp.async"
#endif

namespace saesteer::cuda {

extern __shared__ __align__(1024) unsigned char shared_bytes[];

// The block's dynamic shared memory, from a byte on.
template <class T>
__device__ inline T* shared(int64_t from = 0) {
  return reinterpret_cast<T*>(shared_bytes + from);
}

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- numbers ----

__device__ inline float f16_to_f32(uint16_t bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}

__device__ inline uint16_t f32_to_f16(float v) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}

__device__ inline uint16_t f32_to_bf16(float v) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}

// NaN if one of them is.
__device__ inline float larger(float a, float b) {
  float v;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
}

__device__ inline int lowest_bit(uint64_t word) {
  return __ffsll(static_cast<long long>(word)) - 1;
}

// ---- threads ----

__device__ inline void sync_threads() { __syncthreads(); }
__device__ inline bool sync_threads_or(bool v) { return __syncthreads_or(v); }
__device__ inline int sync_threads_count(bool v) { return __syncthreads_count(v); }
__device__ inline void sync_warp() { __syncwarp(); }

// Among `threads` threads that name the same barrier; 0 is sync_threads's own.
__device__ inline bool sync_some_or(int barrier, int threads, bool v) {
  int any;
  asm volatile(
      "{\n .reg .pred p, q;\n setp.ne.s32 p, %1, 0;\n"
      " barrier.cta.red.or.pred q, %2, %3, p;\n selp.s32 %0, 1, 0, q;\n}"
      : "=r"(any)
      : "r"(static_cast<int>(v)), "r"(barrier), "r"(threads)
      : "memory");
  return any;
}

template <class T>
__device__ inline T shuffle_xor(T v, int lanes) {
  return __shfl_xor_sync(0xFFFFFFFFu, v, lanes);
}

__device__ inline int atomic_add(int* at, int v) { return atomicAdd(at, v); }

// What other blocks may be adding to.
__device__ inline int load_relaxed(const int* at) {
  int v;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
  return v;
}

// ---- asynchronous copies, 16 bytes each ----

// With `there` false the 16 bytes become zero and `from` is not read. Rows are read on and on, so
// 256 bytes at a time may come from device memory.
__device__ inline void copy_async(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `kBehind` of this thread's groups are unfinished.
template <int kBehind>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kBehind) : "memory");
}

// These bytes, a multiple of 16, will be read soon: from Hopper on they come to the second-level
// cache meanwhile.
__device__ inline void fetch_ahead(const void* from, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)),
               "r"(bytes));
#endif
}

// ---- 16-bit products of a warp: m16n8k16, summed in fp32 ----

__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

template <bool kBf16>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  if constexpr (kBf16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- Hopper: barriers in shared memory, tensor copies, products of a warpgroup ----

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ inline void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// After initialisation, so that tensor copies see it.
__device__ inline void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// The phase does not end before so many bytes more have been copied.
__device__ inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Until the phase of this parity has ended.
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n .reg .pred done;\nagain:\n"
      " mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      " @!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A box of a matrix, its column first; elements outside the matrix are zero. Rows of 128 bytes,
// swizzled.
__device__ inline void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, int column,
                                int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// What this thread wrote to shared memory becomes visible to tensor copies and wgmma.
__device__ inline void publish_writes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Rows of 128 bytes, in groups of 8 that lie 1024 bytes apart, swizzled; aligned to 1024 bytes.
__device__ inline uint64_t describe(const void* p) {
  const uint64_t address = shared_address(p);
  constexpr uint64_t kUnused = 1, kGroupsApart = 1024 >> 4, kSwizzle128 = 1;
  return (address & 0x3FFFF) >> 4 | kUnused << 16 | kGroupsApart << 32 | kSwizzle128 << 62;
}
// The same matrix from so many bytes further along its rows.
__device__ inline uint64_t along(uint64_t description, int bytes) {
  return description + (bytes >> 4);
}

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `kBehind` of this warpgroup's groups are unfinished.
template <int kBehind>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kBehind) : "memory");
}

// Nothing that uses these registers moves across this line, from where products still write them.
template <int kCount>
__device__ __forceinline__ void fence_registers(float (&c)[kCount]) {
#pragma unroll
  for (float& v : c) asm volatile("" : "+f"(v)::"memory");
}

#define SAESTEER_4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SAESTEER_16(c, i) \
  SAESTEER_4(c, i), SAESTEER_4(c, i + 4), SAESTEER_4(c, i + 8), SAESTEER_4(c, i + 12)
#define SAESTEER_32(c, i) SAESTEER_16(c, i), SAESTEER_16(c, i + 16)
#define SAESTEER_96(c) SAESTEER_32(c, 0), SAESTEER_32(c, 32), SAESTEER_32(c, 64)
#define SAESTEER_NAMES_96                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SAESTEER_NAMES_128                                                               \
  SAESTEER_NAMES_96                                                                      \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109"     \
  ", %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123" \
  ", %124, %125, %126, %127"
#define SAESTEER_WGMMA(columns, type, names, left, right, adds, ...)                            \
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, " adds                                       \
               ", 0;\n"                                                                         \
               " wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" names \
               "}, " left ", " right ", p, 1, 1, 0, 0;\n}"                                      \
               : __VA_ARGS__                                                                    \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)))
#define SAESTEER_WGMMA_192(type) \
  SAESTEER_WGMMA("192", type, SAESTEER_NAMES_96, "%96", "%97", "%98", SAESTEER_96(c))
#define SAESTEER_WGMMA_256(type)                                                          \
  SAESTEER_WGMMA("256", type, SAESTEER_NAMES_128, "%128", "%129", "%130", SAESTEER_96(c), \
                 SAESTEER_32(c, 96))

// c = a b^T, added to c if `add`: 64 rows of a, 192 or 256 of b, 16 elements each. Thread t of the
// warpgroup has row t / 4 % 8 + 8 (i / 2 % 2) + 16 (t / 32) and column 8 (i / 4) + 2 (t % 4) + i %
// 2 of the result in c[i].
template <bool kBf16>
__device__ inline void multiply_group(float (&c)[96], uint64_t a, uint64_t b, bool add) {
  if constexpr (kBf16)
    SAESTEER_WGMMA_192("bf16");
  else
    SAESTEER_WGMMA_192("f16");
}
template <bool kBf16>
__device__ inline void multiply_group(float (&c)[128], uint64_t a, uint64_t b, bool add) {
  if constexpr (kBf16)
    SAESTEER_WGMMA_256("bf16");
  else
    SAESTEER_WGMMA_256("f16");
}

#undef SAESTEER_WGMMA_256
#undef SAESTEER_WGMMA_192
#undef SAESTEER_WGMMA
#undef SAESTEER_NAMES_128
#undef SAESTEER_NAMES_96
#undef SAESTEER_96
#undef SAESTEER_32
#undef SAESTEER_16
#undef SAESTEER_4

#endif

}  // namespace saesteer::cuda
