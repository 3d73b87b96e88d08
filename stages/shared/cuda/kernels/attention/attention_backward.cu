// Flash attention, backward, without atomics: the same bytes every time.
//
//   p_ij  = exp(s_ij - lse_i)                    delta_i = sum_c do_ic o_ic
//   ds_ij = p_ij (do_i . v_j - delta_i)          (softcap: times 1 - tanh(.)^2)
//   dq_i  = scale sum_j ds_ij k_j    dk_j = scale sum_i ds_ij q_i    dv_j = sum_i p_ij do_i
//
// Two kernels, in this order. attention_backward_q: a block owns QUERIES rows of one head, K and V pass by; it
// also makes delta. attention_backward_kv: a block owns KEYS rows of one kv head, and Q and dO of all query heads
// of the group pass by, so that GQA needs no reduction afterwards. It works on transposed scores (keys as rows):
// P and dS then are in the registers of the warp that adds them to dV and dK. Few kv heads make few blocks, so
// the grid may split the group: each split writes f32 sums, and attention_backward_reduce adds them in order.
// S and dP are computed in both
// kernels: 7 products instead of 5, which costs less than summing partial dQ in a fixed order through memory.
//
// Tile sizes: as in attention_forward.cu. dK and dV take 4 HEAD_DIM bytes of registers a row and lane pair, so a
// warp owns 16 keys; at HEAD_DIM 256 not both fit, and two kernels, attention_backward_k
// and attention_backward_v, take the place of attention_backward_kv.
#ifndef ATTENTION_COMMON
#include "attention_common.cuh"
#endif

// Kernel over query tiles: QUERIES = 16 M Q_WARPS resident, Q_KEYS pass by.
#ifdef Q_CONFIG
constexpr int Q_WARPS = Q_CONFIG, M = 1, Q_KEYS = Q_CONFIG_KEYS, Q_BLOCKS = Q_CONFIG_BLOCKS;
#elif WGMMA && HEAD_DIM == 256
constexpr int Q_WARPS = 4, M = 1, Q_KEYS = 64, Q_BLOCKS = 1;
#elif WGMMA
constexpr int Q_WARPS = 4, M = 1, Q_KEYS = HEAD_DIM == 64 ? 128 : 64, Q_BLOCKS = 2;
#elif HEAD_DIM == 64 && SHARED_KIB > 64
constexpr int Q_WARPS = 4, M = 2, Q_KEYS = 64, Q_BLOCKS = 2;
#elif HEAD_DIM == 64
constexpr int Q_WARPS = 4, M = 1, Q_KEYS = 32, Q_BLOCKS = 1;
#elif HEAD_DIM == 128 && SHARED_KIB > 64
constexpr int Q_WARPS = 4, M = 2, Q_KEYS = 32, Q_BLOCKS = 2;
#elif HEAD_DIM == 128
constexpr int Q_WARPS = 4, M = 1, Q_KEYS = 16, Q_BLOCKS = 1;
#elif SHARED_KIB > 99
constexpr int Q_WARPS = 4, M = 1, Q_KEYS = 32, Q_BLOCKS = 1;
#elif SHARED_KIB > 64
constexpr int Q_WARPS = 2, M = 1, Q_KEYS = 32, Q_BLOCKS = 1;
#else
constexpr int Q_WARPS = 1, M = 1, Q_KEYS = 16, Q_BLOCKS = 1;
#endif
constexpr int Q_THREADS = Q_WARPS * 32, QUERIES = Q_WARPS * M * 16, Q_N = Q_KEYS / 8;
constexpr int Q_UNIT = WGMMA ? 64 : M * 16;
constexpr int Q_SHARED_BYTES = 2 * tile_bytes(QUERIES) + 4 * tile_bytes(Q_KEYS) + 1024;

// Kernel over key tiles: KEYS = 16 K_WARPS resident, K_QUERIES pass by.
#ifdef K_CONFIG
constexpr int K_WARPS = K_CONFIG, K_QUERIES = K_CONFIG_QUERIES, K_BLOCKS = K_CONFIG_BLOCKS;
#elif WGMMA && HEAD_DIM == 256
constexpr int K_WARPS = 4, K_QUERIES = 64, K_BLOCKS = 1;
#elif WGMMA
constexpr int K_WARPS = 4, K_QUERIES = HEAD_DIM == 64 && !SOFTCAP ? 128 : 64, K_BLOCKS = 2;
#elif HEAD_DIM == 64
constexpr int K_WARPS = 4, K_QUERIES = SHARED_KIB > 64 ? 64 : 32, K_BLOCKS = SHARED_KIB > 64 ? 2 : 1;
#elif HEAD_DIM == 128 && SHARED_KIB > 64
constexpr int K_WARPS = 4, K_QUERIES = 64, K_BLOCKS = 2;
#elif HEAD_DIM == 128
constexpr int K_WARPS = 2, K_QUERIES = 32, K_BLOCKS = 1;
#elif SHARED_KIB > 99
constexpr int K_WARPS = 4, K_QUERIES = 32, K_BLOCKS = 1;
#elif SHARED_KIB > 64
constexpr int K_WARPS = 2, K_QUERIES = 32, K_BLOCKS = 1;
#else
constexpr int K_WARPS = 1, K_QUERIES = 16, K_BLOCKS = 1;
#endif
constexpr int K_THREADS = K_WARPS * 32, KEYS = K_WARPS * 16, K_N = K_QUERIES / 8;
constexpr int K_UNIT = WGMMA ? 64 : 16;
constexpr int K_SHARED_BYTES = 2 * tile_bytes(KEYS) + 4 * tile_bytes(K_QUERIES) + 4 * K_QUERIES * 4 + 1024;

static_assert(Q_SHARED_BYTES <= SHARED_KIB * 1024 && K_SHARED_BYTES <= SHARED_KIB * 1024, "tiles exceed shared memory");

// What the host reads to launch: rows of a block, threads, dynamic shared bytes, kernels to launch (2: _k and _v).
extern "C" __constant__ int attention_backward_q_launch[4] = {QUERIES, Q_THREADS, Q_SHARED_BYTES, 1};
extern "C" __constant__ int attention_backward_kv_launch[4] = {KEYS, K_THREADS, K_SHARED_BYTES, HEAD_DIM == 256 ? 2 : 1};

// One score and its two gradients' factor: p, and d(score after softcap) / d(score before).
__device__ __forceinline__ float probability(float score, float lse_2, float unit, float into_cap, float softcap,
                                             float& slope) {
#if SOFTCAP
    float t = tanh_fast(score * into_cap);
    slope = 1.0f - t * t;
    return exp2_fast(softcap * LOG2_E * t - lse_2);
#else
    slope = 1.0f;
    return exp2_fast(score * unit - lse_2);
#endif
}

// delta of the calling lane's rows: the four lanes of a row share its columns.
__device__ __forceinline__ void row_deltas(float (&delta)[M][2], const element* o, const element* d_o, int o_stride,
                                           int do_stride, int row, int tokens) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            long long at = min(row + m * 16 + h * 8 + lane / 4, tokens - 1);
            float total = 0.0f;
#pragma unroll
            for (int c = 0; c < CHUNKS / 4; ++c) {
                int column = (c * 4 + (lane & 3)) * 8;
                uint4 a = *reinterpret_cast<const uint4*>(o + at * o_stride + column);
                uint4 b = *reinterpret_cast<const uint4*>(d_o + at * do_stride + column);
                const element2* x = reinterpret_cast<const element2*>(&a);
                const element2* y = reinterpret_cast<const element2*>(&b);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float2 left = to_float2(x[e]), right = to_float2(y[e]);
                    total += left.x * right.x + left.y * right.y;
                }
            }
            total += __shfl_xor_sync(0xffffffff, total, 1);
            delta[m][h] = total + __shfl_xor_sync(0xffffffff, total, 2);
        }
}

// o and d_o like q; dq like q with its own stride; delta f32 [heads, tokens] is written. order: attention_order
// by query tiles. Grid: heads x tiles.
extern "C" __global__ void __launch_bounds__(Q_THREADS, Q_BLOCKS)
    attention_backward_q(const element* __restrict__ q, const element* __restrict__ k,
                         const element* __restrict__ v, const element* __restrict__ o,
                         const element* __restrict__ d_o, const float* __restrict__ lse, float* __restrict__ delta,
                         element* __restrict__ dq, const int2* __restrict__ bounds, const int* __restrict__ order,
                         int tokens, int heads, int kv_heads, int q_stride, int k_stride, int v_stride,
                         int o_stride, int do_stride, int dq_stride, float scale, float softcap, int window) {
    int head = blockIdx.x, kv_head = head / (heads / kv_heads), lane = threadIdx.x & 31;
    int tile_row = order[blockIdx.y] * QUERIES;
    int first = (threadIdx.x / 32) * M * 16;
    k += kv_head * HEAD_DIM;
    v += kv_head * HEAD_DIM;
    u32 q_tile = shared_base(), do_tile = q_tile + tile_bytes(QUERIES);
    u32 k_tiles = do_tile + tile_bytes(QUERIES), v_tiles = k_tiles + 2 * tile_bytes(Q_KEYS);

    auto first_key = [&](int row) {
        int start = bounds[min(row, tokens - 1)].x;
        return window > 0 ? max(start, row - window + 1) : start;
    };
    int last_row = min(tile_row + QUERIES, tokens) - 1;
    int begin = first_key(tile_row), tiles = (last_row - begin) / Q_KEYS + 1;
    load_tile<QUERIES, Q_THREADS>(q_tile, q + head * HEAD_DIM, q_stride, tile_row, tokens);
    load_tile<QUERIES, Q_THREADS>(do_tile, d_o + head * HEAD_DIM, do_stride, tile_row, tokens);
    load_tile<Q_KEYS, Q_THREADS>(k_tiles, k, k_stride, begin, tokens);
    load_tile<Q_KEYS, Q_THREADS>(v_tiles, v, v_stride, begin, tokens);

    int unit_row = tile_row + first / Q_UNIT * Q_UNIT, unit_last = min(unit_row + Q_UNIT, tokens) - 1;
    int unit_begin = first_key(unit_row), unit_full = first_key(unit_last);
    int row_begin[M][2];
    float row_delta[M][2], lse_2[M][2], sum[M][COLUMN_TILES][4];
    row_deltas(row_delta, o + head * HEAD_DIM, d_o + head * HEAD_DIM, o_stride, do_stride, tile_row + first, tokens);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int row = tile_row + first + m * 16 + h * 8 + lane / 4;
            long long at = static_cast<long long>(head) * tokens + min(row, tokens - 1);
            row_begin[m][h] = first_key(row);
            lse_2[m][h] = lse[at] * LOG2_E;
            if ((lane & 3) == 0 && row < tokens) delta[at] = row_delta[m][h];
        }
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n) sum[m][n][0] = sum[m][n][1] = sum[m][n][2] = sum[m][n][3] = 0.0f;
    }
    float unit = scale * LOG2_E, into_cap = SOFTCAP ? scale / softcap : 0.0f;

    for (int tile = 0; tile < tiles; ++tile) {
        wait_for_loads();
        int key = begin + tile * Q_KEYS, now = (tile & 1) * tile_bytes(Q_KEYS), next = tile_bytes(Q_KEYS) - now;
        if (tile + 1 < tiles) {
            load_tile<Q_KEYS, Q_THREADS>(k_tiles + next, k, k_stride, key + Q_KEYS, tokens);
            load_tile<Q_KEYS, Q_THREADS>(v_tiles + next, v, v_stride, key + Q_KEYS, tokens);
        }
        if (key > unit_last || key + Q_KEYS <= unit_begin) continue;

        float s[M][Q_N][4], dp[M][Q_N][4];
        begin_products();
        product_abt<QUERIES>(s, q_tile, first, k_tiles + now);
        end_group();
        product_abt<QUERIES>(dp, do_tile, first, v_tiles + now);
        end_group();
        wait_products<1>();
        bool masked = key < unit_full || key + Q_KEYS - 1 > unit_row;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < Q_N; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float slope;
                    float p = probability(s[m][n][e], lse_2[m][e >> 1], unit, into_cap, softcap, slope);
                    int column = key + n * 8 + (lane & 3) * 2 + (e & 1);
                    int row = tile_row + first + m * 16 + (e >> 1) * 8 + lane / 4;
                    if (masked && (column > row || column < row_begin[m][e >> 1])) p = 0.0f;
                    s[m][n][e] = p * slope;
                }
        wait_products<0>();
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < Q_N; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) s[m][n][e] *= dp[m][n][e] - row_delta[m][e >> 1];
        u32 ds[M][Q_N / 2][4];
        to_operand(ds, s);
        begin_products();
        product_pb(sum, ds, k_tiles + now);
        end_group();
        wait_products<0>();
    }

    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) factor[m][0] = factor[m][1] = scale;
    __syncthreads();
    store_rows<QUERIES>(q_tile, first, sum, factor, dq + head * HEAD_DIM, dq_stride, tile_row, tokens);
}

// Pointers and sizes of attention_backward_kv, for its two halves.
struct KvArguments {
    const element *q, *k, *v, *d_o;
    const float *lse, *delta;
    element *dk, *dv;
    float* partial;
    const int2* bounds;
    int tokens, heads, kv_heads, q_stride, k_stride, v_stride, do_stride, dk_stride, dv_stride;
    float scale, softcap;
    int window, splits, tile_row;
};

// A warp's 16 rows times `factor` to rows of `width` floats.
__device__ __forceinline__ void store_partial(float* to, const float (&sum)[1][COLUMN_TILES][4], float factor,
                                              long long width, int row, int rows) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        int own = row + h * 8 + lane / 4;
        if (own >= rows) continue;
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n)
            *reinterpret_cast<float2*>(to + own * width + n * 8 + (lane & 3) * 2) =
                make_float2(sum[0][n][2 * h] * factor, sum[0][n][2 * h + 1] * factor);
    }
}

// dK (if DK) and dV (if DV) of KEYS rows.
template <bool DK, bool DV>
__device__ __forceinline__ void backward_kv(const KvArguments& a) {
    int kv_head = blockIdx.x / a.splits, split = blockIdx.x % a.splits, lane = threadIdx.x & 31;
    int group = a.heads / a.kv_heads / a.splits, first_head = blockIdx.x * group;
    int first = (threadIdx.x / 32) * 16, tokens = a.tokens, tile_row = a.tile_row;
    u32 k_tile = shared_base(), v_tile = k_tile + tile_bytes(KEYS), q_tiles = v_tile + tile_bytes(KEYS);
    u32 do_tiles = q_tiles + 2 * tile_bytes(K_QUERIES), statistics = do_tiles + 2 * tile_bytes(K_QUERIES);

    // Keys from `tokens` on have no rows that see them.
    auto row_end = [&](int key) {
        if (key >= tokens) return 0;
        int end = a.bounds[key].y;
        return a.window > 0 ? min(end, key + a.window) : end;
    };
    int last_key = min(tile_row + KEYS, tokens) - 1;
    int tiles = (row_end(last_key) - tile_row + K_QUERIES - 1) / K_QUERIES, steps = tiles * group;
    int unit_key = tile_row + first / K_UNIT * K_UNIT, unit_last = unit_key + K_UNIT - 1;
    int unit_end = row_end(min(unit_last, tokens - 1)), unit_full = row_end(unit_key);
    int ends[2] = {row_end(tile_row + first + lane / 4), row_end(tile_row + first + lane / 4 + 8)};

    auto load_step = [&](int step) {
        int head = first_head + step / tiles, row = tile_row + step % tiles * K_QUERIES;
        u32 buffer = (step & 1) * tile_bytes(K_QUERIES);
        load_tile<K_QUERIES, K_THREADS>(q_tiles + buffer, a.q + head * HEAD_DIM, a.q_stride, row, tokens);
        load_tile<K_QUERIES, K_THREADS>(do_tiles + buffer, a.d_o + head * HEAD_DIM, a.do_stride, row, tokens);
        for (int i = threadIdx.x; i < K_QUERIES; i += K_THREADS) {
            long long at = static_cast<long long>(head) * tokens + min(row + i, tokens - 1);
            u32 to = statistics + (step & 1) * K_QUERIES * 8 + i * 4;
            copy_4(to, a.lse + at);
            copy_4(to + K_QUERIES * 4, a.delta + at);
        }
    };

    float dk[1][COLUMN_TILES][4], dv[1][COLUMN_TILES][4];
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) dk[0][n][e] = dv[0][n][e] = 0.0f;
    float unit = a.scale * LOG2_E, into_cap = SOFTCAP ? a.scale / a.softcap : 0.0f;

    load_tile<KEYS, K_THREADS>(k_tile, a.k + kv_head * HEAD_DIM, a.k_stride, tile_row, tokens);
    load_tile<KEYS, K_THREADS>(v_tile, a.v + kv_head * HEAD_DIM, a.v_stride, tile_row, tokens);
    if (steps > 0) load_step(0);
    for (int step = 0; step < steps; ++step) {
        wait_for_loads();
        if (step + 1 < steps) load_step(step + 1);
        int row = tile_row + step % tiles * K_QUERIES;
        u32 buffer = (step & 1) * tile_bytes(K_QUERIES);
        u32 lses = statistics + (step & 1) * K_QUERIES * 8, deltas = lses + K_QUERIES * 4;
        if (row + K_QUERIES <= unit_key || row >= unit_end) continue;

        float s[1][K_N][4], dp[1][K_N][4];
        begin_products();
        product_abt<KEYS>(s, k_tile, first, q_tiles + buffer);
        end_group();
        if constexpr (DK) {
            product_abt<KEYS>(dp, v_tile, first, do_tiles + buffer);
            end_group();
        }
        wait_products<DK ? 1 : 0>();
        bool masked = row < unit_last || row + K_QUERIES > unit_full;
        float slope[SOFTCAP ? K_N : 1][4];
#pragma unroll
        for (int n = 0; n < K_N; ++n) {
            int column = n * 8 + (lane & 3) * 2;
            float2 lse = load_shared_float2(lses + column * 4);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float p = probability(s[0][n][e], (e & 1 ? lse.y : lse.x) * LOG2_E, unit, into_cap, a.softcap,
                                      slope[SOFTCAP ? n : 0][e]);
                int query = row + column + (e & 1);
                int key = tile_row + first + lane / 4 + (e >> 1) * 8;
                s[0][n][e] = masked && (query < key || query >= ends[e >> 1]) ? 0.0f : p;
            }
        }
        u32 p[1][K_N / 2][4], ds[1][K_N / 2][4];
        if constexpr (DV) {
            to_operand(p, s);
            begin_products();
            product_pb(dv, p, do_tiles + buffer);
            end_group();
        }
        if constexpr (DK) {
            wait_products<DV ? 1 : 0>();
#pragma unroll
            for (int n = 0; n < K_N; ++n) {
                float2 delta = load_shared_float2(deltas + (n * 8 + (lane & 3) * 2) * 4);
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    dp[0][n][e] = s[0][n][e] * (dp[0][n][e] - (e & 1 ? delta.y : delta.x)) * slope[SOFTCAP ? n : 0][e];
            }
            to_operand(ds, dp);
            begin_products();
            product_pb(dk, ds, q_tiles + buffer);
            end_group();
        }
        wait_products<0>();
    }

    if (a.splits > 1) {
        // [2 (dK, dV), splits, tokens, kv_heads, HEAD_DIM]
        long long width = static_cast<long long>(a.kv_heads) * HEAD_DIM, part = tokens * width;
        float* to = a.partial + split * part + kv_head * HEAD_DIM;
        if constexpr (DK) store_partial(to, dk, a.scale, width, tile_row + first, tokens);
        if constexpr (DV) store_partial(to + a.splits * part, dv, 1.0f, width, tile_row + first, tokens);
        return;
    }
    float one[1][2] = {{1.0f, 1.0f}}, scale[1][2] = {{a.scale, a.scale}};
    __syncthreads();
    if constexpr (DK) store_rows<KEYS>(k_tile, first, dk, scale, a.dk + kv_head * HEAD_DIM, a.dk_stride, tile_row, tokens);
    if constexpr (DV) store_rows<KEYS>(v_tile, first, dv, one, a.dv + kv_head * HEAD_DIM, a.dv_stride, tile_row, tokens);
}

// dk and dv like k and v, with their own strides. delta: of attention_backward_q. order: attention_order by key
// tiles of KEYS rows. splits divides heads / kv_heads; partial: f32 [2, splits, tokens, kv_heads, HEAD_DIM], not
// touched where splits is 1. Grid: (kv_heads splits) x tiles.
#define KV_KERNEL(name, with_dk, with_dv)                                                                             \
    extern "C" __global__ void __launch_bounds__(K_THREADS, K_BLOCKS)                                                 \
        name(const element* __restrict__ q, const element* __restrict__ k, const element* __restrict__ v,             \
             const element* __restrict__ d_o, const float* __restrict__ lse, const float* __restrict__ delta,         \
             element* __restrict__ dk, element* __restrict__ dv, float* __restrict__ partial,                         \
             const int2* __restrict__ bounds, const int* __restrict__ order, int tokens, int heads, int kv_heads,     \
             int q_stride, int k_stride, int v_stride, int do_stride, int dk_stride, int dv_stride, float scale,      \
             float softcap, int window, int splits) {                                                                 \
        KvArguments a = {q,      k,     v,        d_o,      lse,      delta,    dk,        dv,        partial,         \
                         bounds, tokens, heads,   kv_heads, q_stride, k_stride, v_stride,  do_stride, dk_stride,       \
                         dv_stride, scale, softcap, window, splits,   order[blockIdx.y] * KEYS};                       \
        backward_kv<with_dk, with_dv>(a);                                                                             \
    }
#if HEAD_DIM == 256
KV_KERNEL(attention_backward_k, true, false)
KV_KERNEL(attention_backward_v, false, true)
#else
KV_KERNEL(attention_backward_kv, true, true)
#endif

// dk and dv from the f32 sums of the splits, added in order. One thread makes 4 columns; grid height 2: dk, dv.
extern "C" __global__ void attention_backward_reduce(const float* __restrict__ partial, element* __restrict__ dk,
                                                     element* __restrict__ dv, int tokens, int kv_heads,
                                                     int dk_stride, int dv_stride, int splits) {
    int quads = kv_heads * HEAD_DIM / 4;
    long long count = static_cast<long long>(tokens) * quads;
    long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= count) return;
    const float4* from = reinterpret_cast<const float4*>(partial) + blockIdx.y * splits * count + index;
    float4 sum = from[0];
    for (int split = 1; split < splits; ++split) {
        float4 next = from[split * count];
        sum.x += next.x;
        sum.y += next.y;
        sum.z += next.z;
        sum.w += next.w;
    }
    element* to = (blockIdx.y ? dv : dk) + index / quads * (blockIdx.y ? dv_stride : dk_stride) + index % quads * 4;
    *reinterpret_cast<uint2*>(to) = make_uint2(pack(sum.x, sum.y), pack(sum.z, sum.w));
}
