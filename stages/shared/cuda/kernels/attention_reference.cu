// The slow twin of flash attention: causal softmax(scale q kT) v inside segments, grouped queries.
// q, k, v lie side by side in rows of stride ld; kv head of query head h is h / (heads / kv_heads).
// start[row] is the first row of the row's segment, stop[row] one past its last.

extern "C" __global__ void attention_reference(const T* q, const T* k, const T* v, int ld, T* out,
                                               int ldo, float* lse, const int* start, int heads,
                                               int kv_heads, int d, float scale, int n) {
  extern __shared__ float score[];
  int row = blockIdx.x, head = blockIdx.y, kv = head / (heads / kv_heads);
  int first = start[row], count = row - first + 1;
  const T* query = q + (u64)row * ld + head * d;
  float top = -INFINITY;
  for (int j = threadIdx.x; j < count; j += blockDim.x) {
    const T* key = k + (u64)(first + j) * ld + kv * d;
    float dot = 0.f;
    for (int c = 0; c < d; c++) dot += load(query[c]) * load(key[c]);
    score[j] = dot * scale;
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

// dq[row] = scale sum_j p_j (dp_j - delta) k_j
extern "C" __global__ void attention_reference_dq(const T* q, const T* k, const T* v, int ld, const T* dout,
                                                  int lddo, const float* lse, const float* delta, T* dq,
                                                  int ldd, const int* start, int heads, int kv_heads,
                                                  int d, float scale, int n) {
  extern __shared__ float ds[];
  int row = blockIdx.x, head = blockIdx.y, kv = head / (heads / kv_heads);
  int first = start[row], count = row - first + 1;
  const T* query = q + (u64)row * ld + head * d;
  const T* grad = dout + (u64)row * lddo + head * d;
  float norm = lse[(u64)head * n + row], mean = delta[(u64)head * n + row];
  for (int j = threadIdx.x; j < count; j += blockDim.x) {
    const T* key = k + (u64)(first + j) * ld + kv * d;
    const T* value = v + (u64)(first + j) * ld + kv * d;
    float dot = 0.f, dp = 0.f;
    for (int c = 0; c < d; c++) dot += load(query[c]) * load(key[c]), dp += load(grad[c]) * load(value[c]);
    ds[j] = EXP(dot * scale - norm) * (dp - mean) * scale;
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
                                                   float scale, int n) {
  extern __shared__ float shared[];
  int row = blockIdx.x, kv = blockIdx.y, group = heads / kv_heads;
  int count = stop[row] - row;
  float *p = shared, *ds = shared + count;
  const T* key = k + (u64)row * ld + kv * d;
  const T* value = v + (u64)row * ld + kv * d;
  float dk_sum = 0.f, dv_sum = 0.f;  // d is at most the block
  for (int head = kv * group; head < (kv + 1) * group; head++) {
    __syncthreads();
    for (int j = threadIdx.x; j < count; j += blockDim.x) {
      const T* query = q + (u64)(row + j) * ld + head * d;
      const T* grad = dout + (u64)(row + j) * lddo + head * d;
      float dot = 0.f, dp = 0.f;
      for (int c = 0; c < d; c++) dot += load(query[c]) * load(key[c]), dp += load(grad[c]) * load(value[c]);
      p[j] = EXP(dot * scale - lse[(u64)head * n + row + j]);
      ds[j] = p[j] * (dp - delta[(u64)head * n + row + j]) * scale;
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
