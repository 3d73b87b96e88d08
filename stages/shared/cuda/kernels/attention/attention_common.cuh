// Building blocks shared by the flash attention kernels (forward and backward).
//
// Compile-time parameters (-D):
//   HEAD_DIM  64, 128 or 256
//   SOFTCAP   0 or 1: scores become softcap * tanh(score / softcap) (Gemma 2)
//   F16       1: elements are f16 (needed below sm_80), otherwise bf16
//   NO_WGMMA  defined: use mma.sync on sm_90a too
//   ARCH      the architecture whose instructions and tile sizes are used, in place of __CUDA_ARCH__
//
// A host that compiles without an include path puts this text before that of a kernel file.
//
// Layout. Tensors are packed: row i is token i of the micro-batch, a head takes HEAD_DIM contiguous
// elements, and rows are `stride` elements apart (a multiple of 8), so that q, k and v may share one buffer.
// `bounds[i]` is the half-open range [x, y) of tokens of row i's segment (attention_segments.cu).
//
// Shared memory. A tile of R rows is kept as HEAD_DIM / 64 panels of R x 128 bytes; the 16-byte chunk c of
// row r lies at chunk c ^ (r & 7). That is the 128-byte swizzle of wgmma, and it keeps ldmatrix free of bank
// conflicts, so that both paths share loads, stores and kernels.
//
// Matrix products. Everything is built of two products, each with f32 accumulators in the fragment layout of
// mma.m16n8k16 (lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and + 1 of every 8), which wgmma shares:
//   product_abt   C  = A Bt   A and B in shared memory, rows along HEAD_DIM
//   product_pb    C += P B    P in registers (a converted accumulator), B in shared memory
#ifndef ATTENTION_COMMON
#define ATTENTION_COMMON

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef SOFTCAP
#define SOFTCAP 0
#endif
#ifndef F16
#define F16 0
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(NO_WGMMA)
#define WGMMA 1
#else
#define WGMMA 0
#endif

#ifndef ARCH
#define ARCH __CUDA_ARCH__
#endif

// Shared memory that one block may use, in KiB: sm_75 64, sm_80 163, sm_86 and sm_89 99, sm_90 227.
#if ARCH < 800
#define SHARED_KIB 64
#elif ARCH == 860 || ARCH == 890 || ARCH >= 1200
#define SHARED_KIB 99
#elif ARCH < 900
#define SHARED_KIB 163
#else
#define SHARED_KIB 227
#endif

// Elements are opaque: conversions are instructions, so that no toolkit header is needed.
struct element { unsigned short bits; };
struct element2 { unsigned int bits; };
#if F16
__device__ __forceinline__ element2 to_element2(float low, float high) {
    element2 pair;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair.bits) : "f"(high), "f"(low));
#else
    unsigned short l, h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(l) : "f"(low));
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(high));
    pair.bits = l | static_cast<unsigned int>(h) << 16;
#endif
    return pair;
}
__device__ __forceinline__ float2 to_float2(element2 pair) {
    float2 r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r.x) : "h"(static_cast<unsigned short>(pair.bits)));
    asm("cvt.f32.f16 %0, %1;" : "=f"(r.y) : "h"(static_cast<unsigned short>(pair.bits >> 16)));
    return r;
}
#define MMA_TYPE "f16.f16"
#else
__device__ __forceinline__ element2 to_element2(float low, float high) {
    element2 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair.bits) : "f"(high), "f"(low));
    return pair;
}
__device__ __forceinline__ float2 to_float2(element2 pair) {
    return make_float2(__uint_as_float(pair.bits << 16), __uint_as_float(pair.bits & 0xffff0000u));
}
#define MMA_TYPE "bf16.bf16"
#endif

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int CHUNKS = HEAD_DIM / 8;    // 16-byte chunks of a row
constexpr int COLUMN_TILES = HEAD_DIM / 8;  // mma column tiles of a row
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

__host__ __device__ constexpr int tile_bytes(int rows) { return rows * HEAD_DIM * 2; }

__device__ __forceinline__ u32 pack(float low, float high) {
    element2 pair = to_element2(low, high);
    return *reinterpret_cast<u32*>(&pair);
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// tanh(x) = 1 - 2 / (e^2x + 1), to about 1e-7 absolute; tanh.approx would be off by 5e-4.
__device__ __forceinline__ float tanh_fast(float x) {
    return 1.0f - __fdividef(2.0f, exp2_fast(2.0f * LOG2_E * fminf(x, 40.0f)) + 1.0f);
}

// The shared address of dynamic shared memory, aligned to the 1024 bytes over which the swizzle repeats.
// Kernels ask for 1024 bytes more than they use.
__device__ __forceinline__ u32 shared_base() {
    extern __shared__ unsigned char shared_memory[];
    return (static_cast<u32>(__cvta_generic_to_shared(shared_memory)) + 1023u) & ~1023u;
}

// --- loads and stores -------------------------------------------------------------------------------------

// Offset in bytes of chunk `chunk` of row `row` in a tile of ROWS rows.
template <int ROWS>
__device__ __forceinline__ u32 tile_offset(int row, int chunk) {
    return (chunk >> 3) * (ROWS * 128) + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
}

// 16 bytes from global to shared memory; zeros, and no read, where `valid` is false.
__device__ __forceinline__ void copy_16(u32 to, const void* from, bool valid) {
#if ARCH >= 800
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
#else
    uint4 value = valid ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
#endif
}

// 4 bytes from global to shared memory.
__device__ __forceinline__ void copy_4(u32 to, const float* from) {
#if ARCH >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
#else
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(*from) : "memory");
#endif
}

__device__ __forceinline__ void store_shared(u32 to, u32 value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

__device__ __forceinline__ float2 load_shared_float2(u32 from) {
    float2 value;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(from));
    return value;
}

// Starts to load rows [row, row + ROWS) of a head into a tile; rows from `rows` on read as zeros.
template <int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(u32 tile, const element* head, long long stride, int row, int rows) {
    constexpr int TOTAL = ROWS * CHUNKS, STEP = THREADS / CHUNKS;
    static_assert(THREADS % CHUNKS == 0, "a thread keeps its column");
    int r = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    const element* from = head + static_cast<long long>(row + r) * stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < (TOTAL + THREADS - 1) / THREADS; ++i) {
        if (TOTAL % THREADS != 0 && threadIdx.x + i * THREADS >= TOTAL) break;
        copy_16(tile + tile_offset<ROWS>(r + i * STEP, chunk), from, row + r + i * STEP < rows);
        from += STEP * stride;
    }
}

// Waits for all loads of this thread, makes them visible to wgmma, and meets the block's other threads.
__device__ __forceinline__ void wait_for_loads() {
#if ARCH >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
#if WGMMA
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    __syncthreads();
}

// Writes a warp's accumulator rows, times `factor`, through its rows of a tile in shared memory that nobody
// else reads any more; whole 16-byte chunks go out. `first` is the warp's first row within the tile.
template <int ROWS, int M>
__device__ __forceinline__ void store_rows(u32 tile, int first, const float (&sum)[M][COLUMN_TILES][4],
                                           const float (&factor)[M][2], element* head, long long stride, int row,
                                           int rows) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < M; ++m) {
        int r = first + m * 16 + lane / 4;
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; ++c) {
            u32 inner = (lane & 3) * 4;
            store_shared(tile + tile_offset<ROWS>(r, c) + inner,
                         pack(sum[m][c][0] * factor[m][0], sum[m][c][1] * factor[m][0]));
            store_shared(tile + tile_offset<ROWS>(r + 8, c) + inner,
                         pack(sum[m][c][2] * factor[m][1], sum[m][c][3] * factor[m][1]));
        }
    }
    __syncwarp();
#pragma unroll 4
    for (int i = lane; i < M * 16 * CHUNKS; i += 32) {
        int r = first + i / CHUNKS, chunk = i % CHUNKS;
        uint4 value;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                     : "r"(tile + tile_offset<ROWS>(r, chunk)));
        if (row + r < rows) *reinterpret_cast<uint4*>(head + (row + r) * stride + chunk * 8) = value;
    }
}

// An accumulator becomes the left operand of the next product: two column tiles of 8 make one of depth 16.
template <int M, int N>
__device__ __forceinline__ void to_operand(u32 (&operand)[M][N / 2][4], const float (&value)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int k = 0; k < N / 2; ++k) {
            operand[m][k][0] = pack(value[m][2 * k][0], value[m][2 * k][1]);
            operand[m][k][1] = pack(value[m][2 * k][2], value[m][2 * k][3]);
            operand[m][k][2] = pack(value[m][2 * k + 1][0], value[m][2 * k + 1][1]);
            operand[m][k][3] = pack(value[m][2 * k + 1][2], value[m][2 * k + 1][3]);
        }
}

#if WGMMA
#include "attention_wgmma.cuh"
#else
#include "attention_mma.cuh"
#endif
#endif
