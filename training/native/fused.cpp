// Fused steps of the qwen3_5 model for training on a CPU: each does in one pass over the memory what torch does in
// many. fused.py has the same functions in torch, which define them. One thread; rows are contiguous.

#include <cmath>
#include <cstdint>
#include <cstring>

typedef float V __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t U __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t H __attribute__((vector_size(32), aligned(2), may_alias));

static const int LANES = 16;

static inline V load(const float *x) { return *(const V *)x; }
static inline void store(float *x, V v) { *(V *)x = v; }
static inline V splat(float x) { return x - V{}; }

// bf16 is the upper half of a float
static inline V load(const uint16_t *x) { return (V)(__builtin_convertvector(*(const H *)x, U) << 16); }

static inline void store(uint16_t *x, V v) {
    U bits = (U)v;
    *(H *)x = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, H);
}

static inline float sum(V v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

static inline V exp_of(V x) {
    V y;
    // the compiler's vector exponential
    for (int i = 0; i < LANES; i++) y[i] = expf(x[i]);
    return y;
}

static inline V sigmoid(V x) { return 1.0f / (1.0f + exp_of(-x)); }

// d silu(x) / dx, of sigmoid(x)
static inline V silu_slope(V x, V s) { return s * (1.0f + x * (1.0f - s)); }

extern "C" {

// x [batch, tokens, channels] bf16, w [4, channels]: y = silu(causal convolution over tokens)
void conv_silu(int batch, int tokens, int channels, const uint16_t *x, const float *w, float *y) {
    for (int b = 0; b < batch; b++)
        for (int c = 0; c < channels; c += LANES) {
            const uint16_t *in = x + (size_t)b * tokens * channels + c;
            float *out = y + (size_t)b * tokens * channels + c;
            V w0 = load(w + c), w1 = load(w + channels + c);
            V w2 = load(w + 2 * channels + c), w3 = load(w + 3 * channels + c);
            V x0{}, x1{}, x2{};
            for (int t = 0; t < tokens; t++) {
                V x3 = load(in + (size_t)t * channels), s = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3;
                store(out + (size_t)t * channels, s * sigmoid(s));
                x0 = x1, x1 = x2, x2 = x3;
            }
        }
}

void conv_silu_backward(int batch, int tokens, int channels, const uint16_t *x, const float *w, const float *dy,
                        uint16_t *dx, float *dw) {
    memset(dw, 0, sizeof(float) * 4 * channels);
    for (int b = 0; b < batch; b++)
        for (int c = 0; c < channels; c += LANES) {
            size_t at = (size_t)b * tokens * channels + c;
            V w0 = load(w + c), w1 = load(w + channels + c);
            V w2 = load(w + 2 * channels + c), w3 = load(w + 3 * channels + c);
            V g0{}, g1{}, g2{}, g3{}, d1{}, d2{}, d3{};
            auto input = [&](int t) { return t < 0 ? V{} : load(x + at + (size_t)t * channels); };
            V x3 = input(tokens - 1), x2 = input(tokens - 2), x1 = input(tokens - 3);
            for (int t = tokens - 1; t >= 0; t--) {
                V x0 = input(t - 3), s = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3;
                V d0 = load(dy + at + (size_t)t * channels) * silu_slope(s, sigmoid(s));
                g0 += d0 * x0, g1 += d0 * x1, g2 += d0 * x2, g3 += d0 * x3;
                store(dx + at + (size_t)t * channels, w3 * d0 + w2 * d1 + w1 * d2 + w0 * d3);
                x3 = x2, x2 = x1, x1 = x0, d3 = d2, d2 = d1, d1 = d0;
            }
            store(dw + c, load(dw + c) + g0), store(dw + channels + c, load(dw + channels + c) + g1);
            store(dw + 2 * channels + c, load(dw + 2 * channels + c) + g2);
            store(dw + 3 * channels + c, load(dw + 3 * channels + c) + g3);
        }
}

// out = x + delta (delta bf16, or none), y = out / rms(out) * (1 + w) in bf16; rms holds the factor of each row
void add_norm(int rows, int size, const float *x, const uint16_t *delta, const float *w, float eps, float *out,
              uint16_t *y, float *rms) {
    for (int n = 0; n < rows; n++, x += size, out += size, y += size) {
        V square{};
        for (int c = 0; c < size; c += LANES) {
            V v = load(x + c);
            if (delta) v += load(delta + (size_t)n * size + c);
            store(out + c, v);
            square += v * v;
        }
        float r = rms[n] = 1 / sqrtf(sum(square) / size + eps);
        for (int c = 0; c < size; c += LANES) store(y + c, load(out + c) * r * (1.0f + load(w + c)));
    }
}

// dx (also the gradient of delta, which is written in bf16 where it is wanted) from those of out and y
void add_norm_backward(int rows, int size, const float *out, const float *w, const float *rms, const float *dout,
                       const uint16_t *dy, float *dx, uint16_t *ddelta, float *dw) {
    memset(dw, 0, sizeof(float) * size);
    for (int n = 0; n < rows; n++, out += size, dy += size, dx += size) {
        float r = rms[n];
        V dot{};
        for (int c = 0; c < size; c += LANES) {
            V d = load(dy + c), o = load(out + c);
            store(dw + c, load(dw + c) + d * o * r);
            dot += d * (1.0f + load(w + c)) * o;
        }
        float slope = sum(dot) * r * r * r / size;
        for (int c = 0; c < size; c += LANES) {
            V d = load(dy + c) * (1.0f + load(w + c)) * r - load(out + c) * slope;
            if (dout) d += load(dout + (size_t)n * size + c);
            store(dx + c, d);
            if (ddelta) store(ddelta + (size_t)n * size + c, d);
        }
    }
}

// y = x / rms(x) * w * silu(z), rows of one head
void gated_norm(int rows, int size, const float *x, const uint16_t *z, const float *w, float eps, uint16_t *y) {
    for (int n = 0; n < rows; n++, x += size, z += size, y += size) {
        V square{};
        for (int c = 0; c < size; c += LANES) square += load(x + c) * load(x + c);
        float r = 1 / sqrtf(sum(square) / size + eps);
        for (int c = 0; c < size; c += LANES) {
            V gate = load(z + c);
            store(y + c, load(x + c) * r * load(w + c) * gate * sigmoid(gate));
        }
    }
}

void gated_norm_backward(int rows, int size, const float *x, const uint16_t *z, const float *w, float eps,
                         const uint16_t *dy, float *dx, uint16_t *dz, float *dw) {
    memset(dw, 0, sizeof(float) * size);
    for (int n = 0; n < rows; n++, x += size, z += size, dy += size, dx += size, dz += size) {
        V square{}, dot{};
        for (int c = 0; c < size; c += LANES) square += load(x + c) * load(x + c);
        float r = 1 / sqrtf(sum(square) / size + eps);
        for (int c = 0; c < size; c += LANES) {
            V gate = load(z + c), s = sigmoid(gate), d = load(dy + c), normed = load(x + c) * r;
            store(dz + c, d * normed * load(w + c) * silu_slope(gate, s));
            d *= gate * s;
            store(dw + c, load(dw + c) + d * normed);
            d *= load(w + c);
            store(dx + c, d);
            dot += d * load(x + c);
        }
        float slope = sum(dot) * r * r * r / size;
        for (int c = 0; c < size; c += LANES) store(dx + c, load(dx + c) * r - load(x + c) * slope);
    }
}

// y = silu(gate) * up
void silu_mul(long size, const uint16_t *gate, const uint16_t *up, uint16_t *y) {
    for (long i = 0; i < size; i += LANES) {
        V g = load(gate + i);
        store(y + i, g * sigmoid(g) * load(up + i));
    }
}

void silu_mul_backward(long size, const uint16_t *gate, const uint16_t *up, const uint16_t *dy, uint16_t *dgate,
                       uint16_t *dup) {
    for (long i = 0; i < size; i += LANES) {
        V g = load(gate + i), s = sigmoid(g), d = load(dy + i);
        store(dup + i, d * g * s);
        store(dgate + i, d * load(up + i) * silu_slope(g, s));
    }
}

// logits [rows, vocabulary] bf16 become their gradient, weight * (softmax - onehot); returned is the sum of
// weight * -log p
double cross_entropy(int rows, int vocabulary, uint16_t *logits, const long *targets, const float *weights) {
    double total = 0;
    for (int n = 0; n < rows; n++, logits += vocabulary) {
        float target;
        uint32_t bits = (uint32_t)logits[targets[n]] << 16;
        memcpy(&target, &bits, 4);
        V largest = load(logits), exponentials{};
        for (int c = 0; c < vocabulary; c += LANES) {
            V x = load(logits + c);
            largest = x > largest ? x : largest;
        }
        float top = largest[0];
        for (int i = 1; i < LANES; i++) top = fmaxf(top, largest[i]);
        for (int c = 0; c < vocabulary; c += LANES) exponentials += exp_of(load(logits + c) - top);
        float all = sum(exponentials), scale = weights[n] / all;
        for (int c = 0; c < vocabulary; c += LANES) store(logits + c, exp_of(load(logits + c) - top) * scale);
        total += weights[n] * (logf(all) + top - target);
        float p = weights[n] * (expf(target - top) / all - 1);
        memcpy(&bits, &p, 4);
        logits[targets[n]] = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    }
    return total;
}
}
