// Element type T (ELEMENT: 0 f32, 1 bf16, 2 f16) with conversions that need no toolkit headers, and R, the
// type of the residual stream (RESIDUAL: likewise), which is f32 beside f16, whose range the stream leaves.
// All arithmetic is f32; T and R are storage formats.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define INFINITY __int_as_float(0x7f800000)
#define RESIDUAL (ELEMENT == 2 ? 0 : ELEMENT)

#if ELEMENT == 0
typedef float T;
#define VECTOR 4
#define EXP expf
#define TANH tanhf
#define QUOTIENT(x, y) ((x) / (y))
__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ T store(float x) { return x; }
#else
struct T { u16 bits; };
#define VECTOR 8
#define EXP __expf
#define TANH tanh_fast
#define QUOTIENT(x, y) __fdividef(x, y)
// tanh(x) = 1 - 2 / (e^2x + 1), to about 1e-7 absolute.
__device__ __forceinline__ float tanh_fast(float x) {
  return 1.f - __fdividef(2.f, __expf(2.f * fminf(x, 40.f)) + 1.f);
}
__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ void put(float& to, float x) { to = x; }
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
__device__ __forceinline__ void put(T& to, float x) { to = store(x); }

#if RESIDUAL == 0
typedef float R;
#else
typedef T R;
#endif

// 16 bytes of elements: one load or store instruction; and as many of the residual stream.
template <typename E> struct __align__(16) PackOf { E v[VECTOR]; };
typedef PackOf<T> Pack;
typedef PackOf<R> RPack;
typedef PackOf<float> Floats;

// x rounded to bf16 (to nearest, ties to even), or to f16.
__device__ __forceinline__ float round_bf16(float x) {
  u32 b = __float_as_uint(x);
  return x != x ? x : __uint_as_float((b + 0x7fffu + ((b >> 16) & 1u)) & 0xffff0000u);
}
__device__ __forceinline__ float round_f16(float x) {
  u16 half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
  return x;
}

// c tanh(x / c), and its derivative in x.
__device__ __forceinline__ float softcapped(float x, float c, float& slope) {
  float t = TANH(QUOTIENT(x, c));
  slope = 1.f - t * t;
  return c * t;
}

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
