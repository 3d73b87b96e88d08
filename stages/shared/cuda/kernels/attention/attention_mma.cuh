// The two products of attention_common.cuh by mma.sync (sm_75: f16 by m16n8k8; sm_80 on: m16n8k16).
#ifndef ATTENTION_MMA
#define ATTENTION_MMA

__device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
}

__device__ __forceinline__ void load_matrices_transposed(u32 (&to)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
}

__device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if ARCH >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// C = A Bt. A: rows [first, first + 16 M) of a tile of A_ROWS rows, B: a tile of 8 N rows.
template <int A_ROWS, int M, int N>
__device__ __forceinline__ void product_abt(float (&c)[M][N][4], u32 a_tile, int first, u32 b_tile) {
    int lane = threadIdx.x & 31;
    int b_row = (lane & 7) + ((lane >> 4) << 3), b_chunk = (lane >> 3) & 1;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n) c[m][n][0] = c[m][n][1] = c[m][n][2] = c[m][n][3] = 0.0f;
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; ++k) {
        u32 a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m)
            load_matrices(a[m], a_tile + tile_offset<A_ROWS>(first + m * 16 + (lane & 15), 2 * k + (lane >> 4)));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 b[4];
            load_matrices(b, b_tile + tile_offset<8 * N>(n * 8 + b_row, 2 * k + b_chunk));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                multiply_add(c[m][n], a[m], b[0], b[1]);
                multiply_add(c[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// C += P B. B: a tile of 16 K rows.
template <int M, int K>
__device__ __forceinline__ void product_pb(float (&c)[M][COLUMN_TILES][4], const u32 (&p)[M][K][4], u32 b_tile) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n += 2) {
            u32 b[4];
            load_matrices_transposed(b, b_tile + tile_offset<16 * K>(k * 16 + (lane & 15), n + (lane >> 4)));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                multiply_add(c[m][n], p[m][k], b[0], b[1]);
                multiply_add(c[m][n + 1], p[m][k], b[2], b[3]);
            }
        }
}

// The products above end before they return.
__device__ __forceinline__ void begin_products() {}
__device__ __forceinline__ void end_group() {}
template <int PENDING>
__device__ __forceinline__ void wait_products() {}
#endif
