// Cross-entropy of rows of logits, in place: loss = log(sum exp x) - x[t], and the logits become
// scale * (softmax(x) - onehot(t)). A block a row; the row is read twice and written once. A row with
// a negative target is filling: no loss, and a gradient of zeros.
extern "C" __global__ void cross_entropy(T* logits, const int* targets, float* loss, int vocabulary,
                                         const float* scales) {
  __shared__ float maxima[32], sums[32];
  T* row = logits + (u64)blockIdx.x * vocabulary;
  int packs = vocabulary / VECTOR;
  float m = -INFINITY, s = 0.f;
  for (int i = threadIdx.x; i < packs; i += blockDim.x) {
    Pack p = ((const Pack*)row)[i];
    float top = m;
    for (int j = 0; j < VECTOR; j++) top = fmaxf(top, load(p.v[j]));
    s *= EXP(m - top);
    for (int j = 0; j < VECTOR; j++) s += EXP(load(p.v[j]) - top);
    m = top;
  }
  if (m == -INFINITY) s = 0.f;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  for (int i = 16; i > 0; i >>= 1) {
    float m2 = __shfl_xor_sync(~0u, m, i), s2 = __shfl_xor_sync(~0u, s, i), top = fmaxf(m, m2);
    if (top > -INFINITY) s = s * EXP(m - top) + s2 * EXP(m2 - top);
    m = top;
  }
  if (lane == 0) maxima[warp] = m, sums[warp] = s;
  __syncthreads();
  m = maxima[0];
  for (int i = 1; i < warps; i++) m = fmaxf(m, maxima[i]);
  s = 0.f;
  for (int i = 0; i < warps; i++)
    if (maxima[i] > -INFINITY) s += sums[i] * EXP(maxima[i] - m);
  int target = targets[blockIdx.x];
  float scale = target < 0 ? 0.f : *scales, factor = scale / s;
  if (threadIdx.x == 0) loss[blockIdx.x] = target < 0 ? 0.f : logf(s) + m - load(row[target]);
  __syncthreads();
  for (int i = threadIdx.x; i < packs; i += blockDim.x) {
    Pack p = ((const Pack*)row)[i];
    for (int j = 0; j < VECTOR; j++) {
      float g = EXP(load(p.v[j]) - m) * factor;
      if (i * VECTOR + j == target) g -= scale;
      p.v[j] = store(g);
    }
    ((Pack*)row)[i] = p;
  }
}

// total += sum of loss[0..count], in one order.
extern "C" __global__ void add_losses(const float* loss, int count, double* total) {
  __shared__ double partial[256];
  double sum = 0.0;
  for (int i = threadIdx.x; i < count; i += 256) sum += loss[i];
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < 256; i++) sum += partial[i];
    *total += sum;
  }
}
