// Cross-entropy of rows of logits l, in place: loss = log(sum exp x) - x[t] with x = l, and the logits become
// scale * (softmax(x) - onehot(t)). With a cap c, x = c tanh(l / c), and the gradient is times
// 1 - tanh(l / c)^2. A block a row; the row is read twice and written once. Rows lie as many elements apart as
// the vocabulary has, rounded up to 16 bytes; what is behind it is never read. A row with a negative target is
// filling: no loss, and a gradient of zeros.
template <bool CAPPED>
__device__ __forceinline__ void cross_entropy_of(T* logits, const int* targets, float* loss, int vocabulary,
                                                 const float* scales, float cap) {
  auto value = [&](T logit) {
    float slope;
    return CAPPED ? softcapped(load(logit), cap, slope) : load(logit);
  };
  __shared__ float maxima[32], sums[32];
  T* row = logits + (u64)blockIdx.x * ((vocabulary + VECTOR - 1) / VECTOR * VECTOR);
  // Whole packs, and the column of this thread among those that make none.
  int packs = vocabulary / VECTOR, last = packs * VECTOR + threadIdx.x;
  float m = -INFINITY, s = 0.f;
  for (int i = threadIdx.x; i < packs; i += blockDim.x) {
    Pack p = ((const Pack*)row)[i];
    float top = m;
    float x[VECTOR];
    for (int j = 0; j < VECTOR; j++) top = fmaxf(top, x[j] = value(p.v[j]));
    s *= EXP(m - top);
    for (int j = 0; j < VECTOR; j++) s += EXP(x[j] - top);
    m = top;
  }
  if (last < vocabulary) {
    float x = value(row[last]), top = fmaxf(m, x);
    s = s * EXP(m - top) + EXP(x - top);
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
  if (threadIdx.x == 0) loss[blockIdx.x] = target < 0 ? 0.f : logf(s) + m - value(row[target]);
  __syncthreads();
  for (int i = threadIdx.x; i < packs; i += blockDim.x) {
    Pack p = ((const Pack*)row)[i];
    for (int j = 0; j < VECTOR; j++) {
      float x = load(p.v[j]), slope = 1.f;
      if (CAPPED) x = softcapped(x, cap, slope);
      float g = EXP(x - m) * factor;
      if (i * VECTOR + j == target) g -= scale;
      p.v[j] = store(g * slope);
    }
    ((Pack*)row)[i] = p;
  }
  if (last < vocabulary) {
    float x = load(row[last]), slope = 1.f;
    if (CAPPED) x = softcapped(x, cap, slope);
    float g = EXP(x - m) * factor;
    if (last == target) g -= scale;
    row[last] = store(g * slope);
  }
}
extern "C" __global__ void cross_entropy(T* logits, const int* targets, float* loss, int vocabulary,
                                         const float* scales) {
  cross_entropy_of<false>(logits, targets, loss, vocabulary, scales, 0.f);
}
extern "C" __global__ void cross_entropy_capped(T* logits, const int* targets, float* loss, int vocabulary,
                                                const float* scales, float cap) {
  cross_entropy_of<true>(logits, targets, loss, vocabulary, scales, cap);
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
