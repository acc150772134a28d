// The edges of a network, pools, softmax and what only moves codes. A thread makes one code, or 4 of a pixel.

struct EdgeArgs {
  const void* x;
  const float* quant;
  void* y;
  int pixels, channels, height, width, pitch;  // pitch: of the codes
  int is_signed;
};

// Place of a channel of a pixel in [image][channel][h][w]
__device__ __forceinline__ int planar(const EdgeArgs& a, int pixel, int channel) {
  int plane = a.height * a.width, image = pixel / plane;
  return (image * a.channels + channel) * plane + pixel % plane;
}

// float32 [image][channel][h][w] -> codes
__device__ __forceinline__ void quantize(const EdgeArgs& a) {
  int pixel = global_index();
  if (pixel >= a.pixels) return;
  Quant q = load_quant(a.quant);
  for (int c = 0; c < a.channels; c++) {
    ((u8*)a.y)[pixel * a.pitch + c] = (u8)to_code(__fdiv_rn(((const float*)a.x)[planar(a, pixel, c)], q.scale), q);
  }
}

// codes -> float32 [image][channel][h][w]
__device__ __forceinline__ void dequantize(const EdgeArgs& a) {
  int index = global_index(), pixel = index / a.channels, c = index % a.channels;
  if (pixel >= a.pixels) return;
  ((float*)a.y)[planar(a, pixel, c)] = real_of(((const u8*)a.x)[pixel * a.pitch + c], load_quant(a.quant));
}

// codes -> the file's own, [image][channel][h][w]
__device__ __forceinline__ void own_codes(const EdgeArgs& a) {
  int index = global_index(), pixel = index / a.channels, c = index % a.channels;
  if (pixel >= a.pixels) return;
  ((u8*)a.y)[planar(a, pixel, c)] = ((const u8*)a.x)[pixel * a.pitch + c] ^ (a.is_signed ? 128 : 0);
}

// 32-bit words as they are
struct CopyArgs {
  const unsigned* x;
  unsigned* y;
  int count;
};

__device__ __forceinline__ void copy_words(const CopyArgs& a) {
  int i = global_index();
  if (i < a.count) a.y[i] = a.x[i];
}

// Pools --------------------------------------------------------------------------------------------------------------

struct PoolArgs {
  const u8* x;
  const float* quant_x;
  const float* quant;
  u8* y;
  int pixels, out_h, out_w, in_h, in_w, pitch_x, pitch_y, channels;
  int kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int count_padding, is_signed;
};

// visit(word) for what each position of a window inside the image holds, row by row
template <class Visit>
__device__ __forceinline__ int each_tap(const PoolArgs& a, int pixel, int c, Visit& visit) {
  Pixel p = pixel_of(pixel, a.out_h, a.out_w);
  int count = 0;
  for (int i = 0; i < a.kernel_h; i++) {
    int h = p.h * a.stride_h - a.pad_top + i * a.dilation_h;
    for (int j = 0; j < a.kernel_w; j++) {
      int w = p.w * a.stride_w - a.pad_left + j * a.dilation_w;
      if ((unsigned)h >= (unsigned)a.in_h || (unsigned)w >= (unsigned)a.in_w) continue;
      visit(*(const unsigned*)(a.x + ((p.n * a.in_h + h) * a.in_w + w) * a.pitch_x + c));
      count++;
    }
  }
  return count;
}

struct Largest {
  int best[4];
  __device__ __forceinline__ void operator()(unsigned word) {
#pragma unroll
    for (int c = 0; c < 4; c++) best[c] = max(best[c], byte_of(word, c));
  }
};

__device__ __forceinline__ void max_pool(const PoolArgs& a) {
  int words = (a.channels + 3) / 4, index = global_index(), word = index % words, pixel = index / words;
  if (pixel >= a.pixels) return;
  Quant q = load_quant(a.quant);
  int low = __float2int_rn(q.low), high = __float2int_rn(q.high);
  Largest found = {{low, low, low, low}};
  each_tap(a, pixel, word * 4, found);
  *(unsigned*)(a.y + pixel * a.pitch_y + word * 4) = word_of(
      min(found.best[0], high), min(found.best[1], high), min(found.best[2], high), min(found.best[3], high));
}

struct Total {
  Quant q;
  float sum[4];
  __device__ __forceinline__ void operator()(unsigned word) {
#pragma unroll
    for (int c = 0; c < 4; c++) sum[c] = __fadd_rn(sum[c], real_of(byte_of(word, c), q));
  }
};

__device__ __forceinline__ void average_pool(const PoolArgs& a) {
  int words = (a.channels + 3) / 4, index = global_index(), word = index % words, pixel = index / words;
  if (pixel >= a.pixels) return;
  Total total = {load_quant(a.quant_x), {0.0f, 0.0f, 0.0f, 0.0f}};
  int count = each_tap(a, pixel, word * 4, total);
  float area = __int2float_rn(a.count_padding ? a.kernel_h * a.kernel_w : count);
  Quant q = load_quant(a.quant);
  float shift = shift_of(a.is_signed), zero = __fsub_rn(q.zero, shift);
  int codes[4];
#pragma unroll
  for (int c = 0; c < 4; c++) {
    codes[c] = rounded(__fadd_rn(__fdiv_rn(__fdiv_rn(total.sum[c], area), q.scale), zero), shift, q);
  }
  *(unsigned*)(a.y + pixel * a.pitch_y + word * 4) = word_of(codes[0], codes[1], codes[2], codes[3]);
}

// The mean of all pixels: blocks of 32 words of channels by 8 parts of an image
__device__ __forceinline__ void mean(const PoolArgs& a) {
  __shared__ int sums[8][32][4];
  int lane = (int)threadIdx.x % 32, part = (int)threadIdx.x / 32, c = ((int)blockIdx.x * 32 + lane) * 4;
  int area = a.in_h * a.in_w, image = (int)blockIdx.y, sum[4] = {0, 0, 0, 0};
  if (c < a.channels) {
    for (int i = part; i < area; i += 8) {
      unsigned word = *(const unsigned*)(a.x + (image * area + i) * a.pitch_x + c);
#pragma unroll
      for (int k = 0; k < 4; k++) sum[k] += byte_of(word, k);
    }
  }
#pragma unroll
  for (int k = 0; k < 4; k++) sums[part][lane][k] = sum[k];
  __syncthreads();
  if (part > 0 || c >= a.channels) return;
  Quant from = load_quant(a.quant_x), q = load_quant(a.quant);
  float scale = __fdiv_rn(from.scale, __fmul_rn(q.scale, __int2float_rn(area)));
  int codes[4];
#pragma unroll
  for (int k = 0; k < 4; k++) {
    int acc = -area * __float2int_rn(from.zero);
    for (int other = 0; other < 8; other++) acc += sums[other][lane][k];
    codes[k] = to_code(__fmul_rn(__int2float_rn(acc), scale), q);
  }
  *(unsigned*)(a.y + image * a.pitch_y + c) = word_of(codes[0], codes[1], codes[2], codes[3]);
}

// Softmax ------------------------------------------------------------------------------------------------------------

struct SoftmaxArgs {
  const u8* x;
  const double* exponentials;  // exp(-d * scale) for d = 0 .. 255
  const float* quant;          // null: float32 [image][channel][h][w]
  void* y;
  int pixels, channels, height, width, pitch_x, pitch_y;
};

// One pixel a block of 128 threads; the sum runs in the order of channels
__device__ __forceinline__ void softmax(const SoftmaxArgs& a) {
  __shared__ int most[128];
  __shared__ double parts[128];
  __shared__ double total;
  int tid = (int)threadIdx.x, pixel = (int)blockIdx.x, best = 0;
  const u8* x = a.x + pixel * a.pitch_x;
  for (int c = tid; c < a.channels; c += 128) best = max(best, (int)x[c]);
  most[tid] = best;
  __syncthreads();
  for (int i = 0; i < 128; i++) best = max(best, most[i]);
  if (tid == 0) total = 0.0;
  for (int first = 0; first < a.channels; first += 128) {
    if (first + tid < a.channels) parts[tid] = a.exponentials[best - x[first + tid]];
    __syncthreads();
    if (tid == 0) {
      for (int i = 0; i < min(128, a.channels - first); i++) total = __dadd_rn(total, parts[i]);
    }
    __syncthreads();
  }
  EdgeArgs planes = {0, 0, 0, a.pixels, a.channels, a.height, a.width, 0, 0};
  for (int c = tid; c < a.channels; c += 128) {
    float real = __double2float_rn(__ddiv_rn(a.exponentials[best - x[c]], total));
    if (a.quant == 0) {
      ((float*)a.y)[planar(planes, pixel, c)] = real;
    } else {
      Quant q = load_quant(a.quant);
      ((u8*)a.y)[pixel * a.pitch_y + c] = (u8)to_code(__fdiv_rn(real, q.scale), q);
    }
  }
}

// Moves --------------------------------------------------------------------------------------------------------------

struct MoveArgs {
  const u8* x;
  const float* quant;
  u8* y;
  int pixels, out_h, out_w, in_h, in_w, pitch_x, pitch_y, channels, image_x;  // image_x: bytes from image to image
  int stride_h, stride_w, top, left, exact;
};

// y(h, w) = x(floor((h - top) / stride_h), floor((w - left) / stride_w)), where `exact` only if both divisions are;
// the zero point elsewhere
__device__ __forceinline__ void move(const MoveArgs& a) {
  int index = global_index(), pixel = index / a.channels, c = index % a.channels;
  if (pixel >= a.pixels) return;
  Pixel p = pixel_of(pixel, a.out_h, a.out_w);
  int h = floor_div(p.h - a.top, a.stride_h), w = floor_div(p.w - a.left, a.stride_w);
  bool inside = (unsigned)h < (unsigned)a.in_h && (unsigned)w < (unsigned)a.in_w;
  if (a.exact) inside = inside && h * a.stride_h == p.h - a.top && w * a.stride_w == p.w - a.left;
  int zero = __float2int_rn(a.quant[1]);
  a.y[pixel * a.pitch_y + c] = (u8)(inside ? a.x[p.n * a.image_x + (h * a.in_w + w) * a.pitch_x + c] : zero);
}

struct ShuffleArgs {
  const u8* x;
  u8* y;
  int count, in_plane, out_plane, pitch_x, pitch_y, image_x, image_y, per_image, rank, offset;
  int sizes[8], steps[8];
};

// Element i of the output, in the order c, h, w, is element offset + sum i_k * steps_k of the input in that order
__device__ __forceinline__ void shuffle(const ShuffleArgs& a) {
  int index = global_index();
  if (index >= a.count) return;
  int image = index / a.per_image, element = index % a.per_image, rest = element, from = a.offset;
  for (int k = a.rank - 1; k >= 0; k--) {
    from += rest % a.sizes[k] * a.steps[k];
    rest /= a.sizes[k];
  }
  int y = image * a.image_y + element % a.out_plane * a.pitch_y + element / a.out_plane;
  a.y[y] = a.x[image * a.image_x + from % a.in_plane * a.pitch_x + from / a.in_plane];
}
