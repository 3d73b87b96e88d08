// The slow twin of flash attention: causal softmax(s) v inside segments with s = scale q kT, grouped queries.
// q, k, v lie side by side in rows of stride ld; kv head of query head h is h / (heads / kv_heads).
// start[row] is the first row of the row's segment, stop[row] one past its last. With a softcap c (not 0)
// s = c tanh(scale q kT / c); with a window (not 0) row i sees rows j with i - j < window alone.

// s of a product of query and key, and its derivative in scale q kT.
__device__ __forceinline__ float score_of(float dot, float scale, float softcap, float& slope) {
  slope = 1.f;
  return softcap > 0.f ? softcapped(dot * scale, softcap, slope) : dot * scale;
}

// The first row that `row` sees, and one past the last that sees it.
__device__ __forceinline__ int first_seen(int row, int start, int window) {
  return window > 0 ? max(start, row - window + 1) : start;
}
__device__ __forceinline__ int last_seeing(int row, int stop, int window) {
  return window > 0 ? min(stop, row + window) : stop;
}

extern "C" __global__ void attention_reference(const T* q, const T* k, const T* v, int ld, T* out,
                                               int ldo, float* lse, const int* start, int heads,
                                               int kv_heads, int d, float scale, float softcap, int window,
                                               int n) {
  extern __shared__ float score[];
  int row = blockIdx.x, head = blockIdx.y, kv = head / (heads / kv_heads);
  int first = first_seen(row, start[row], window), count = row - first + 1;
  const T* query = q + (u64)row * ld + head * d;
  float top = -INFINITY;
  for (int j = threadIdx.x; j < count; j += blockDim.x) {
    const T* key = k + (u64)(first + j) * ld + kv * d;
    float dot = 0.f, slope;
    for (int c = 0; c < d; c++) dot += load(query[c]) * load(key[c]);
    score[j] = score_of(dot, scale, softcap, slope);
  }
  __syncthreads();
  for (int j = 0; j < count; j++) top = fmaxf(top, score[j]);
  float sum = 0.f;
  for (int j = 0; j < count; j++) sum += EXP(score[j] - top);
  if (threadIdx.x == 0) lse[(u64)head * n + row] = top + logf(sum);
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    float o = 0.f;
    for (int j = 0; j < count; j++)
      o += EXP(score[j] - top) * load(v[(u64)(first + j) * ld + kv * d + c]);
    out[(u64)row * ldo + head * d + c] = store(o / sum);
  }
}

// delta[head, row] = sum_c dout out
extern "C" __global__ void attention_delta(const T* out, int ldo, const T* dout, int lddo, float* delta,
                                           int d, int n) {
  int row = blockIdx.x, head = blockIdx.y;
  float sum = 0.f;
  for (int c = threadIdx.x; c < d; c += blockDim.x)
    sum += load(out[(u64)row * ldo + head * d + c]) * load(dout[(u64)row * lddo + head * d + c]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) delta[(u64)head * n + row] = sum;
}

// dq[row] = scale sum_j ds_j k_j with ds_j = p_j (dp_j - delta), times the slope of a softcap
extern "C" __global__ void attention_reference_dq(const T* q, const T* k, const T* v, int ld, const T* dout,
                                                  int lddo, const float* lse, const float* delta, T* dq,
                                                  int ldd, const int* start, int heads, int kv_heads,
                                                  int d, float scale, float softcap, int window, int n) {
  extern __shared__ float ds[];
  int row = blockIdx.x, head = blockIdx.y, kv = head / (heads / kv_heads);
  int first = first_seen(row, start[row], window), count = row - first + 1;
  const T* query = q + (u64)row * ld + head * d;
  const T* grad = dout + (u64)row * lddo + head * d;
  float norm = lse[(u64)head * n + row], mean = delta[(u64)head * n + row];
  for (int j = threadIdx.x; j < count; j += blockDim.x) {
    const T* key = k + (u64)(first + j) * ld + kv * d;
    const T* value = v + (u64)(first + j) * ld + kv * d;
    float dot = 0.f, dp = 0.f, slope;
    for (int c = 0; c < d; c++) dot += load(query[c]) * load(key[c]), dp += load(grad[c]) * load(value[c]);
    float p = EXP(score_of(dot, scale, softcap, slope) - norm);
    ds[j] = p * (dp - mean) * slope * scale;
  }
  __syncthreads();
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    float sum = 0.f;
    for (int j = 0; j < count; j++) sum += ds[j] * load(k[(u64)(first + j) * ld + kv * d + c]);
    dq[(u64)row * ldd + head * d + c] = store(sum);
  }
}

// dk[row] = sum over later rows i of the segment and heads of the group of ds_i q_i; dv likewise.
extern "C" __global__ void attention_reference_dkv(const T* q, const T* k, const T* v, int ld,
                                                   const T* dout, int lddo, const float* lse,
                                                   const float* delta, T* dk, T* dv, int ldd,
                                                   const int* stop, int heads, int kv_heads, int d,
                                                   float scale, float softcap, int window, int n) {
  extern __shared__ float shared[];
  int row = blockIdx.x, kv = blockIdx.y, group = heads / kv_heads;
  int count = last_seeing(row, stop[row], window) - row;
  float *p = shared, *ds = shared + count;
  const T* key = k + (u64)row * ld + kv * d;
  const T* value = v + (u64)row * ld + kv * d;
  float dk_sum = 0.f, dv_sum = 0.f;  // d is at most the block
  for (int head = kv * group; head < (kv + 1) * group; head++) {
    __syncthreads();
    for (int j = threadIdx.x; j < count; j += blockDim.x) {
      const T* query = q + (u64)(row + j) * ld + head * d;
      const T* grad = dout + (u64)(row + j) * lddo + head * d;
      float dot = 0.f, dp = 0.f, slope;
      for (int c = 0; c < d; c++) dot += load(query[c]) * load(key[c]), dp += load(grad[c]) * load(value[c]);
      p[j] = EXP(score_of(dot, scale, softcap, slope) - lse[(u64)head * n + row + j]);
      ds[j] = p[j] * (dp - delta[(u64)head * n + row + j]) * slope * scale;
    }
    __syncthreads();
    if (threadIdx.x < d)
      for (int j = 0; j < count; j++) {
        dk_sum += ds[j] * load(q[(u64)(row + j) * ld + head * d + threadIdx.x]);
        dv_sum += p[j] * load(dout[(u64)(row + j) * lddo + head * d + threadIdx.x]);
      }
  }
  if (threadIdx.x < d) {
    dk[(u64)row * ldd + kv * d + threadIdx.x] = store(dk_sum);
    dv[(u64)row * ldd + kv * d + threadIdx.x] = store(dv_sum);
  }
}
