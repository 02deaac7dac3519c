// What mixes tokens, forward and backward, for training on a CPU: the gated delta rule in chunks (delta_rule.py defines
// it) and causal attention. One thread; rows are contiguous.
//
// The delta rule: y [batch, tokens, (2 * key heads + value heads) * 64] holds q, k and v before normalisation; g and
// beta are [batch, tokens, value heads]. In a chunk, with c the running sum of g, e = exp(c), D_ij = exp(c_i - c_j) for
// j <= i, S the state before it: (I + A) U = beta (v - e k S) with A = beta k k^T D below the diagonal; out = e q S +
// (q k^T D) U; next S = exp(c_last) S + (exp(c_last - c) k)^T U.

#include <cmath>
#include <cstring>
#include <vector>

typedef float V __attribute__((vector_size(64), aligned(4), may_alias));

static const int LANES = 16, SIZE = 64, CHUNK = 32;
static const float EPS = 1e-6f, Q_SCALE = 0.125f;

static inline V load(const float *x) { return *(const V *)x; }
static inline void store(float *x, V v) { *(V *)x = v; }
static inline V splat(float x) { return x - V{}; }

static float dot(const float *a, const float *b, int size) {
    V total{};
    for (int c = 0; c < size; c += LANES) total += load(a + c) * load(b + c);
    float all = 0;
    for (int i = 0; i < LANES; i++) all += total[i];
    return all;
}

// C [rows, columns] = scale C + A B, with A[i, k] at A[i * row + k * column]; columns is 32 or 64
template <int COLUMNS>
static void product(int rows, int depth, const float *A, int row, int column, const float *B, float *C, float scale) {
    const int WIDE = COLUMNS / LANES, HIGH = 16 / WIDE;
    for (int i = 0; i < rows; i += HIGH) {
        V sums[HIGH][WIDE];
        for (int a = 0; a < HIGH; a++)
            for (int b = 0; b < WIDE; b++)
                sums[a][b] = scale == 0 ? V{} : scale * load(C + (i + a) * COLUMNS + b * LANES);
        for (int k = 0; k < depth; k++)
            for (int a = 0; a < HIGH; a++) {
                V x = splat(A[(i + a) * row + k * column]);
                for (int b = 0; b < WIDE; b++) sums[a][b] += x * load(B + k * COLUMNS + b * LANES);
            }
        for (int a = 0; a < HIGH; a++)
            for (int b = 0; b < WIDE; b++) store(C + (i + a) * COLUMNS + b * LANES, sums[a][b]);
    }
}

static void transpose(int rows, int columns, const float *x, float *y) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) y[j * rows + i] = x[i * columns + j];
}

typedef float Rows[CHUNK * SIZE], Square[CHUNK * CHUNK], State[SIZE * SIZE], Column[CHUNK];

struct Head {
    int heads, width, q, k, v, head;
    const float *y, *g, *beta;
};

// what one chunk of one head needs in both directions
struct Chunk {
    alignas(64) Rows q, k, v, kS, U;
    alignas(64) Square kk, qk, D;
    alignas(64) float turned[SIZE * CHUNK];
    Column c, e, f, beta, q_factor, k_factor;

    void read(const Head &h, int start) {
        float total = 0;
        for (int i = 0; i < CHUNK; i++) {
            const float *row = h.y + (size_t)(start + i) * h.width;
            q_factor[i] = Q_SCALE / sqrtf(dot(row + h.q, row + h.q, SIZE) + EPS);
            k_factor[i] = 1 / sqrtf(dot(row + h.k, row + h.k, SIZE) + EPS);
            for (int d = 0; d < SIZE; d += LANES) {
                store(q + i * SIZE + d, load(row + h.q + d) * q_factor[i]);
                store(k + i * SIZE + d, load(row + h.k + d) * k_factor[i]);
                store(v + i * SIZE + d, load(row + h.v + d));
            }
            size_t at = (size_t)(start + i) * h.heads + h.head;
            c[i] = total += h.g[at];
            beta[i] = h.beta[at];
        }
        for (int i = 0; i < CHUNK; i++) {
            e[i] = expf(c[i]), f[i] = expf(total - c[i]);
            for (int j = 0; j < CHUNK; j++) D[i * CHUNK + j] = j <= i ? expf(c[i] - c[j]) : 0;
        }
        transpose(CHUNK, SIZE, k, turned);
        product<CHUNK>(CHUNK, SIZE, k, SIZE, 1, turned, kk, 0);
    }

    void products(const float *S) {
        product<SIZE>(CHUNK, SIZE, k, SIZE, 1, S, kS, 0);
        product<CHUNK>(CHUNK, SIZE, q, SIZE, 1, turned, qk, 0);
    }

    float A(int i, int j) const { return beta[i] * kk[i * CHUNK + j] * D[i * CHUNK + j]; }

    void solve() {
        for (int i = 0; i < CHUNK; i++) {
            V u[SIZE / LANES];
            for (int b = 0; b < SIZE / LANES; b++)
                u[b] = beta[i] * (load(v + i * SIZE + b * LANES) - e[i] * load(kS + i * SIZE + b * LANES));
            for (int j = 0; j < i; j++)
                for (int b = 0; b < SIZE / LANES; b++) u[b] -= A(i, j) * load(U + j * SIZE + b * LANES);
            for (int b = 0; b < SIZE / LANES; b++) store(U + i * SIZE + b * LANES, u[b]);
        }
    }

    // out [CHUNK, SIZE] with a row each `stride`
    void write_out(const float *S, float *out, int stride) {
        alignas(64) Rows result;
        product<SIZE>(CHUNK, SIZE, q, SIZE, 1, S, result, 0);
        for (int i = 0; i < CHUNK; i++)
            for (int d = 0; d < SIZE; d += LANES) store(result + i * SIZE + d, e[i] * load(result + i * SIZE + d));
        for (int i = 0; i < CHUNK * CHUNK; i++) qk[i] *= D[i];
        product<SIZE>(CHUNK, CHUNK, qk, CHUNK, 1, U, result, 1);
        for (int i = 0; i < CHUNK; i++) memcpy(out + (size_t)i * stride, result + i * SIZE, sizeof(float) * SIZE);
    }

    void scaled(const float *x, const float *factor, float *result) const {
        for (int i = 0; i < CHUNK; i++)
            for (int d = 0; d < SIZE; d += LANES) store(result + i * SIZE + d, factor[i] * load(x + i * SIZE + d));
    }

    void advance(float *S) {
        alignas(64) Rows decayed;
        scaled(k, f, decayed);
        product<SIZE>(SIZE, CHUNK, decayed, 1, SIZE, U, S, e[CHUNK - 1]);
    }
};

// the gradients of one chunk: dS is that of the state after it, and becomes that of the state before it
struct Backward {
    alignas(64) Rows dq, dk, dv, dU, G, work;
    alignas(64) Square dP, dA, weights;
    alignas(64) State turned;
    Column dc, dbeta;

    void run(Chunk &x, const float *S, const float *dout, float *dS) {
        const float last = x.e[CHUNK - 1];
        memset(dc, 0, sizeof dc);
        // out = e q S + P U with P = q k^T D
        for (int i = 0; i < CHUNK * CHUNK; i++) weights[i] = x.qk[i] * x.D[i];
        product<SIZE>(CHUNK, CHUNK, weights, 1, CHUNK, dout, dU, 0);
        x.scaled(x.k, x.f, work);
        product<SIZE>(CHUNK, SIZE, work, SIZE, 1, dS, dU, 1);
        transpose(CHUNK, SIZE, x.U, turned);
        product<CHUNK>(CHUNK, SIZE, dout, SIZE, 1, turned, dP, 0);
        square_part(dP, x.qk, x);
        product<SIZE>(CHUNK, CHUNK, dP, CHUNK, 1, x.k, dq, 0);
        product<SIZE>(CHUNK, CHUNK, dP, 1, CHUNK, x.q, dk, 0);
        state_part(x, S, dout, dS, last);
        solve_back(x);
        // R = beta (v - e k S); A = beta k k^T D
        for (int i = 0; i < CHUNK; i++) {
            const float *r = dU + i * SIZE;
            dbeta[i] = dot(r, x.v + i * SIZE, SIZE) - x.e[i] * dot(r, x.kS + i * SIZE, SIZE);
            dc[i] -= x.beta[i] * x.e[i] * dot(r, x.kS + i * SIZE, SIZE);
            for (int d = 0; d < SIZE; d += LANES) {
                store(dv + i * SIZE + d, x.beta[i] * load(r + d));
                store(G + i * SIZE + d, -x.beta[i] * x.e[i] * load(r + d));
            }
        }
        transpose(SIZE, SIZE, S, turned);
        product<SIZE>(CHUNK, SIZE, G, SIZE, 1, turned, dk, 1);
        // with the earlier parts of dS: its old value times exp(c_last), and e q^T dout
        product<SIZE>(SIZE, CHUNK, x.k, 1, SIZE, G, dS, 1);
        transpose(CHUNK, SIZE, x.U, turned);
        product<CHUNK>(CHUNK, SIZE, dU, SIZE, 1, turned, dA, 0);
        for (int i = 0; i < CHUNK; i++)
            for (int j = 0; j < CHUNK; j++) {
                float d = j < i ? -dA[i * CHUNK + j] : 0;
                dbeta[i] += d * x.kk[i * CHUNK + j] * x.D[i * CHUNK + j];
                dA[i * CHUNK + j] = d * x.beta[i];
            }
        square_part(dA, x.kk, x);
        product<SIZE>(CHUNK, CHUNK, dA, CHUNK, 1, x.k, dk, 1);
        product<SIZE>(CHUNK, CHUNK, dA, 1, CHUNK, x.k, dk, 1);
    }

    // the gradient of (products * D) becomes that of the products; what D gets goes to c
    void square_part(float *gradient, const float *products, const Chunk &x) {
        for (int i = 0; i < CHUNK; i++)
            for (int j = 0; j < CHUNK; j++) {
                float d = gradient[i * CHUNK + j] *= x.D[i * CHUNK + j];
                dc[i] += d * products[i * CHUNK + j];
                dc[j] -= d * products[i * CHUNK + j];
            }
    }

    // what goes through the state: out = e q S + ..., next S = exp(c_last) S + (f k)^T U
    void state_part(Chunk &x, const float *S, const float *dout, float *dS, float last) {
        transpose(SIZE, SIZE, S, turned);
        product<SIZE>(CHUNK, SIZE, dout, SIZE, 1, turned, work, 0);
        for (int i = 0; i < CHUNK; i++) {
            dc[i] += x.e[i] * dot(work + i * SIZE, x.q + i * SIZE, SIZE);
            for (int d = 0; d < SIZE; d += LANES)
                store(dq + i * SIZE + d, load(dq + i * SIZE + d) + x.e[i] * load(work + i * SIZE + d));
        }
        transpose(SIZE, SIZE, dS, turned);
        product<SIZE>(CHUNK, SIZE, x.U, SIZE, 1, turned, work, 0);
        for (int i = 0; i < CHUNK; i++) {
            float d = x.f[i] * dot(work + i * SIZE, x.k + i * SIZE, SIZE);
            dc[i] -= d, dc[CHUNK - 1] += d;
            for (int j = 0; j < SIZE; j += LANES)
                store(dk + i * SIZE + j, load(dk + i * SIZE + j) + x.f[i] * load(work + i * SIZE + j));
        }
        dc[CHUNK - 1] += last * dot(S, dS, SIZE * SIZE);
        x.scaled(x.q, x.e, work);
        product<SIZE>(SIZE, CHUNK, work, 1, SIZE, dout, dS, last);
    }

    // dU becomes dR, the solution of (I + A)^T dR = dU
    void solve_back(const Chunk &x) {
        for (int i = CHUNK - 1; i >= 0; i--) {
            V u[SIZE / LANES];
            for (int b = 0; b < SIZE / LANES; b++) u[b] = load(dU + i * SIZE + b * LANES);
            for (int j = i + 1; j < CHUNK; j++)
                for (int b = 0; b < SIZE / LANES; b++) u[b] -= x.A(j, i) * load(dU + j * SIZE + b * LANES);
            for (int b = 0; b < SIZE / LANES; b++) store(dU + i * SIZE + b * LANES, u[b]);
        }
    }
};

// adds to the gradient of row what that of row * factor gives; factor is scale / sqrt(row . row + eps)
static void add_normalised(const float *gradient, const float *row, float factor, float scale, float *result) {
    float slope = dot(gradient, row, SIZE) * factor * factor * factor / (scale * scale);
    for (int d = 0; d < SIZE; d += LANES)
        store(result + d, load(result + d) + load(gradient + d) * factor - load(row + d) * slope);
}

static Head head_of(int tokens, int key_heads, int heads, int batch, int head, const float *y, const float *g,
                    const float *beta) {
    int width = (2 * key_heads + heads) * SIZE, key = head / (heads / key_heads);
    size_t row = (size_t)batch * tokens;
    return {heads, width, key * SIZE, (key_heads + key) * SIZE, (2 * key_heads + head) * SIZE, head,
            y + row * width, g + row * heads, beta + row * heads};
}

// one key head's keys and values, and the scores of one block of queries against all blocks up to its own
struct Attention {
    int tokens, key_heads, group;
    std::vector<float> keys, values, keys_turned, values_turned, squares;
    alignas(64) Rows query;

    Attention(int tokens, int key_heads, int heads)
        : tokens(tokens), key_heads(key_heads), group(heads / key_heads), keys(tokens * SIZE), values(tokens * SIZE),
          keys_turned(tokens * SIZE), values_turned(tokens * SIZE), squares(tokens * CHUNK) {}

    size_t row(int b, int t, int h, int heads) const { return (((size_t)b * tokens + t) * heads + h) * SIZE; }
    float *block(std::vector<float> &x, int j) { return &x[j * CHUNK * SIZE]; }
    float *square(int j) { return &squares[j * CHUNK * CHUNK]; }

    void read_keys(int b, int h, const float *k, const float *v) {
        for (int t = 0; t < tokens; t++) {
            memcpy(&keys[t * SIZE], k + row(b, t, h, key_heads), sizeof(float) * SIZE);
            memcpy(&values[t * SIZE], v + row(b, t, h, key_heads), sizeof(float) * SIZE);
        }
        for (int j = 0; j < tokens / CHUNK; j++) {
            transpose(CHUNK, SIZE, block(keys, j), block(keys_turned, j));
            transpose(CHUNK, SIZE, block(values, j), block(values_turned, j));
        }
    }

    void scores(int b, int h, int own, const float *q) {
        for (int i = 0; i < CHUNK; i++)
            for (int d = 0; d < SIZE; d += LANES)
                store(query + i * SIZE + d, Q_SCALE * load(q + row(b, own * CHUNK + i, h, group * key_heads) + d));
        for (int j = 0; j <= own; j++) product<CHUNK>(CHUNK, SIZE, query, SIZE, 1, block(keys_turned, j), square(j), 0);
        for (int i = 0; i < CHUNK; i++)
            for (int j = i + 1; j < CHUNK; j++) square(own)[i * CHUNK + j] = -1e30f;
    }

    float log_sum(int own, int i) {
        float top = -1e30f, total = 0;
        for (int j = 0; j <= own; j++)
            for (int c = 0; c < CHUNK; c++) top = fmaxf(top, square(j)[i * CHUNK + c]);
        for (int j = 0; j <= own; j++)
            for (int c = 0; c < CHUNK; c++) total += expf(square(j)[i * CHUNK + c] - top);
        return top + logf(total);
    }

    // the scores of a block become probabilities
    void exponentials(int j, const float *lse) {
        for (int i = 0; i < CHUNK * CHUNK; i++) square(j)[i] = expf(square(j)[i] - lse[i / CHUNK]);
    }
};

extern "C" {

// out [batch, tokens, heads, 64]
void delta_rule(int batch, int tokens, int key_heads, int heads, const float *y, const float *g, const float *beta,
                float *out) {
    Chunk *x = new Chunk;
    for (int b = 0; b < batch; b++)
        for (int h = 0; h < heads; h++) {
            Head head = head_of(tokens, key_heads, heads, b, h, y, g, beta);
            alignas(64) State S = {};
            for (int start = 0; start < tokens; start += CHUNK) {
                x->read(head, start);
                x->products(S);
                x->solve();
                x->write_out(S, out + (((size_t)b * tokens + start) * heads + h) * SIZE, heads * SIZE);
                x->advance(S);
            }
        }
    delete x;
}

// dy is added to, and must be zero at first
void delta_rule_backward(int batch, int tokens, int key_heads, int heads, const float *y, const float *g,
                         const float *beta, const float *dout, float *dy, float *dg, float *dbeta) {
    std::vector<Chunk> chunks(tokens / CHUNK);
    std::vector<float> states((size_t)tokens / CHUNK * SIZE * SIZE);
    Backward *back = new Backward;
    for (int b = 0; b < batch; b++)
        for (int h = 0; h < heads; h++) {
            Head head = head_of(tokens, key_heads, heads, b, h, y, g, beta);
            alignas(64) State S = {}, dS = {};
            alignas(64) Rows gradient;
            for (int n = 0; n < tokens / CHUNK; n++) {
                memcpy(&states[(size_t)n * SIZE * SIZE], S, sizeof S);
                chunks[n].read(head, n * CHUNK);
                chunks[n].products(S);
                chunks[n].solve();
                chunks[n].advance(S);
            }
            for (int n = tokens / CHUNK - 1; n >= 0; n--) {
                Chunk &x = chunks[n];
                size_t first = (size_t)b * tokens + n * CHUNK;
                for (int i = 0; i < CHUNK; i++)
                    memcpy(gradient + i * SIZE, dout + ((first + i) * heads + h) * SIZE, sizeof(float) * SIZE);
                back->run(x, &states[(size_t)n * SIZE * SIZE], gradient, dS);
                float total = 0;
                for (int i = CHUNK - 1; i >= 0; i--) {
                    const float *row = head.y + (size_t)(n * CHUNK + i) * head.width;
                    float *to = dy + (first + i) * head.width;
                    dg[(first + i) * heads + h] = total += back->dc[i];
                    dbeta[(first + i) * heads + h] = back->dbeta[i];
                    add_normalised(back->dq + i * SIZE, row + head.q, x.q_factor[i], Q_SCALE, to + head.q);
                    add_normalised(back->dk + i * SIZE, row + head.k, x.k_factor[i], 1, to + head.k);
                    memcpy(to + head.v, back->dv + i * SIZE, sizeof(float) * SIZE);
                }
            }
        }
    delete back;
}

// out [batch, tokens, heads, 64] from q of that shape and k, v [batch, tokens, key heads, 64]; lse [batch, heads,
// tokens] is the logarithm of the sum of the exponentials
void attention(int batch, int tokens, int key_heads, int heads, const float *q, const float *k, const float *v,
               float *out, float *lse) {
    Attention x(tokens, key_heads, heads);
    alignas(64) Rows result;
    for (int b = 0; b < batch; b++)
        for (int h = 0; h < heads; h++) {
            if (h % x.group == 0) x.read_keys(b, h / x.group, k, v);
            for (int block = 0; block < tokens / CHUNK; block++) {
                float *stored = lse + ((size_t)b * heads + h) * tokens + block * CHUNK;
                x.scores(b, h, block, q);
                memset(result, 0, sizeof result);
                for (int i = 0; i < CHUNK; i++) stored[i] = x.log_sum(block, i);
                for (int j = 0; j <= block; j++) {
                    x.exponentials(j, stored);
                    product<SIZE>(CHUNK, CHUNK, x.square(j), CHUNK, 1, x.block(x.values, j), result, 1);
                }
                for (int i = 0; i < CHUNK; i++)
                    memcpy(out + x.row(b, block * CHUNK + i, h, heads), result + i * SIZE, sizeof(float) * SIZE);
            }
        }
}

void attention_backward(int batch, int tokens, int key_heads, int heads, const float *q, const float *k, const float *v,
                        const float *out, const float *lse, const float *dout, float *dq, float *dk, float *dv) {
    Attention x(tokens, key_heads, heads);
    std::vector<float> dkeys(tokens * SIZE), dvalues(tokens * SIZE);
    alignas(64) Rows gradient, dquery;
    alignas(64) Square dS;
    Column dots;
    for (int b = 0; b < batch; b++)
        for (int h = 0; h < heads; h++) {
            if (h % x.group == 0) {
                x.read_keys(b, h / x.group, k, v);
                dkeys.assign(dkeys.size(), 0), dvalues.assign(dvalues.size(), 0);
            }
            for (int block = 0; block < tokens / CHUNK; block++) {
                x.scores(b, h, block, q);
                for (int i = 0; i < CHUNK; i++) {
                    size_t at = x.row(b, block * CHUNK + i, h, heads);
                    memcpy(gradient + i * SIZE, dout + at, sizeof(float) * SIZE);
                    dots[i] = dot(dout + at, out + at, SIZE);
                }
                memset(dquery, 0, sizeof dquery);
                for (int j = 0; j <= block; j++) {
                    float *p = x.square(j);
                    x.exponentials(j, lse + ((size_t)b * heads + h) * tokens + block * CHUNK);
                    product<SIZE>(CHUNK, CHUNK, p, 1, CHUNK, gradient, x.block(dvalues, j), 1);
                    product<CHUNK>(CHUNK, SIZE, gradient, SIZE, 1, x.block(x.values_turned, j), dS, 0);
                    for (int i = 0; i < CHUNK * CHUNK; i++) dS[i] = p[i] * (dS[i] - dots[i / CHUNK]);
                    product<SIZE>(CHUNK, CHUNK, dS, CHUNK, 1, x.block(x.keys, j), dquery, 1);
                    product<SIZE>(CHUNK, CHUNK, dS, 1, CHUNK, x.query, x.block(dkeys, j), 1);
                }
                for (int i = 0; i < CHUNK * SIZE; i += LANES)
                    store(dq + x.row(b, block * CHUNK + i / SIZE, h, heads) + i % SIZE, Q_SCALE * load(dquery + i));
            }
            for (int t = 0; t < tokens && h % x.group == x.group - 1; t++) {
                memcpy(dk + x.row(b, t, h / x.group, key_heads), &dkeys[t * SIZE], sizeof(float) * SIZE);
                memcpy(dv + x.row(b, t, h / x.group, key_heads), &dvalues[t * SIZE], sizeof(float) * SIZE);
            }
        }
}
}
