// Element type T (ELEMENT: 0 f32, 1 bf16, 2 f16) with conversions that need no toolkit headers.
// All arithmetic is f32; T is a storage format.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define INFINITY __int_as_float(0x7f800000)

#if ELEMENT == 0
typedef float T;
#define VECTOR 4
#define EXP expf
__device__ __forceinline__ float load(T x) { return x; }
__device__ __forceinline__ T store(float x) { return x; }
#else
struct T { u16 bits; };
#define VECTOR 8
#define EXP __expf
#if ELEMENT == 1
__device__ __forceinline__ float load(T x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ T store(float x) {  // round to nearest, ties to even
  T r;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
#else
  u32 b = __float_as_uint(x);
  r.bits = x != x ? 0x7fff : (u16)((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
#endif
  return r;
}
#else
__device__ __forceinline__ float load(T x) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
}
__device__ __forceinline__ T store(float x) {
  T r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
  return r;
}
#endif
#endif

// 16 bytes of elements: one load or store instruction.
struct __align__(16) Pack { T v[VECTOR]; };

// Sum over a block of 32 * k threads, the same value in every thread, in a fixed order.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float partial[32];
  for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  __syncthreads();
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  float sum = 0.f;
  for (int i = 0; i < (int)(blockDim.x >> 5); i++) sum += partial[i];
  return sum;
}
