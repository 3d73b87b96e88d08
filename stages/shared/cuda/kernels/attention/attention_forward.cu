// Flash attention, forward (Dao, "FlashAttention-2", 2023).
//
//   s_ij = scale q_i . k_j            (softcap: s = cap tanh(s / cap))
//   row i sees key j if both are of one segment, j <= i, and i - j < window (if window > 0)
//   o_i  = sum_j exp(s_ij - lse_i) v_j,    lse_i = log sum_j exp(s_ij)
//
// One block makes QUERIES rows of one head: Q stays in shared memory, K and V pass in tiles of KEYS rows, two
// tiles in flight. Each warp owns 16 M rows; a running maximum m and sum l per row are kept in registers:
//   m' = max(m, max_j s_ij),  l' = l e^(m - m') + sum_j e^(s_ij - m'),  o' = o e^(m - m') + sum_j e^(s_ij - m') v_j
// Query tiles run over the packed tokens regardless of segments, so short segments cost no empty tiles; key tiles
// that no row of the tile sees are skipped, and those that all rows see in full are not masked.
//
// Tile sizes. M = 2 lets each K and V fragment read from shared memory serve 32 rows (with 16, mma.sync waits for
// shared memory); HEAD_DIM 256 has registers for 16 rows only. Two blocks a multiprocessor hide each other's
// softmax; with wgmma, two or three blocks of one warpgroup did better on an H100 than one block of two warpgroups,
// whether these meet at every tile or not (0.087 against 0.095 and 0.094 ms at b2 h16 s2048 d128), though each
// then reads K and V alone: about 6 TB/s from L2, which is near its limit. HEAD_DIM 256 has room for one block.
#ifndef ATTENTION_COMMON
#include "attention_common.cuh"
#endif

#ifdef FORWARD_WARPS
constexpr int WARPS = FORWARD_WARPS, M = FORWARD_M, KEYS = FORWARD_KEYS, BLOCKS = FORWARD_BLOCKS;
#elif WGMMA && HEAD_DIM == 64
constexpr int WARPS = 4, M = 1, KEYS = 128, BLOCKS = 3;
#elif WGMMA && HEAD_DIM == 128
constexpr int WARPS = 4, M = 1, KEYS = 64, BLOCKS = 2;
#elif WGMMA
constexpr int WARPS = 8, M = 1, KEYS = 64, BLOCKS = 1;
#elif HEAD_DIM == 64
constexpr int WARPS = 4, M = 2, KEYS = 64, BLOCKS = 2;
#elif HEAD_DIM == 128 && SHARED_KIB > 64
constexpr int WARPS = 4, M = 2, KEYS = 64, BLOCKS = 2;
#elif HEAD_DIM == 128
constexpr int WARPS = 4, M = 1, KEYS = 32, BLOCKS = 1;
#elif SHARED_KIB > 64
constexpr int WARPS = 4, M = 1, KEYS = 32, BLOCKS = 2;
#else
constexpr int WARPS = 2, M = 1, KEYS = 16, BLOCKS = 1;
#endif
constexpr int THREADS = WARPS * 32, QUERIES = WARPS * M * 16, N = KEYS / 8;
constexpr int SHARED_BYTES = tile_bytes(QUERIES) + 4 * tile_bytes(KEYS) + 1024;
static_assert(SHARED_BYTES <= SHARED_KIB * 1024, "tiles exceed shared memory");

// What the host reads to launch: rows of a block, threads, dynamic shared bytes, kernels to launch.
extern "C" __constant__ int attention_forward_launch[4] = {QUERIES, THREADS, SHARED_BYTES, 1};

#define MINUS_INFINITY __int_as_float(0xff800000)

// Scores of one tile become probabilities relative to the running maximum; `shrink` is what earlier tiles'
// probabilities are to be multiplied by. `unit` times a score is its base-2 exponent.
__device__ __forceinline__ void softmax_step(float (&s)[M][N][4], float (&maximum)[M][2], float (&sum)[M][2],
                                             float (&shrink)[M][2], float unit) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float next = maximum[m][h];
#pragma unroll
            for (int n = 0; n < N; ++n) next = fmaxf(next, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
            next = fmaxf(next, __shfl_xor_sync(0xffffffff, next, 1));
            next = fmaxf(next, __shfl_xor_sync(0xffffffff, next, 2));
            // A row that has seen no key yet: any finite reference keeps exp2(-inf - reference) at 0.
            float reference = next == MINUS_INFINITY ? 0.0f : next * unit;
            shrink[m][h] = exp2_fast(maximum[m][h] * unit - reference);
            maximum[m][h] = next;
            float partial = 0.0f;
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int e = 2 * h; e < 2 * h + 2; ++e) {
                    s[m][n][e] = exp2_fast(s[m][n][e] * unit - reference);
                    partial += s[m][n][e];
                }
            sum[m][h] = sum[m][h] * shrink[m][h] + partial;
        }
}

__device__ __forceinline__ void rescale(float (&o)[M][COLUMN_TILES][4], const float (&shrink)[M][2]) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) o[m][n][e] *= shrink[m][e >> 1];
}

// q [tokens, heads, HEAD_DIM], k and v [tokens, kv_heads, HEAD_DIM], o like q, with row strides in elements;
// lse f32 [heads, tokens]. order: attention_order by query tiles of QUERIES rows. Grid: heads x tiles.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    attention_forward(const element* __restrict__ q, const element* __restrict__ k, const element* __restrict__ v,
                      element* __restrict__ o, float* __restrict__ lse, const int2* __restrict__ bounds,
                      const int* __restrict__ order, int tokens, int heads, int kv_heads, int q_stride,
                      int k_stride, int v_stride, int o_stride, float scale, float softcap, int window) {
    int head = blockIdx.x, kv_head = head / (heads / kv_heads), lane = threadIdx.x & 31;
    int tile_row = order[blockIdx.y] * QUERIES;
    int first = (threadIdx.x / 32) * M * 16;  // the warp's rows within the tile
    q += head * HEAD_DIM;
    o += head * HEAD_DIM;
    k += kv_head * HEAD_DIM;
    v += kv_head * HEAD_DIM;
    u32 q_tile = shared_base(), k_tiles = q_tile + tile_bytes(QUERIES), v_tiles = k_tiles + 2 * tile_bytes(KEYS);

    auto first_key = [&](int row) {
        int start = bounds[min(row, tokens - 1)].x;
        return window > 0 ? max(start, row - window + 1) : start;
    };
    int last_row = min(tile_row + QUERIES, tokens) - 1;
    int begin = first_key(tile_row), tiles = (last_row - begin) / KEYS + 1;
    int row_begin[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) row_begin[m][h] = first_key(tile_row + first + m * 16 + h * 8 + lane / 4);

    float out[M][COLUMN_TILES][4], maximum[M][2], sum[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
        maximum[m][0] = maximum[m][1] = MINUS_INFINITY;
        sum[m][0] = sum[m][1] = 0.0f;
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n) out[m][n][0] = out[m][n][1] = out[m][n][2] = out[m][n][3] = 0.0f;
    }
    float unit = SOFTCAP ? LOG2_E : scale * LOG2_E;

    auto load_keys = [&](int tile) {
        load_tile<KEYS, THREADS>(k_tiles + (tile & 1) * tile_bytes(KEYS), k, k_stride, begin + tile * KEYS, tokens);
    };
    auto load_values = [&](int tile) {
        load_tile<KEYS, THREADS>(v_tiles + (tile & 1) * tile_bytes(KEYS), v, v_stride, begin + tile * KEYS, tokens);
    };
    // Softcap and mask of the scores of a tile whose rows start at `low` and all see the keys from `full` to `low`.
    auto finish_scores = [&](float(&s)[M][N][4], int key, int low, int full) {
#if SOFTCAP
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) s[m][n][e] = softcap * tanh_fast(s[m][n][e] * (scale / softcap));
#endif
        if (key >= full && key + KEYS - 1 <= low) return;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    int column = key + n * 8 + (lane & 3) * 2 + (e & 1);
                    int row = tile_row + first + m * 16 + (e >> 1) * 8 + lane / 4;
                    if (column > row || column < row_begin[m][e >> 1]) s[m][n][e] = MINUS_INFINITY;
                }
    };

    float s[M][N][4], shrink[M][2];
    u32 p[M][N / 2][4];
#if WGMMA
    // The scores of tile t + 1 are made before the values of tile t are added, so that the tensor cores have work
    // during the softmax. Every warpgroup takes every tile of the block: branches would serialise the products.
    int group_row = tile_row + first / 64 * 64, group_full = first_key(min(group_row + 63, tokens - 1));
    load_tile<QUERIES, THREADS>(q_tile, q, q_stride, tile_row, tokens);
    load_keys(0);
    wait_for_loads();
    load_values(0);
    if (tiles > 1) load_keys(1);
    begin_products();
    product_abt<QUERIES>(s, q_tile, first, k_tiles);
    end_group();
    wait_products<0>();
    finish_scores(s, begin, group_row, group_full);
    softmax_step(s, maximum, sum, shrink, unit);
    to_operand(p, s);
    for (int tile = 0; tile + 1 < tiles; ++tile) {
        wait_for_loads();
        load_values(tile + 1);
        if (tile + 2 < tiles) load_keys(tile + 2);
        begin_products();
        product_abt<QUERIES>(s, q_tile, first, k_tiles + (~tile & 1) * tile_bytes(KEYS));
        end_group();
        product_pb(out, p, v_tiles + (tile & 1) * tile_bytes(KEYS));
        end_group();
        wait_products<1>();
        finish_scores(s, begin + (tile + 1) * KEYS, group_row, group_full);
        softmax_step(s, maximum, sum, shrink, unit);
        wait_products<0>();
        rescale(out, shrink);
        to_operand(p, s);
    }
    wait_for_loads();
    begin_products();
    product_pb(out, p, v_tiles + (~tiles & 1) * tile_bytes(KEYS));
    end_group();
    wait_products<0>();
#else
    // A warp skips the tiles that none of its rows sees.
    int warp_row = tile_row + first, warp_last = min(warp_row + M * 16, tokens) - 1;
    int warp_begin = first_key(warp_row), warp_full = first_key(warp_last);
    load_tile<QUERIES, THREADS>(q_tile, q, q_stride, tile_row, tokens);
    load_keys(0);
    load_values(0);
    for (int tile = 0; tile < tiles; ++tile) {
        wait_for_loads();
        int key = begin + tile * KEYS, now = (tile & 1) * tile_bytes(KEYS);
        if (tile + 1 < tiles) {
            load_keys(tile + 1);
            load_values(tile + 1);
        }
        if (key > warp_last || key + KEYS <= warp_begin) continue;
        product_abt<QUERIES>(s, q_tile, first, k_tiles + now);
        finish_scores(s, key, warp_row, warp_full);
        softmax_step(s, maximum, sum, shrink, unit);
        rescale(out, shrink);
        to_operand(p, s);
        product_pb(out, p, v_tiles + now);
    }
#endif

    float inverse[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float total = sum[m][h];
            total += __shfl_xor_sync(0xffffffff, total, 1);
            total += __shfl_xor_sync(0xffffffff, total, 2);
            inverse[m][h] = 1.0f / total;
            int row = tile_row + first + m * 16 + h * 8 + lane / 4;
            if ((lane & 3) == 0 && row < tokens)
                lse[static_cast<long long>(head) * tokens + row] = maximum[m][h] * (unit * LN_2) + logf(total);
        }
    __syncthreads();
    store_rows<QUERIES>(q_tile, first, out, inverse, o, o_stride, tile_row, tokens);
}
