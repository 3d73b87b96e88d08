// The adapter between its flat f32 buffer and the operands of the products, and AdamW over it.

// One factor: `values` counts elements in the flat buffer, `operand` elements in the operands.
struct Factor {
  u64 values, operand;
  int rows, columns;  // of the factor
  int stride;         // row stride in the operand
  int unused;
};

// operand[o + i stride + j] = values[v + i columns + j], for all factors (one a grid row).
template <typename E>
__device__ __forceinline__ void spread(const float* values, E* operands, const Factor* factors) {
  Factor f = factors[blockIdx.y];
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < (u64)f.rows * f.columns;
       i += (u64)gridDim.x * blockDim.x)
    put(operands[f.operand + i / f.columns * f.stride + i % f.columns], values[f.values + i]);
}
extern "C" __global__ void to_operands(const float* values, T* operands, const Factor* factors) {
  spread(values, operands, factors);
}

// Gradients lie in f32 in the layout of the operands: there, and back.
extern "C" __global__ void to_gradients(const float* values, float* gradients, const Factor* factors) {
  spread(values, gradients, factors);
}
extern "C" __global__ void from_operands(const float* operands, float* values, const Factor* factors) {
  Factor f = factors[blockIdx.y];
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < (u64)f.rows * f.columns;
       i += (u64)gridDim.x * blockDim.x)
    values[f.values + i] = operands[f.operand + i / f.columns * f.stride + i % f.columns];
}

// Squares of 4,096 elements a block, then their sum: norm[0] = the norm of x / scale, not finite where an
// element is not, and norm[1] = the factor on x that undoes the scale and clips (clip_grad_norm_:
// min(1, limit / (norm + 1e-6)); limit 0 is none). One order, no atomics.
extern "C" __global__ void square_partials(const float* x, u64 count, double* partials) {
  __shared__ double sums[256];
  double sum = 0.0;
  u64 start = (u64)blockIdx.x * 4096;
  for (int i = threadIdx.x; i < 4096 && start + i < count; i += 256)
    sum += (double)x[start + i] * x[start + i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int half = 128; half > 0; half >>= 1) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) partials[blockIdx.x] = sums[0];
}
extern "C" __global__ void clip_factor(const double* partials, int count, float limit, float scale,
                                       float* norm) {
  __shared__ double sums[256];
  double sum = 0.0;
  for (int i = threadIdx.x; i < count; i += 256) sum += partials[i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < 256; i++) sum += sums[i];
    double root = sqrt(sum) / scale;
    norm[0] = (float)root;
    norm[1] = (float)((limit > 0.f ? fmin(1.0, (double)limit / (root + 1e-6)) : 1.0) / scale);
  }
}

struct Scalars {
  float beta1, beta2, one_minus_beta1, one_minus_beta2, step, root, eps, decay;
  float rate, weight_decay;
  int updates, unused;
};

// torch.optim.AdamW, in its order of operations.
extern "C" __global__ void adamw(float* p, const float* g, float* m, float* v, u64 count, Scalars s,
                                 const float* norm) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  float d = g[i] * norm[1], a = m[i], b = v[i], x = p[i] * s.decay;
  a = a + (d - a) * s.one_minus_beta1;
  b = b * s.beta2 + s.one_minus_beta2 * d * d;
  p[i] = x - s.step * (a / (sqrtf(b) / s.root + s.eps));
  m[i] = a, v[i] = b;
}

// Code of the nearest value of an ascending map, by the search of bitsandbytes' kernel.
__device__ __forceinline__ int encode(const float* map, float x) {
  int pivot = 127, low = 0, high = 255;
  for (int step = 64; step > 0; step >>= 1) {
    if (x > map[pivot]) low = pivot, pivot += step;
    else high = pivot, pivot -= step;
  }
  if (x > map[pivot]) return x > (map[high] + map[pivot]) * 0.5f ? high : pivot;
  return x < (map[low] + map[pivot]) * 0.5f ? low : pivot;
}

// A run of elements that share a scale: [start, start + length).
struct Run { u64 start; u32 length; u32 unused; };

// bitsandbytes' update of a parameter by its new moments, operation by operation: its CUDA code is compiled
// with --use_fast_math, so that powers, roots and quotients are the hardware's approximations, which leave the
// correction of the second moment off by up to 1e-4.
__device__ __forceinline__ float root_fast(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float moved(float p, float m, float v, const Scalars& s) {
  float correction1 = 1.f - __powf(s.beta1, (float)s.updates);
  float correction2 = root_fast(1.f - __powf(s.beta2, (float)s.updates));
  float step = __fdividef(-s.rate * correction2, correction1);
  p += step * __fdividef(m, root_fast(v) + correction2 * s.eps);
  return s.weight_decay > 0.f ? p * (1.f - s.rate * s.weight_decay) : p;
}

// bitsandbytes' AdamW8bit over runs of at most 256 elements, one a block; the parameters move by the
// moments before these are rounded to their codes. Maps: 256 signed values, then 256 unsigned.
extern "C" __global__ void adamw_8bit(float* p, const float* g, u8* m8, u8* v8, float* m_scale,
                                      float* v_scale, const Run* runs, const float* maps, Scalars s,
                                      const float* norm) {
  __shared__ float map[512];
  __shared__ float m_top[8], v_top[8];
  map[threadIdx.x] = maps[threadIdx.x];
  map[threadIdx.x + 256] = maps[threadIdx.x + 256];
  __syncthreads();
  Run run = runs[blockIdx.x];
  bool mine = threadIdx.x < run.length;
  u64 i = run.start + threadIdx.x;
  float m = 0.f, v = 0.f;
  if (mine) {
    float d = g[i] * norm[1];
    v = map[256 + v8[i]] * v_scale[blockIdx.x] * s.beta2 + (1.f - s.beta2) * d * d;
    m = map[m8[i]] * m_scale[blockIdx.x] * s.beta1 + (1.f - s.beta1) * d;
    p[i] = moved(p[i], m, v, s);
  }
  float a = fabsf(m), b = fabsf(v);
  for (int k = 16; k > 0; k >>= 1) {
    a = fmaxf(a, __shfl_xor_sync(~0u, a, k));
    b = fmaxf(b, __shfl_xor_sync(~0u, b, k));
  }
  if ((threadIdx.x & 31) == 0) m_top[threadIdx.x >> 5] = a, v_top[threadIdx.x >> 5] = b;
  __syncthreads();
  a = m_top[0], b = v_top[0];
  for (int k = 1; k < 8; k++) a = fmaxf(a, m_top[k]), b = fmaxf(b, v_top[k]);
  if (threadIdx.x == 0) m_scale[blockIdx.x] = a, v_scale[blockIdx.x] = b;
  if (!mine) return;
  int code = encode(map, __fdividef(m, a > 0.f ? a : 1.f));
  // Rounding must not lose the sign of the moment.
  if (signbit(map[code]) != signbit(m)) code += m > 0.f ? 1 : -1;
  m8[i] = (u8)code;
  v8[i] = (u8)encode(map + 256, __fdividef(v, b > 0.f ? b : 1.f));
}

// bitsandbytes' 32-bit update, which its 8-bit optimiser falls back to for small tensors; states lie
// one run after another.
extern "C" __global__ void adamw_bitsandbytes(float* p, const float* g, float* m, float* v,
                                              const Run* runs, Scalars s, const float* norm) {
  Run run = runs[blockIdx.x];
  if (threadIdx.x >= run.length) return;
  u64 i = run.start + threadIdx.x, k = (u64)blockIdx.x * 256 + threadIdx.x;
  float d = g[i] * norm[1];
  m[k] = m[k] * s.beta1 + (1.f - s.beta1) * d;
  v[k] = v[k] * s.beta2 + (1.f - s.beta2) * (d * d);
  p[i] = moved(p[i], m[k], v[k], s);
}
