// Greedy generation with a key-value cache. A layer's cache is [slots][2: keys, values][length][width]
// with width = key-value heads x d; a token of slot s at position p lies in row p of s.

// Copies keys and values of `rows` tokens, which lie side by side from column `first` of `qkv`, to
// their places. Slot -1 is padding.
extern "C" __global__ void cache_append(const T* qkv, int ld, int first, int width, const int* slots,
                                        const int* positions, T* cache, int length, int rows) {
  u32 i = blockIdx.x * blockDim.x + threadIdx.x, packs = 2 * width / VECTOR;
  u32 row = i / packs, column = i % packs * VECTOR;
  if (row >= rows || slots[row] < 0) return;
  u64 part = column >= width, place = ((u64)slots[row] * 2 + part) * length + positions[row];
  *(Pack*)(cache + place * width + column % width) = *(const Pack*)(qkv + (u64)row * ld + first + column);
}

// One new token a row: out = softmax(scale q K^T) V over the positions of its slot up to its own, p, which
// holds its own key and value already; with a window (not 0) only over the last `window` of them, with a
// softcap c (not 0) of scores c tanh(s / c). A block a row and query head: its four warps take keys in turns
// of four, each with a running maximum m, sum l and weighted values (Milakov and Gimelshein, 2018), joined at
// the end in one order. A lane holds elements lane, lane + 32, ... of the head. d is at most 256.
#define WARPS 4
#define KEYS 4
extern "C" __global__ void decode_attention(const T* q, int ldq, T* out, int ldo, const T* cache,
                                            const int* slots, const int* positions, int kv_heads, int d,
                                            int length, float scale, float softcap, int window) {
  __shared__ float maxima[WARPS], sums[WARPS], joined[WARPS][256];
  int row = blockIdx.x, head = blockIdx.y, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int slot = slots[row], last = positions[row], width = kv_heads * d, parts = d / 32;
  int start = window > 0 ? max(0, last - window + 1) : 0;
  if (slot < 0) return;
  const T* keys = cache + (u64)slot * 2 * length * width + head / (gridDim.y / kv_heads) * d + lane;
  const T* values = keys + (u64)length * width;
  const T* own = q + (u64)row * ldq + head * d + lane;
  float query[8], sum[8], m = -INFINITY, l = 0.f;
#pragma unroll
  for (int e = 0; e < 8; e++) {
    query[e] = e < parts ? load(own[e * 32]) * scale : 0.f;
    sum[e] = 0.f;
  }
  for (int first = start + warp * KEYS; first <= last; first += WARPS * KEYS) {
    float score[KEYS];
#pragma unroll
    for (int k = 0; k < KEYS; k++) {
      score[k] = 0.f;
      const T* key = keys + (u64)min(first + k, last) * width;
#pragma unroll
      for (int e = 0; e < 8; e++)
        if (e < parts) score[k] += query[e] * load(key[e * 32]);
    }
#pragma unroll
    for (int i = 16; i > 0; i >>= 1)
#pragma unroll
      for (int k = 0; k < KEYS; k++) score[k] += __shfl_xor_sync(~0u, score[k], i);
    float top = m, slope;
    if (softcap > 0.f)
#pragma unroll
      for (int k = 0; k < KEYS; k++) score[k] = softcapped(score[k], softcap, slope);
#pragma unroll
    for (int k = 0; k < KEYS; k++) {
      if (first + k > last) score[k] = -INFINITY;
      top = fmaxf(top, score[k]);
    }
    float old = EXP(m - top);
    l *= old;
#pragma unroll
    for (int e = 0; e < 8; e++) sum[e] *= old;
#pragma unroll
    for (int k = 0; k < KEYS; k++) {
      float weight = EXP(score[k] - top);
      const T* value = values + (u64)min(first + k, last) * width;
      l += weight;
#pragma unroll
      for (int e = 0; e < 8; e++)
        if (e < parts) sum[e] += weight * load(value[e * 32]);
    }
    m = top;
  }
  if (lane == 0) maxima[warp] = m, sums[warp] = l;
#pragma unroll
  for (int e = 0; e < 8; e++)
    if (e < parts) joined[warp][e * 32 + lane] = sum[e];
  __syncthreads();
  float top = maxima[0], all = 0.f;
  for (int w = 1; w < WARPS; w++) top = fmaxf(top, maxima[w]);
  for (int w = 0; w < WARPS; w++) all += sums[w] * EXP(maxima[w] - top);
  for (int i = threadIdx.x; i < d; i += blockDim.x) {
    float x = 0.f;
    for (int w = 0; w < WARPS; w++) x += joined[w][i] * EXP(maxima[w] - top);
    out[(u64)row * ldo + head * d + i] = store(x / all);
  }
}

// ids[row] = index of the greatest logit, the lowest of equals; with a softcap c (not 0) of the logits
// c tanh(l / c), among which there are more equals. A block of 1,024 a row.
extern "C" __global__ void argmax(const float* logits, int vocabulary, float softcap, int* ids) {
  __shared__ float best[32];
  __shared__ int places[32];
  const float* row = logits + (u64)blockIdx.x * vocabulary;
  float top = -INFINITY;
  int place = 0x7fffffff;
  for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) {
    float x = softcap > 0.f ? softcap * tanhf(row[i] / softcap) : row[i];
    if (x > top) top = x, place = i;
  }
  for (int i = 16; i > 0; i >>= 1) {
    float other = __shfl_xor_sync(~0u, top, i);
    int there = __shfl_xor_sync(~0u, place, i);
    if (other > top || (other == top && there < place)) top = other, place = there;
  }
  if ((threadIdx.x & 31) == 0) best[threadIdx.x >> 5] = top, places[threadIdx.x >> 5] = place;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < (int)(blockDim.x >> 5); w++)
    if (best[w] > top || (best[w] == top && places[w] < place)) top = best[w], place = places[w];
  ids[blockIdx.x] = place == 0x7fffffff ? 0 : place;
}
