// Flash attention (Dao, "FlashAttention-2", 2023) over packed segments, with grouped queries, on
// mma.sync m16n8k16 (sm_80 and newer), for 2-byte elements and HEAD_DIM 64 or 128.
//
//   s = scale q kT,  p = softmax(s) over first[i] <= j <= i,  o = p v
//   ds = p (do vT - delta) scale,  dq = ds k,  dk = dsT q,  dv = pT do,  delta = sum(o do)
//
// A warp owns whole rows of a tile of scores, so that a softmax needs two shuffles, and scores go
// from the accumulators of one product into the operands of the next without leaving registers.
// dq has a pass of its own instead of atomics: results repeat bit for bit.
// Rows of q, k, v are `ld` elements apart. first[i] is the first row of i's segment, stop[i] one
// past its last; both ascend. order[i] is the tile that the i-th blocks take, longest first.
#define D HEAD_DIM
#define CHUNKS (D / 8)  // 16-byte chunks a row

#if ELEMENT == 1
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#define PACK "cvt.rn.bf16x2.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#define PACK "cvt.rn.f16x2.f32"
#endif

__device__ __forceinline__ void mma(float* c, const u32* a, u32 b0, u32 b1) {
  asm volatile(MMA " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 r;
  asm(PACK " %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ void load4(u32* r, u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}
__device__ __forceinline__ void load4_transposed(u32* r, u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}
__device__ __forceinline__ void copy4(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}
#define COMMIT asm volatile("cp.async.commit_group;")
#define WAIT(n) asm volatile("cp.async.wait_group %0;" ::"n"(n))

// Address of 8 columns of a row of a tile: chunks are permuted so that the rows that ldmatrix reads
// together lie in different banks.
__device__ __forceinline__ u32 place(u32 tile, int row, int column) {
  return tile + (row * CHUNKS + ((column >> 3) ^ (row & 7))) * 16;
}
// 16 x 16 of an operand stored [row][k]: the left one, m = row.
__device__ __forceinline__ void left(u32* r, u32 tile, int row, int k) {
  int lane = threadIdx.x & 31;
  load4(r, place(tile, row + (lane & 15), k + (lane >> 4) * 8));
}
// The right one stored [n][k]: r[0], r[1] for n..n+8, r[2], r[3] for the next 8.
__device__ __forceinline__ void right(u32* r, u32 tile, int n, int k) {
  int lane = threadIdx.x & 31;
  load4(r, place(tile, n + (lane & 7) + ((lane >> 4) << 3), k + ((lane >> 3) & 1) * 8));
}
// The right one stored [k][n].
__device__ __forceinline__ void right_transposed(u32* r, u32 tile, int k, int n) {
  int lane = threadIdx.x & 31;
  load4_transposed(r, place(tile, k + (lane & 15), n + (lane >> 4) * 8));
}
// Starts copying `rows` rows from `row` on, clamped to the last one; what is masked may be anything.
template <int ROWS, int THREADS>
__device__ __forceinline__ void fetch(u32 tile, const T* base, int row, int ld, int n) {
  for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
    int r = i / CHUNKS, c = i % CHUNKS;
    copy16(place(tile, r, c * 8), base + (u64)min(row + r, n - 1) * ld + c * 8);
  }
}

#define FORWARD_M 128
#define FORWARD_N 64
// Grid (heads, tiles of 128 queries), 128 threads: a warp has 32 queries, so that a fragment of k or
// v serves two products. Shared: q, and two stages of k and v.
extern "C" __global__ void __launch_bounds__(128, 2)
flash_forward(const T* q, const T* k, const T* v, int ld, T* out, int ldo, float* lse, const int* first,
              const int* order, int heads, int kv_heads, float scale, int n) {
  extern __shared__ __align__(128) u8 shared[];
  u32 sq = (u32)__cvta_generic_to_shared(shared), sk = sq + FORWARD_M * D * 2;
  u32 sv = sk + 2 * FORWARD_N * D * 2;
  int head = blockIdx.x, kv = head / (heads / kv_heads);
  int row0 = order[blockIdx.y] * FORWARD_M, last = min(row0 + FORWARD_M, n) - 1;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  int key0 = first[row0], tiles = (last - key0) / FORWARD_N + 1, inner = first[last];
  k += kv * D, v += kv * D;
  fetch<FORWARD_M, 128>(sq, q + head * D, row0, ld, n);
  fetch<FORWARD_N, 128>(sk, k, key0, ld, n);
  fetch<FORWARD_N, 128>(sv, v, key0, ld, n);
  COMMIT;
  float o[2][D / 8][4] = {}, top[2][2], sum[2][2] = {};
  int row[2][2], from[2][2];
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      row[m][h] = row0 + warp * 32 + m * 16 + h * 8 + g;
      from[m][h] = first[min(row[m][h], n - 1)];
      top[m][h] = -INFINITY;
    }
  float rate = scale * 1.44269504f;
  for (int i = 0; i < tiles; i++) {
    int key = key0 + i * FORWARD_N, stage = (i & 1) * FORWARD_N * D * 2;
    if (i + 1 < tiles) {
      int other = FORWARD_N * D * 2 - stage;
      fetch<FORWARD_N, 128>(sk + other, k, key + FORWARD_N, ld, n);
      fetch<FORWARD_N, 128>(sv + other, v, key + FORWARD_N, ld, n);
      COMMIT;
      WAIT(1);
    } else {
      WAIT(0);
    }
    __syncthreads();
    float s[2][FORWARD_N / 8][4] = {};
#pragma unroll
    for (int c = 0; c < D; c += 16) {
      u32 a[2][4];
      left(a[0], sq, warp * 32, c);
      left(a[1], sq, warp * 32 + 16, c);
#pragma unroll
      for (int j = 0; j < FORWARD_N / 16; j++) {
        u32 b[4];
        right(b, sk + stage, j * 16, c);
#pragma unroll
        for (int m = 0; m < 2; m++) {
          mma(s[m][2 * j], a[m], b[0], b[1]);
          mma(s[m][2 * j + 1], a[m], b[2], b[3]);
        }
      }
    }
    // Inside one segment and below the diagonal nothing is masked.
    if (key + FORWARD_N - 1 > row0 || key < inner)
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int j = 0; j < FORWARD_N / 8; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            int at = key + j * 8 + t * 2 + (e & 1);
            if (at > row[m][e >> 1] || at < from[m][e >> 1]) s[m][j][e] = -INFINITY;
          }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float high = top[m][h];
#pragma unroll
        for (int j = 0; j < FORWARD_N / 8; j++)
          high = fmaxf(high, fmaxf(s[m][j][2 * h], s[m][j][2 * h + 1]));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
        float base = high == -INFINITY ? 0.f : high * rate;
        float shrink = exp2_fast(top[m][h] * rate - base), part = 0.f;
        top[m][h] = high;
#pragma unroll
        for (int j = 0; j < FORWARD_N / 8; j++)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; e++) {
            s[m][j][e] = exp2_fast(s[m][j][e] * rate - base);
            part += s[m][j][e];
          }
        sum[m][h] = sum[m][h] * shrink + part;
#pragma unroll
        for (int j = 0; j < D / 8; j++) o[m][j][2 * h] *= shrink, o[m][j][2 * h + 1] *= shrink;
      }
#pragma unroll
    for (int c = 0; c < FORWARD_N / 16; c++) {
      u32 a[2][4];
#pragma unroll
      for (int m = 0; m < 2; m++) {
        a[m][0] = pack(s[m][2 * c][0], s[m][2 * c][1]);
        a[m][1] = pack(s[m][2 * c][2], s[m][2 * c][3]);
        a[m][2] = pack(s[m][2 * c + 1][0], s[m][2 * c + 1][1]);
        a[m][3] = pack(s[m][2 * c + 1][2], s[m][2 * c + 1][3]);
      }
#pragma unroll
      for (int j = 0; j < D / 16; j++) {
        u32 b[4];
        right_transposed(b, sv + stage, c * 16, j * 16);
#pragma unroll
        for (int m = 0; m < 2; m++) {
          mma(o[m][2 * j], a[m], b[0], b[1]);
          mma(o[m][2 * j + 1], a[m], b[2], b[3]);
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float total = sum[m][h];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      if (row[m][h] > last) continue;
      float inverse = 1.f / total;
      if (t == 0) lse[(u64)head * n + row[m][h]] = top[m][h] * scale + logf(total);
      u32* to = (u32*)(out + (u64)row[m][h] * ldo + head * D) + t;
#pragma unroll
      for (int j = 0; j < D / 8; j++)
        to[j * 4] = pack(o[m][j][2 * h] * inverse, o[m][j][2 * h + 1] * inverse);
    }
}

// delta[head, row]: a warp a row and head, D / 32 elements a lane.
extern "C" __global__ void flash_delta(const T* out, int ldo, const T* dout, int lddo, float* delta,
                                       int heads, int n) {
  int lane = threadIdx.x & 31;
  u64 i = (u64)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (i >= (u64)n * heads) return;
  u64 row = i / heads, head = i % heads;
  const T* o = out + row * ldo + head * D + lane * (D / 32);
  const T* g = dout + row * lddo + head * D + lane * (D / 32);
  float sum = 0.f;
#pragma unroll
  for (int c = 0; c < D / 32; c++) sum += load(o[c]) * load(g[c]);
  for (int k = 16; k > 0; k >>= 1) sum += __shfl_xor_sync(~0u, sum, k);
  if (lane == 0) delta[head * n + row] = sum;
}

#define DQ_M 128
#define DQ_N 32
// Grid (heads, tiles of 128 queries), 128 threads. Shared: q, do, and two stages of k and v.
extern "C" __global__ void __launch_bounds__(128, 2)
flash_dq(const T* q, const T* k, const T* v, int ld, const T* dout, int lddo, const float* lse,
         const float* delta, T* dq, int ldd, const int* first, const int* order,
         int heads, int kv_heads, float scale, int n) {
  extern __shared__ __align__(128) u8 shared[];
  u32 sq = (u32)__cvta_generic_to_shared(shared), sdo = sq + DQ_M * D * 2, sk = sdo + DQ_M * D * 2;
  u32 sv = sk + 2 * DQ_N * D * 2;
  int head = blockIdx.x, kv = head / (heads / kv_heads);
  int row0 = order[blockIdx.y] * DQ_M, last = min(row0 + DQ_M, n) - 1;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  int key0 = first[row0], tiles = (last - key0) / DQ_N + 1, inner = first[last];
  k += kv * D, v += kv * D;
  fetch<DQ_M, 128>(sq, q + head * D, row0, ld, n);
  fetch<DQ_M, 128>(sdo, dout + head * D, row0, lddo, n);
  fetch<DQ_N, 128>(sk, k, key0, ld, n);
  fetch<DQ_N, 128>(sv, v, key0, ld, n);
  COMMIT;
  float acc[2][D / 8][4] = {}, norm[2][2], mean[2][2];
  int row[2][2], from[2][2];
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      row[m][h] = row0 + warp * 32 + m * 16 + h * 8 + g;
      int at = min(row[m][h], n - 1);
      from[m][h] = first[at];
      norm[m][h] = lse[(u64)head * n + at] * 1.44269504f;
      mean[m][h] = delta[(u64)head * n + at];
    }
  float rate = scale * 1.44269504f;
  for (int i = 0; i < tiles; i++) {
    int key = key0 + i * DQ_N, stage = (i & 1) * DQ_N * D * 2;
    if (i + 1 < tiles) {
      int other = DQ_N * D * 2 - stage;
      fetch<DQ_N, 128>(sk + other, k, key + DQ_N, ld, n);
      fetch<DQ_N, 128>(sv + other, v, key + DQ_N, ld, n);
      COMMIT;
      WAIT(1);
    } else {
      WAIT(0);
    }
    __syncthreads();
    float s[2][DQ_N / 8][4] = {}, dp[2][DQ_N / 8][4] = {};
#pragma unroll
    for (int c = 0; c < D; c += 16) {
      u32 a[2][4], e[2][4];
#pragma unroll
      for (int m = 0; m < 2; m++) {
        left(a[m], sq, warp * 32 + m * 16, c);
        left(e[m], sdo, warp * 32 + m * 16, c);
      }
#pragma unroll
      for (int j = 0; j < DQ_N / 16; j++) {
        u32 b[4];
        right(b, sk + stage, j * 16, c);
#pragma unroll
        for (int m = 0; m < 2; m++) {
          mma(s[m][2 * j], a[m], b[0], b[1]);
          mma(s[m][2 * j + 1], a[m], b[2], b[3]);
        }
        right(b, sv + stage, j * 16, c);
#pragma unroll
        for (int m = 0; m < 2; m++) {
          mma(dp[m][2 * j], e[m], b[0], b[1]);
          mma(dp[m][2 * j + 1], e[m], b[2], b[3]);
        }
      }
    }
    bool masked = key + DQ_N - 1 > row0 || key < inner;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int j = 0; j < DQ_N / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          int h = e >> 1, at = key + j * 8 + t * 2 + (e & 1);
          float p = exp2_fast(s[m][j][e] * rate - norm[m][h]);
          if (masked && (at > row[m][h] || at < from[m][h])) p = 0.f;
          s[m][j][e] = p * (dp[m][j][e] - mean[m][h]) * scale;
        }
#pragma unroll
    for (int c = 0; c < DQ_N / 16; c++) {
      u32 a[2][4];
#pragma unroll
      for (int m = 0; m < 2; m++) {
        a[m][0] = pack(s[m][2 * c][0], s[m][2 * c][1]);
        a[m][1] = pack(s[m][2 * c][2], s[m][2 * c][3]);
        a[m][2] = pack(s[m][2 * c + 1][0], s[m][2 * c + 1][1]);
        a[m][3] = pack(s[m][2 * c + 1][2], s[m][2 * c + 1][3]);
      }
#pragma unroll
      for (int j = 0; j < D / 16; j++) {
        u32 b[4];
        right_transposed(b, sk + stage, c * 16, j * 16);
#pragma unroll
        for (int m = 0; m < 2; m++) {
          mma(acc[m][2 * j], a[m], b[0], b[1]);
          mma(acc[m][2 * j + 1], a[m], b[2], b[3]);
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (row[m][h] > last) continue;
      u32* to = (u32*)(dq + (u64)row[m][h] * ldd + head * D) + t;
#pragma unroll
      for (int j = 0; j < D / 8; j++) to[j * 4] = pack(acc[m][j][2 * h], acc[m][j][2 * h + 1]);
    }
}

#define DKV_N 128
#define DKV_M 64
// Grid (heads, tiles of 128 keys), 256 threads: a warp has 16 keys and computes scores transposed,
// so that they are left operands for dk and dv. Shared: k, v, two stages of q, do, lse and delta.
// Writes the share of one query head, f32, to parts[2][row][heads * D]: dk, then dv.
extern "C" __global__ void __launch_bounds__(256, 1)
flash_dkv(const T* q, const T* k, const T* v, int ld, const T* dout, int lddo, const float* lse,
          const float* delta, float* parts, const int* stop, const int* order,
          int heads, int kv_heads, float scale, int n) {
  extern __shared__ __align__(128) u8 shared[];
  u32 sk = (u32)__cvta_generic_to_shared(shared), sv = sk + DKV_N * D * 2, sq = sv + DKV_N * D * 2;
  u32 sdo = sq + 2 * DKV_M * D * 2, sl = sdo + 2 * DKV_M * D * 2;
  float* numbers = (float*)(shared + (sl - sk));  // [stage][lse, delta][DKV_M]
  int head = blockIdx.x, kv = head / (heads / kv_heads);
  int key0 = order[blockIdx.y] * DKV_N, final = min(key0 + DKV_N, n) - 1, end = stop[final];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  int tiles = (end - 1 - key0) / DKV_M + 1, inner = stop[key0];
  q += head * D, dout += head * D, lse += (u64)head * n, delta += (u64)head * n;
  fetch<DKV_N, 256>(sk, k + kv * D, key0, ld, n);
  fetch<DKV_N, 256>(sv, v + kv * D, key0, ld, n);
  auto stage_in = [&](int i) {
    int row = key0 + i * DKV_M, stage = i & 1;
    fetch<DKV_M, 256>(sq + stage * DKV_M * D * 2, q, row, ld, n);
    fetch<DKV_M, 256>(sdo + stage * DKV_M * D * 2, dout, row, lddo, n);
    if (threadIdx.x < 2 * DKV_M) {
      int r = threadIdx.x % DKV_M;
      const float* source = threadIdx.x < DKV_M ? lse : delta;
      copy4(sl + (stage * 2 * DKV_M + threadIdx.x) * 4, source + min(row + r, n - 1));
    }
    COMMIT;
  };
  stage_in(0);
  float dk[D / 8][4] = {}, dv[D / 8][4] = {};
  int own[2] = {key0 + warp * 16 + g, key0 + warp * 16 + g + 8}, until[2];
#pragma unroll
  for (int h = 0; h < 2; h++) until[h] = own[h] <= final ? stop[own[h]] : 0;
  float rate = scale * 1.44269504f;
  for (int i = 0; i < tiles; i++) {
    int row0 = key0 + i * DKV_M, stage = i & 1;
    u32 tq = sq + stage * DKV_M * D * 2, tdo = sdo + stage * DKV_M * D * 2;
    const float *norm = numbers + stage * 2 * DKV_M, *mean = norm + DKV_M;
    if (i + 1 < tiles) {
      stage_in(i + 1);
      WAIT(1);
    } else {
      WAIT(0);
    }
    __syncthreads();
    float s[DKV_M / 8][4] = {}, dp[DKV_M / 8][4] = {};
#pragma unroll
    for (int c = 0; c < D; c += 16) {
      u32 a[4], e[4];
      left(a, sk, warp * 16, c);
      left(e, sv, warp * 16, c);
#pragma unroll
      for (int j = 0; j < DKV_M / 16; j++) {
        u32 b[4];
        right(b, tq, j * 16, c);
        mma(s[2 * j], a, b[0], b[1]);
        mma(s[2 * j + 1], a, b[2], b[3]);
        right(b, tdo, j * 16, c);
        mma(dp[2 * j], e, b[0], b[1]);
        mma(dp[2 * j + 1], e, b[2], b[3]);
      }
    }
    bool masked = row0 < key0 + DKV_N || row0 + DKV_M > inner;
#pragma unroll
    for (int j = 0; j < DKV_M / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        int h = e >> 1, column = j * 8 + t * 2 + (e & 1), at = row0 + column;
        float p = exp2_fast(s[j][e] * rate - norm[column] * 1.44269504f);
        if (masked && (at < own[h] || at >= until[h])) p = 0.f;
        s[j][e] = p;
        dp[j][e] = p * (dp[j][e] - mean[column]) * scale;
      }
#pragma unroll
    for (int c = 0; c < DKV_M / 16; c++) {
      u32 a[4] = {pack(s[2 * c][0], s[2 * c][1]), pack(s[2 * c][2], s[2 * c][3]),
                  pack(s[2 * c + 1][0], s[2 * c + 1][1]), pack(s[2 * c + 1][2], s[2 * c + 1][3])};
      u32 e[4] = {pack(dp[2 * c][0], dp[2 * c][1]), pack(dp[2 * c][2], dp[2 * c][3]),
                  pack(dp[2 * c + 1][0], dp[2 * c + 1][1]), pack(dp[2 * c + 1][2], dp[2 * c + 1][3])};
#pragma unroll
      for (int j = 0; j < D / 16; j++) {
        u32 b[4];
        right_transposed(b, tdo, c * 16, j * 16);
        mma(dv[2 * j], a, b[0], b[1]);
        mma(dv[2 * j + 1], a, b[2], b[3]);
        right_transposed(b, tq, c * 16, j * 16);
        mma(dk[2 * j], e, b[0], b[1]);
        mma(dk[2 * j + 1], e, b[2], b[3]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (own[h] > final) continue;
    float2* to = (float2*)(parts + ((u64)own[h] * heads + head) * D) + t;
    u64 values = (u64)n * heads * D / 2;
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
      to[j * 4] = make_float2(dk[j][2 * h], dk[j][2 * h + 1]);
      to[values + j * 4] = make_float2(dv[j][2 * h], dv[j][2 * h + 1]);
    }
  }
}

// dk and dv of a kv head: the sum over its query heads, in order. Grid (elements / 256, 2).
extern "C" __global__ void flash_gather(const float* parts, T* dk, T* dv, int ldd, int heads,
                                        int kv_heads, int n) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  int group = heads / kv_heads, width = kv_heads * D;
  if (i >= (u64)n * width) return;
  u64 row = i / width;
  int column = i % width, kv = column / D;
  const float* from = parts + ((u64)blockIdx.y * n * heads + row * heads + kv * group) * D + column % D;
  float sum = 0.f;
  for (int h = 0; h < group; h++) sum += from[h * D];
  (blockIdx.y ? dv : dk)[row * ldd + column] = store(sum);
}
