// bitsandbytes NF4 (Dettmers et al., 2023): blocks of 64 along the row-major weight, two codes a
// byte with the first in the high nibble; w = value[code] * absmax[block]. With double quantisation
// absmax[b] = map[byte[b]] * nested[b / 256] + offset, each operation rounded.
__device__ const float NF4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
    0.7229568362236023f, 1.0f};

// Decodes rows of `cols` elements (a multiple of 8) to `out` with row stride `ld`. A warp reads 128
// bytes and writes whole lines; a thread has four such loads under way. `scales` is map and nested,
// or null where absmax is f32. ROUND: the weight's own type, to which bitsandbytes rounds before it converts
// to the type of the product (1 bf16, 2 f16; 0 where it holds all values of T, or is T).
template <int ROUND>
__device__ __forceinline__ void decode(const u8* codes, const u8* absmax, const float* scales, float offset,
                                       T* out, int cols, int ld, u64 count) {
  auto rounded = [](float x) { return store(ROUND == 1 ? round_bf16(x) : ROUND == 2 ? round_f16(x) : x); };
  const float *map = scales, *nested = scales + 256;
  // A column of the table for each lane: lookups of a warp never meet in a bank.
  __shared__ float values[16 * 32];
  for (int i = threadIdx.x; i < 16 * 32; i += blockDim.x) values[i] = NF4[i / 32];
  __syncthreads();
  const float* value = values + (threadIdx.x & 31);
  u32 first = (blockIdx.x * 4 * blockDim.x + threadIdx.x) * 8, step = blockDim.x * 8;
  u32 packed[4];
  float scale[4];
#pragma unroll
  for (int k = 0; k < 4; k++) {
    u32 at = first + k * step, block = at / 64;
    if (at < count) {
      packed[k] = *(const u32*)(codes + at / 2);
      scale[k] = scales ? __fadd_rn(__fmul_rn(map[absmax[block]], nested[block / 256]), offset)
                        : ((const float*)absmax)[block];
    }
  }
#pragma unroll
  for (int k = 0; k < 4; k++) {
    u32 at = first + k * step;
    if (at >= count) return;
    __align__(16) T decoded[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u32 byte = (packed[k] >> (8 * i)) & 255u;
      decoded[2 * i] = rounded(value[(byte >> 4) * 32] * scale[k]);
      decoded[2 * i + 1] = rounded(value[(byte & 15) * 32] * scale[k]);
    }
    u32 row = at / (u32)cols, column = at - row * (u32)cols;
    Pack* to = (Pack*)(out + (u64)row * ld + column);
#pragma unroll
    for (int i = 0; i < 8 / VECTOR; i++) to[i] = ((Pack*)decoded)[i];
  }
}

#define NF4_DECODE(name, round)                                                                          \
  extern "C" __global__ void name(const u8* codes, const u8* absmax, const float* scales, float offset,  \
                                  T* out, int cols, int ld, u64 count) {                                 \
    decode<round>(codes, absmax, scales, offset, out, cols, ld, count);                                  \
  }
NF4_DECODE(nf4_decode, 0)
NF4_DECODE(nf4_decode_bf16, 1)
NF4_DECODE(nf4_decode_f16, 2)

// Random codes and scales for measurements: a hash of the index.
__device__ __forceinline__ u64 mix(u64 x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
extern "C" __global__ void random_bytes(u8* out, u64 seed, u64 count) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = (u8)(mix(seed ^ i) >> 24);
}
// Roughly normal, standard deviation `scale`.
extern "C" __global__ void random_normal(T* out, u64 seed, float scale, u64 count) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  u64 h = mix(seed ^ i);
  float sum = 0.f;
  for (int j = 0; j < 4; j++) sum += (float)((h >> (16 * j)) & 65535u) / 65536.f - 0.5f;
  out[i] = store(sum * 1.7320508f * scale);
}
