// What a decoder layer does beside products and attention. A block or a grid stride a row;
// `ld*` are row strides in elements, so that a buffer may carry LoRA columns behind its own.

// A norm needs its row before the sum over the block and again behind it. Where a thread has one pack of the
// row (`once`), all that it reads is loaded before the sum and stays in registers: it waits for memory once.
// What is fused is written out, since compilers choose otherwise in otherwise equal code.

// sum + |p|^2
__device__ __forceinline__ float add_squares(float sum, const RPack& p) {
  for (int j = 0; j < VECTOR; j++) sum = __fmaf_rn(load(p.v[j]), load(p.v[j]), sum);
  return sum;
}

// rsqrt(mean(x^2) + eps) of the block's row from the sums of its threads, kept in `rstd` for the backward pass.
__device__ __forceinline__ float root_of(float sum, float* rstd, int width, float eps) {
  float r = rsqrtf(block_sum(sum) / width + eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = r;
  return r;
}

// y = x * rsqrt(mean(x^2) + eps) * w
extern "C" __global__ void rms_norm(const R* x, int ldx, const float* w, T* y, int ldy, float* rstd,
                                    int width, float eps) {
  const RPack* row = (const RPack*)(x + (u64)blockIdx.x * ldx);
  Pack* out = (Pack*)(y + (u64)blockIdx.x * ldy);
  int packs = width / VECTOR;
  bool once = packs <= blockDim.x;
  RPack p;
  Floats weights;
  float sum = 0.f;
  for (int i = threadIdx.x; i < packs; i += blockDim.x) {
    p = row[i];
    weights = ((const Floats*)w)[i];
    sum = add_squares(sum, p);
  }
  float r = root_of(sum, rstd, width, eps);
  for (int i = threadIdx.x; i < packs; i += blockDim.x) {
    if (!once) p = row[i], weights = ((const Floats*)w)[i];
    Pack q;
    for (int j = 0; j < VECTOR; j++) q.v[j] = store(__fmul_rn(__fmul_rn(load(p.v[j]), r), weights.v[j]));
    out[i] = q;
  }
}

// y = residual + x * rsqrt(mean(x^2) + eps) * w: how the output of a block with a norm of its own joins the
// residual stream (Gemma 2). All three in rows of `width`; y null: the root alone.
extern "C" __global__ void rms_norm_add(const R* x, const float* w, const R* residual, R* y, float* rstd,
                                        int width, float eps) {
  u64 at = (u64)blockIdx.x * width;
  const RPack *row = (const RPack*)(x + at), *before = (const RPack*)(residual + at);
  RPack* out = (RPack*)(y + at);
  int packs = width / VECTOR;
  bool once = packs <= blockDim.x;
  RPack p, q;
  Floats weights;
  float sum = 0.f;
  for (int i = threadIdx.x; i < packs; i += blockDim.x) {
    p = row[i];
    if (y && once) q = before[i], weights = ((const Floats*)w)[i];
    sum = add_squares(sum, p);
  }
  float r = root_of(sum, rstd, width, eps);
  if (!y) return;
  for (int i = threadIdx.x; i < packs; i += blockDim.x) {
    if (!once) p = row[i], q = before[i], weights = ((const Floats*)w)[i];
    for (int j = 0; j < VECTOR; j++)
      put(q.v[j], __fmaf_rn(__fmul_rn(load(p.v[j]), r), weights.v[j], load(q.v[j])));
    out[i] = q;
  }
}

// dx (+)= r * (g - x r * mean(g * x r)) with g = w * dy; overwritten unless `add`.
extern "C" __global__ void rms_norm_backward(const R* x, int ldx, const float* w, const float* rstd,
                                             const T* dy, int lddy, T* dx, int lddx, int width, int add) {
  const RPack* row = (const RPack*)(x + (u64)blockIdx.x * ldx);
  const Pack* grad = (const Pack*)(dy + (u64)blockIdx.x * lddy);
  Pack* out = (Pack*)(dx + (u64)blockIdx.x * lddx);
  int packs = width / VECTOR;
  bool once = packs <= blockDim.x;
  RPack p;
  Pack g, d;
  Floats weights;
  float r = rstd[blockIdx.x], dot = 0.f;
  for (int i = threadIdx.x; i < packs; i += blockDim.x) {
    p = row[i];
    g = grad[i];
    weights = ((const Floats*)w)[i];
    if (add && once) d = out[i];
    for (int j = 0; j < VECTOR; j++)
      dot = __fmaf_rn(__fmul_rn(__fmul_rn(load(g.v[j]), weights.v[j]), load(p.v[j])), r, dot);
  }
  dot = block_sum(dot) / width;
  for (int i = threadIdx.x; i < packs; i += blockDim.x) {
    if (!once) {
      p = row[i], g = grad[i], weights = ((const Floats*)w)[i];
      if (add) d = out[i];
    }
    for (int j = 0; j < VECTOR; j++) {
      float own = __fmaf_rn(load(g.v[j]), weights.v[j], -__fmul_rn(__fmul_rn(load(p.v[j]), r), dot));
      d.v[j] = store(add ? __fmaf_rn(own, r, load(d.v[j])) : __fmul_rn(r, own));
    }
    out[i] = d;
  }
}

// Rotates `heads` heads of width d side by side, in place: (a, b) -> (a c - b s, b c + a s) for the
// pairs (j, j + d/2). sign -1 is the inverse, which is the gradient. Tables are [position, d/2].
// 16 bytes of each half a thread.
extern "C" __global__ void rope(T* x, int ld, int heads, int d, const int* positions,
                                const float* cosines, const float* sines, float sign, int rows) {
  int half = d / 2, packs = half / VECTOR;
  u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (u32)rows * heads * packs) return;
  int j = i % packs * VECTOR, head = i / packs % heads;
  u32 row = i / packs / heads;
  u64 at = (u64)positions[row] * half + j;
  T* p = x + (u64)row * ld + head * d + j;
  Pack a = *(Pack*)p, b = *(Pack*)(p + half);
  Floats cosine = *(const Floats*)(cosines + at), sine = *(const Floats*)(sines + at);
#pragma unroll
  for (int e = 0; e < VECTOR; e++) {
    float c = cosine.v[e], s = sign * sine.v[e], u = load(a.v[e]), w = load(b.v[e]);
    a.v[e] = store(u * c - w * s);
    b.v[e] = store(w * c + u * s);
  }
  *(Pack*)p = a;
  *(Pack*)(p + half) = b;
}

// y = silu(gate) * up, with gate and up side by side in `gate_up`.
extern "C" __global__ void swiglu(const T* gate_up, int ldg, T* y, int ldy, int width, int rows) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  int packs = width / VECTOR;
  if (i >= (u64)rows * packs) return;
  u64 row = i / packs, column = i % packs * VECTOR;
  Pack g = *(const Pack*)(gate_up + row * ldg + column);
  Pack u = *(const Pack*)(gate_up + row * ldg + width + column), q;
  for (int j = 0; j < VECTOR; j++) {
    float a = load(g.v[j]);
    q.v[j] = store(a / (1.f + EXP(-a)) * load(u.v[j]));
  }
  *(Pack*)(y + row * ldy + column) = q;
}

// dgate = dy up s (1 + gate (1 - s)), dup = dy gate s, with s = sigmoid(gate).
extern "C" __global__ void swiglu_backward(const T* gate_up, int ldg, const T* dy, int lddy, T* dgate_up,
                                           int lddg, int width, int rows) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  int packs = width / VECTOR;
  if (i >= (u64)rows * packs) return;
  u64 row = i / packs, column = i % packs * VECTOR;
  Pack g = *(const Pack*)(gate_up + row * ldg + column);
  Pack u = *(const Pack*)(gate_up + row * ldg + width + column);
  Pack d = *(const Pack*)(dy + row * lddy + column), dg, du;
  for (int j = 0; j < VECTOR; j++) {
    float a = load(g.v[j]), s = 1.f / (1.f + EXP(-a)), e = load(d.v[j]);
    dg.v[j] = store(e * load(u.v[j]) * s * (1.f + a * (1.f - s)));
    du.v[j] = store(e * a * s);
  }
  *(Pack*)(dgate_up + row * lddg + column) = dg;
  *(Pack*)(dgate_up + row * lddg + width + column) = du;
}

// y = gelu(gate) * up with gelu(x) = x/2 (1 + t), t = tanh(sqrt(2/pi) (x + 0.044715 x^3)) (Hendrycks and
// Gimpel, 2016), laid out as for swiglu.
#define GELU_ROOT 0.7978845608f
#define GELU_CUBE 0.044715f
extern "C" __global__ void geglu(const T* gate_up, int ldg, T* y, int ldy, int width, int rows) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  int packs = width / VECTOR;
  if (i >= (u64)rows * packs) return;
  u64 row = i / packs, column = i % packs * VECTOR;
  Pack g = *(const Pack*)(gate_up + row * ldg + column);
  Pack u = *(const Pack*)(gate_up + row * ldg + width + column), q;
  for (int j = 0; j < VECTOR; j++) {
    float a = load(g.v[j]), t = TANH(GELU_ROOT * (a + GELU_CUBE * a * a * a));
    q.v[j] = store(0.5f * a * (1.f + t) * load(u.v[j]));
  }
  *(Pack*)(y + row * ldy + column) = q;
}

// dgate = dy up/2 (1 + t + gate (1 - t^2) sqrt(2/pi) (1 + 3 * 0.044715 gate^2)), dup = dy gate/2 (1 + t).
extern "C" __global__ void geglu_backward(const T* gate_up, int ldg, const T* dy, int lddy, T* dgate_up,
                                          int lddg, int width, int rows) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  int packs = width / VECTOR;
  if (i >= (u64)rows * packs) return;
  u64 row = i / packs, column = i % packs * VECTOR;
  Pack g = *(const Pack*)(gate_up + row * ldg + column);
  Pack u = *(const Pack*)(gate_up + row * ldg + width + column);
  Pack d = *(const Pack*)(dy + row * lddy + column), dg, du;
  for (int j = 0; j < VECTOR; j++) {
    float a = load(g.v[j]), t = TANH(GELU_ROOT * (a + GELU_CUBE * a * a * a)), e = 0.5f * load(d.v[j]);
    float slope = GELU_ROOT * (1.f + 3.f * GELU_CUBE * a * a);
    dg.v[j] = store(e * load(u.v[j]) * (1.f + t + a * (1.f - t * t) * slope));
    du.v[j] = store(e * a * (1.f + t));
  }
  *(Pack*)(dgate_up + row * lddg + column) = dg;
  *(Pack*)(dgate_up + row * lddg + width + column) = du;
}

// out[i] = factor * table[index[i]]: the embeddings of tokens.
extern "C" __global__ void embed_rows(const T* table, const int* index, R* out, float factor, int width) {
  const Pack* from = (const Pack*)(table + (u64)index[blockIdx.x] * width);
  RPack* to = (RPack*)(out + (u64)blockIdx.x * width);
  for (int i = threadIdx.x; i < width / VECTOR; i += blockDim.x) {
    Pack p = from[i];
    RPack q;
    for (int j = 0; j < VECTOR; j++) put(q.v[j], factor * load(p.v[j]));
    to[i] = q;
  }
}

// out[i] = in[index[i]]: the rows of the residual stream that reach the head. Zeros for index -1.
extern "C" __global__ void gather_rows(const R* in, const int* index, R* out, int width) {
  int place = index[blockIdx.x];
  const RPack* from = (const RPack*)(in + (u64)max(place, 0) * width);
  RPack* to = (RPack*)(out + (u64)blockIdx.x * width);
  for (int i = threadIdx.x; i < width / VECTOR; i += blockDim.x) to[i] = place < 0 ? RPack{} : from[i];
}

// out[index[i]] = rows[i], indices distinct; nothing for index -1.
extern "C" __global__ void scatter_rows(const T* rows, int ldr, const int* index, T* out, int ldo,
                                        int width) {
  if (index[blockIdx.x] < 0) return;
  const Pack* from = (const Pack*)(rows + (u64)blockIdx.x * ldr);
  Pack* to = (Pack*)(out + (u64)index[blockIdx.x] * ldo);
  for (int i = threadIdx.x; i < width / VECTOR; i += blockDim.x) to[i] = from[i];
}

// out[row, 0..width] = in[row, 0..width] with different row strides.
extern "C" __global__ void copy_columns(const T* in, int ldi, T* out, int ldo, int width, int rows) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  int packs = width / VECTOR;
  if (i >= (u64)rows * packs) return;
  u64 row = i / packs, column = i % packs * VECTOR;
  *(Pack*)(out + row * ldo + column) = *(const Pack*)(in + row * ldi + column);
}
