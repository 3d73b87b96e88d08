// The two products of attention_common.cuh by wgmma (sm_90a): a warpgroup of 4 warps owns 64 rows, 16 a warp.
//
// Products run asynchronously: begin_products() orders register writes before them, end_group() closes a
// group, wait_products<P>() waits until at most P groups are unfinished. Accumulators and register operands of
// an unfinished group must not be touched.
#ifndef ATTENTION_WGMMA
#define ATTENTION_WGMMA

// Matrix descriptor (PTX ISA, "Matrix descriptor"): address and strides in units of 16 bytes, 128-byte swizzle.
// `stride` separates groups of 8 rows; `leading` separates panels of 64 columns of a transposed operand.
__device__ __forceinline__ u64 descriptor(u32 address, u32 leading) {
    u64 value = (address & 0x3FFFF) >> 4;
    value |= static_cast<u64>(leading >> 4) << 16;
    value |= static_cast<u64>(1024 >> 4) << 32;
    return value | (1ull << 62);
}

#define TILE(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define TILES_8(c, n)                                                                                         \
    TILE(c, n), TILE(c, n + 1), TILE(c, n + 2), TILE(c, n + 3), TILE(c, n + 4), TILE(c, n + 5), TILE(c, n + 6), \
        TILE(c, n + 7)
#define LIST_32                                                                                          \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                             \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST_64                                                                                          \
    LIST_32                                                                                              \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                 \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// Column tiles [T, T + 8) of C (+)= A Bt over a depth of 16, A in shared memory; `add` 0 starts from zero.
template <int T, int N>
__device__ __forceinline__ void shared_64(float (&c)[N][4], u64 a, u64 b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." MMA_TYPE
                 " {" LIST_32 "}, %32, %33, p, 1, 1, 0, 0; }"
                 : TILES_8(c, T)
                 : "l"(a), "l"(b), "r"(add));
}

// Column tiles [T, T + 8) of C += P B over a depth of 16, P in registers, B transposed in shared memory.
template <int T, int N>
__device__ __forceinline__ void register_64(float (&c)[N][4], const u32 (&p)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." MMA_TYPE
                 " {" LIST_32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : TILES_8(c, T)
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(b));
}

// Column tiles [T, T + 16) of C (+)= A Bt over a depth of 16, A in shared memory; `add` 0 starts from zero.
template <int T, int N>
__device__ __forceinline__ void shared_128(float (&c)[N][4], u64 a, u64 b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." MMA_TYPE
                 " {" LIST_64 "}, %64, %65, p, 1, 1, 0, 0; }"
                 : TILES_8(c, T), TILES_8(c, T + 8)
                 : "l"(a), "l"(b), "r"(add));
}

// Column tiles [T, T + 16) of C += P B over a depth of 16, P in registers, B transposed in shared memory.
template <int T, int N>
__device__ __forceinline__ void register_128(float (&c)[N][4], const u32 (&p)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." MMA_TYPE
                 " {" LIST_64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : TILES_8(c, T), TILES_8(c, T + 8)
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(b));
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// C = A Bt. A: the warpgroup's 64 rows of a tile of A_ROWS rows, B: a tile of 8 N rows.
template <int A_ROWS, int M, int N>
__device__ __forceinline__ void product_abt(float (&c)[M][N][4], u32 a_tile, int first, u32 b_tile) {
    static_assert(M == 1 && (N == 8 || N == 16), "wgmma shapes");
    u32 a_rows = a_tile + (first & ~63) * 128;
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; ++k) {
        u64 a = descriptor(a_rows + (k / 4) * (A_ROWS * 128) + (k % 4) * 32, 16);
        u64 b = descriptor(b_tile + (k / 4) * (8 * N * 128) + (k % 4) * 32, 16);
        if constexpr (N == 8)
            shared_64<0>(c[0], a, b, k);
        else
            shared_128<0>(c[0], a, b, k);
    }
}

// C += P B. B: a tile of 16 K rows.
template <int M, int K>
__device__ __forceinline__ void product_pb(float (&c)[M][COLUMN_TILES][4], const u32 (&p)[M][K][4], u32 b_tile) {
    static_assert(M == 1, "wgmma shapes");
    constexpr int panel = 16 * K * 128;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        if constexpr (HEAD_DIM == 64) {
            register_64<0>(c[0], p[0][k], descriptor(b_tile + k * 2048, panel));
        } else {
            register_128<0>(c[0], p[0][k], descriptor(b_tile + k * 2048, panel));
            if constexpr (HEAD_DIM == 256)
                register_128<HEAD_DIM == 256 ? 16 : 0>(c[0], p[0][k], descriptor(b_tile + 2 * panel + k * 2048, panel));
        }
    }
}
#endif
