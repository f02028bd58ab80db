/*
The hot loops of the CPU in C, float32. native.py compiles this file at run time and hands it the addresses of
torch's tensors. Three parts, compiled one by one, so that sizes are constants and a head fits in registers:

    -DDOCS    -DHS=64                 attention of packed documents and its gradient, for training
    -DFORWARD -DNKV=2 -DG=2 -DD=64    the forward of GPT-2 and the Llama family, for the engine
    -DDRAW                            drawing a token from a row of logits

Each has a PyTorch twin (kernels.flash_attention, the engine's forward in infer.py, kernels.draw), which runs
where there is no C compiler and is what the tests compare with. The numbers of a row depend neither on the
rows beside it nor on the number of threads. OpenMP is used where the compiler has it.
A function that gets something wrong, such as more rows than its buffer has, writes nothing and says what.
*/
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#ifdef __clang__
#error not the OpenMP that torch has loaded
#endif
#include <omp.h>
#endif

typedef const int64_t *ints;
typedef const char *fault;  // what a function returns: NULL, or why it has done nothing

// No function writes before it knows that its buffers have the rows and that all numbers point into them.
#define NEED(fact) if (!(fact)) return #fact

// LANES floats fill a register of this machine. A wider type would live in memory, ten times slower.
#if defined __AVX512F__
enum { LANES = 16 };
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined __AVX__
enum { LANES = 8 };
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
enum { LANES = 4 };
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
#ifdef __clang__
#define SHUFFLE __builtin_shufflevector
#else  // gcc 11 has no __builtin_shufflevector
typedef int32_t mask __attribute__((vector_size(4 * LANES)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (mask){__VA_ARGS__})
#endif

// e^x = 2^n e^f, |f| <= ln 2 / 2, and e^f by the polynomial of Cephes: 1e-7 relative, and it becomes vectors.
static inline float exp_(float x) {
    float y = x > 88.f ? 88.f : x;
    float n = __builtin_rintf(y * 1.44269504f);
    float f = y - n * 0.693359375f + n * 2.12194440e-4f;
    float p = (((1.9875691500e-4f * f + 1.3981999507e-3f) * f + 8.3334519073e-3f) * f + 4.1665795894e-2f) * f;
    p = (p + 1.6666665459e-1f) * f + 5.0000001201e-1f;
    union { uint32_t bits; float value; } two = { (uint32_t)((int32_t)n + 127) << 23 };
    return x < -87.f ? 0.f : (p * f * f + f + 1.f) * two.value;
}

static float most(const float *x, int64_t n) {  // the largest of n numbers, in LANES maxima side by side
    float lane[LANES], top = -INFINITY;
    int64_t i = 0;
    for (int j = 0; j < LANES; j++) lane[j] = top;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    for (; i < n; i++) top = x[i] > top ? x[i] : top;
    for (int j = 0; j < LANES; j++) top = lane[j] > top ? lane[j] : top;
    return top;
}


#ifndef DRAW
#ifdef _OPENMP
static int threads(void) { return omp_get_max_threads(); }  // of the next parallel region
static int64_t me(void) { return omp_get_thread_num(); }
#else
static int threads(void) { return 1; }
static int64_t me(void) { return 0; }
#endif

static int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }

static inline vec load(const float *x) {
    vec v;
    memcpy(&v, x, sizeof v);
    return v;
}
#endif


#ifdef DOCS
// ----------------------------------------------------------------------------------------------------
// Causal attention of packed documents. torch's fused attention wants rectangles of one length, computes
// what lies above the diagonal too, and needs copies to make the rectangles: 5 to 6 times slower on
// documents of 16 to 256 tokens (AVX2: 2.5). A task is one document and one head of keys, or one prompt with
// all its answers: they share gradients, so that one thread adds them up.
//
//                   t ->   K transposed: (HS, T), so that 32 keys lie side by side
//      8 queries  | #################.   for d in 0 .. HS: 8 x 2 registers of 16 sums
//      at a time  | ##################       += q[r][d] * K'[d][t .. t + 32]
//                                        nothing is written before all of d is in; above the diagonal only
//                                        the last 32 are computed
//
//    forward   p = exp(q K' - max),  out = p V / sum,  lse = max + log sum
//    backward  p = exp(q K' - lse), ds = p * (dout V' - out . dout); dq = ds K, dk += ds' q, dv += p' dout
enum { R = LANES == 16 ? 8 : 5 };  // queries at a time
enum { C = HS / LANES, W = C % 2 ? 1 : 2 };  // vectors of a head; how many of them at a time

typedef struct {
    const float *q, *k, *v;  // (N, nh, HS), (N, nkv, HS), (N, nkv, HS)
    ints rows, cu, first;    // document s: rows[cu[s]] .. rows[cu[s + 1] - 1]; its queries: from first[s] on
    ints tasks;              // task i: documents tasks[i] .. tasks[i + 1] - 1
    float *out, *lse;        // (N, nh, HS), (N, nh)
    const float *dout;       // the gradient of out; NULL in the forward
    float *dq, *dk, *dv;     // like q, k, v, and zero so far
    int64_t N, M, docs, n_tasks;  // how many rows; numbers in `rows`; documents; tasks
    int64_t longest, nkv, group;
    double scale;
} docs;

typedef struct { float *kt, *k, *vt, *v, *dk, *dv, *p, *ds; } space;  // of a thread: one head of a document

typedef struct {  // R queries of one head, and where their results go
    const float *q[R], *dout[R];
    float *to[R], by[R];  // to: NULL behind the last query, whose work is then done again and not kept
    int64_t row[R], sees[R];
} queries;

static inline void store(float *x, vec v) { memcpy(x, &v, sizeof v); }

// head g of rows of x (N, nkv, HS) side by side: (T, HS)
static void fetch(const docs *m, const float *x, ints rows, int64_t T, int64_t g, float *to) {
    for (int64_t t = 0; t < T; t++)
        memcpy(to + t * HS, x + (rows[t] * m->nkv + g) * HS, sizeof(float[HS]));
}

// (T, HS) -> (HS, width), zeros behind T
static void transpose(const float *x, int64_t T, int64_t width, float *to) {
    for (int d = 0; d < HS; d++)
        for (int64_t t = 0; t < width; t++)
            to[d * width + t] = t < T ? x[t * HS + d] : 0.f;
}

// s (R, width) = a (R, HS) times xt (HS, width), its first n columns
static void dots(const float **a, const float *xt, int64_t width, int64_t n, float *s) {
    for (int64_t j = 0; j < n; j += 2 * LANES) {
        vec sum[R][2] = {0};
        for (int d = 0; d < HS; d++) {
            vec x0 = load(xt + d * width + j), x1 = load(xt + d * width + j + LANES);
            for (int r = 0; r < R; r++) {
                sum[r][0] += a[r][d] * x0;
                sum[r][1] += a[r][d] * x1;
            }
        }
        for (int r = 0; r < R; r++) {
            store(s + r * width + j, sum[r][0]);
            store(s + r * width + j + LANES, sum[r][1]);
        }
    }
}

// out (R, HS) = by * p (R, n) x (n, HS)
static void mix(const float *p, int64_t width, int64_t n, const float *x, const float *by, float **out) {
    for (int c = 0; c < C; c += W) {
        vec sum[R][W] = {0};
        for (int64_t j = 0; j < n; j++)
            for (int w = 0; w < W; w++) {
                vec xv = load(x + j * HS + LANES * (c + w));
                for (int r = 0; r < R; r++) sum[r][w] += p[r * width + j] * xv;
            }
        for (int r = 0; r < R; r++)
            for (int w = 0; w < W && out[r]; w++) store(out[r] + LANES * (c + w), sum[r][w] * by[r]);
    }
}

// x (n, HS) += by * p' (n, R) a (R, HS)
static void spread(const float *p, int64_t width, int64_t n, const float **a, float by, float *x) {
    for (int c = 0; c < C; c += W) {
        vec av[R][W];
        for (int r = 0; r < R; r++)
            for (int w = 0; w < W; w++) av[r][w] = load(a[r] + LANES * (c + w)) * by;
        for (int64_t j = 0; j < n; j++)
            for (int w = 0; w < W; w++) {
                vec sum = load(x + j * HS + LANES * (c + w));
                for (int r = 0; r < R; r++) sum += p[r * width + j] * av[r][w];
                store(x + j * HS + LANES * (c + w), sum);
            }
    }
}

// One head of a document takes this many floats, of which this cuts the pieces.
static int64_t floats(const docs *m) { return padded(m->longest) * (6 * HS + 2 * R); }

static space cut(const docs *m, float *from) {
    int64_t n = padded(m->longest);
    float *x[7];
    for (int i = 0; i < 7; i++) x[i] = from + i * n * HS;
    return (space){x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[6] + n * R};
}

static queries ask(const docs *m, ints at, int64_t i, int64_t T, int64_t h) {
    int64_t nh = m->nkv * m->group;
    queries a;
    for (int r = 0; r < R; r++) {
        int real = i + r < T;
        int64_t row = at[real ? i + r : T - 1], place = (row * nh + h) * HS;
        a.row[r] = row;
        a.sees[r] = real ? i + r + 1 : 0;
        a.q[r] = m->q + place;
        a.dout[r] = m->dout ? m->dout + place : NULL;
        a.to[r] = real ? (m->dout ? m->dq : m->out) + place : NULL;
        a.by[r] = m->scale;
    }
    return a;
}

// Scores of query r become its probabilities, not yet divided by their sum.
static void soften(const docs *m, queries *a, int r, int64_t h, float *p) {
    float sum = 0, top = most(p, a->sees[r]), scale = m->scale;
    #pragma omp simd reduction(+:sum)
    for (int64_t j = 0; j < a->sees[r]; j++) sum += p[j] = exp_((p[j] - top) * scale);
    a->by[r] = 1 / sum;
    if (a->to[r]) m->lse[a->row[r] * m->nkv * m->group + h] = top * scale + logf(sum);
}

// Scores of query r become its probabilities p, and its products dout v' their gradients ds.
static void soften_backward(const docs *m, const queries *a, int r, int64_t h, float *p, float *ds) {
    int64_t place = a->row[r] * m->nkv * m->group + h;
    float delta = 0, lse = m->lse[place], scale = m->scale;
    for (int d = 0; d < HS; d++) delta += a->dout[r][d] * m->out[place * HS + d];
    #pragma omp simd
    for (int64_t j = 0; j < a->sees[r]; j++) {
        p[j] = exp_(p[j] * scale - lse);
        ds[j] = p[j] * (ds[j] - delta);
    }
}

static void document(const docs *m, int64_t s, int64_t g, space b) {  // document s, head g of the keys
    ints at = m->rows + m->cu[s];
    int64_t T = m->cu[s + 1] - m->cu[s], width = padded(T), left = sizeof(float) * T * HS;
    fetch(m, m->k, at, T, g, b.k);
    fetch(m, m->v, at, T, g, b.v);
    transpose(b.k, T, width, b.kt);
    if (m->dout) {
        transpose(b.v, T, width, b.vt);
        memset(b.dk, 0, left);
        memset(b.dv, 0, left);
    }
    for (int64_t h = g * m->group; h < (g + 1) * m->group; h++)
        for (int64_t i = m->first[s]; i < T; i += R) {
            int64_t n = i + R < T ? i + R : T;
            queries a = ask(m, at, i, T, h);
            dots(a.q, b.kt, width, n, b.p);
            if (m->dout) dots(a.dout, b.vt, width, n, b.ds);
            for (int r = 0; r < R; r++) {
                float *p = b.p + r * width, *ds = b.ds + r * width;
                if (m->dout) soften_backward(m, &a, r, h, p, ds);
                else soften(m, &a, r, h, p);
                for (int64_t j = a.sees[r]; j < n; j++) p[j] = ds[j] = 0;
            }
            mix(m->dout ? b.ds : b.p, width, n, m->dout ? b.k : b.v, a.by, a.to);
            if (m->dout) {
                spread(b.ds, width, n, a.q, m->scale, b.dk);
                spread(b.p, width, n, a.dout, 1, b.dv);
            }
        }
    for (int64_t t = 0; t < T && m->dout; t++)
        for (int d = 0; d < HS; d++) {
            m->dk[(at[t] * m->nkv + g) * HS + d] += b.dk[t * HS + d];
            m->dv[(at[t] * m->nkv + g) * HS + d] += b.dv[t * HS + d];
        }
}

static fault check(const docs *m) {
    NEED(m->n_tasks == 0 || (m->tasks[0] >= 0 && m->tasks[m->n_tasks] <= m->docs));
    for (int64_t i = 0; i < m->n_tasks; i++) NEED(m->tasks[i] <= m->tasks[i + 1]);
    NEED(m->docs == 0 || (m->cu[0] >= 0 && m->cu[m->docs] <= m->M));
    for (int64_t s = 0; s < m->docs; s++) {
        int64_t T = m->cu[s + 1] - m->cu[s];
        NEED(T >= 0 && T <= m->longest && m->first[s] >= 0);
    }
    for (int64_t i = 0; i < m->M; i++) NEED(m->rows[i] >= 0 && m->rows[i] < m->N);
    return NULL;
}

fault attend(const docs *m) {  // the forward, or with dout the backward
    fault wrong = check(m);
    if (wrong) return wrong;
    float *memory = aligned_alloc(64, sizeof(float) * (threads() * floats(m) + 16));
    NEED(memory);
    #pragma omp parallel
    {
        space b = cut(m, memory + me() * floats(m));
        #pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < m->n_tasks * m->nkv; i++)
            for (int64_t s = m->tasks[i / m->nkv]; s < m->tasks[i / m->nkv + 1]; s++)
                document(m, s, i % m->nkv, b);
    }
    free(memory);
    return NULL;
}
#endif


#ifdef FORWARD
// ----------------------------------------------------------------------------------------------------
// The engine's forward: GPT-2 and the Llama family in one function. A decode step of a small model is some
// hundred operations of microseconds each, and starting them took half of its time. Here a step is one call,
// and its threads meet six times a layer.
//
//     x = embeddings              a panel of W': 32 columns, row after row (K, 32): memory is read in order
//     each layer:                                      k ->
//       y = norm(x)               12 rows of x  | x0 x0 x0 x0 ..   for each k: load 32 weights once, multiply
//       qkv = y W'                              | x1 x1 x1 x1 ..   them by x[0][k] .. x[11][k], add to 12 x 2
//       norm, rotate, store k, v  panel of W'   | w  w  w  w  ..   registers of 16 sums; nothing is written
//       att = softmax(q k') v                                      before k ends: 240 of the 256 GFLOP/s of a
//       x += att W'                                                Zen 5 core
//       y = norm(x);  mid = gelu(y W') or silu(gate) * up;  x += mid W'
//
// The sum of an element runs over k in one order, whatever rows are beside it and however many threads there
// are: the numbers of a request are the same TO THE BIT in any batch.
#include <sched.h>

enum { ROWS = LANES == 16 ? 12 : 6, TILE = 2 * LANES };  // ROWS x 2 sums in 32 registers, or in 16
enum { HS = (D + 15) / 16 * 16, L = HS / LANES };        // a key of D numbers is followed by zeros
enum { U = 8 / (L * G) > 1 ? 8 / (L * G) : 1, NH = NKV * G };
enum { SET, ADD, RELU, GELU, GATED };

static int team(void) {  // the threads of this region
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

typedef struct {  // ..b: the bias; a norm's may be NULL, and so may qn and kn
    const float *n1, *n1b, *qkv, *qkvb, *qn, *kn, *o, *ob, *n2, *n2b, *up, *upb, *down, *downb;
} layer;
typedef struct {
    const layer *layers;
    const float *wte, *wpe, *cos, *sin, *nf, *nfb, *head, *headb;
    float *x, *y, *qkv, *att, *mid;  // (rows, stride) that the forward works in
    int64_t stride, rows;
    int64_t C, inner, V, positions, act, rms;
    double eps, scale;
} net;
typedef struct {
    float *keys;            // (layers, blocks, NKV, size, HS), and the values the same
    const int32_t *table;   // (requests, width): block i of a request holds its tokens from i * size on
    int64_t values, layer;  // floats from the keys to the values; from layer to layer
    int64_t blocks, size;   // of the cache; tokens of a block, a multiple of 16
    int64_t requests, width;
} cache;
typedef struct { int arrived, round; } gate;

// All threads wait for the last. OpenMP's barrier spins for milliseconds: five times slower on a busy
// machine.
static void meet(gate *g) {
    int n = team(), round = __atomic_load_n(&g->round, __ATOMIC_ACQUIRE);
    if (n == 1) return;
    if (__atomic_add_fetch(&g->arrived, 1, __ATOMIC_ACQ_REL) == n) {
        g->arrived = 0;
        __atomic_store_n(&g->round, round + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int i = 0; __atomic_load_n(&g->round, __ATOMIC_ACQUIRE) == round; i++)
        if (i > 2000) sched_yield();
}

static inline vec pairs(vec a, vec b) {  // a0 + a1, a2 + a3 .. and then those of b
    return SHUFFLE(a, b, EVEN) + SHUFFLE(a, b, ODD);
}

// z (R, 32) = R rows of x times one panel. R is a constant wherever this is inlined, so that `a` lies in
// registers. `step` bytes of the next panel are fetched for each k: it comes from memory while this one is
// multiplied.
static inline __attribute__((always_inline))
void tile(const int R, const float *x, int64_t sx, const float *w, int64_t K, float (*z)[32],
          const char *next, int64_t step) {
    for (int c = 0; c < 32; c += TILE) {
        vec a[ROWS][2] = {0};
        for (int64_t k = 0; k < K; k++, next += step) {
            __builtin_prefetch(next);
            vec w0 = load(w + 32 * k + c), w1 = load(w + 32 * k + c + LANES);
            #pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
                a[r][0] += x[r * sx + k] * w0;
                a[r][1] += x[r * sx + k] * w1;
            }
        }
        #pragma GCC unroll 12
        for (int r = 0; r < R; r++) memcpy(z[r] + c, a[r], sizeof a[r]);
    }
}

static inline __attribute__((always_inline))
void tiles(int R, const float *x, int64_t sx, const float *w, int64_t K, float (*z)[32],
                  const char *next, int64_t step) {
    #define CASE(R) case R: tile(R, x, sx, w, K, z, next, step); break;
    switch (R) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
        #ifdef __AVX512F__
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
        #endif
    }
    #undef CASE
}

static void finish(const float *z, const float *b, float *y, int act) {  // of a row of a product: bias, act
    float t[32];
    for (int c = 0; c < 32; c++) t[c] = z[c] + b[c];
    if (act == ADD)
        for (int c = 0; c < 32; c++) y[c] += t[c];
    else if (act == GATED)  // 16 columns of gate, then theirs of up
        for (int c = 0; c < 16; c++) y[c] = t[c] / (1 + exp_(-t[c])) * t[c + 16];
    else if (act == GELU)
        for (int c = 0; c < 32; c++)
            y[c] = t[c] / (1 + exp_(-1.5957691216f * (t[c] + 0.044715f * t[c] * t[c] * t[c])));
    else
        for (int c = 0; c < 32; c++) y[c] = act == RELU && t[c] < 0 ? 0 : t[c];
}

// y = act(x W' + b). A job is 96 rows of x, which stay in the cache, times a panel; a thread takes a run of
// jobs.
static void linear(const float *x, int64_t sx, const float *w, const float *b, int64_t K, int64_t columns,
                   float *y, int64_t sy, int64_t n, int act) {
    int64_t wide = act == GATED ? 16 : 32, panels = (columns + wide - 1) / wide;
    int64_t jobs = (n + 95) / 96 * panels;
    for (int64_t job = jobs * me() / team(); job < jobs * (me() + 1) / team(); job++) {
        int64_t j = job % panels, first = job / panels * 96, end = first + 96 < n ? first + 96 : n, rows;
        int64_t step = 4 * TILE / ((end - first + ROWS - 1) / ROWS);
        const char *next = (const char *)(w + (j + 1) % panels * K * 32);
        for (int64_t i = first; i < end; i += rows, next += 32 / TILE * K * step) {
            float z[ROWS][32];
            int64_t left = (end - i + ROWS - 1) / ROWS;
            rows = (end - i + left - 1) / left;
            tiles(rows, x + i * sx, sx, w + j * K * 32, K, z, next, step);
            for (int r = 0; r < rows; r++) finish(z[r], b + 32 * j, y + (i + r) * sy + j * wide, act);
        }
    }
}

static void scale(const float *x, const float *w, const float *b, float *y, int64_t C, int rms, float eps) {
    float mean = 0, var = 0;  // RMSNorm or LayerNorm of one row
    if (!rms) {
        #pragma omp simd reduction(+:mean)
        for (int64_t c = 0; c < C; c++) mean += x[c];
        mean /= C;
    }
    #pragma omp simd reduction(+:var)
    for (int64_t c = 0; c < C; c++) var += (x[c] - mean) * (x[c] - mean);
    float s = 1 / sqrtf(var / C + eps);
    for (int64_t c = 0; c < C; c++) y[c] = (x[c] - mean) * s * w[c] + (b ? b[c] : 0);
}

// y = norm of x, or of its rows `at`
static void norm(const net *m, const float *w, const float *b, ints at, int64_t n) {
    #pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < n; r++)
        scale(m->x + (at ? at[r] : r) * m->stride, w, b, m->y + r * m->stride, m->C, m->rms, m->eps);
}

static void embed(const net *m, ints ids, ints pos, int64_t n) {
    #pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < n; r++)
        for (int64_t c = 0; c < m->C; c++)
            m->x[r * m->stride + c] = m->wte[ids[r] * m->C + c] + (m->wpe ? m->wpe[pos[r] * m->C + c] : 0);
}

static void rotate(const net *m, float *x, int64_t pos) {  // (x[i], x[i + D / 2]) by the position's angle
    for (int i = 0; i < D / 2; i++) {
        float a = x[i], b = x[i + D / 2], c = m->cos[pos * (D / 2) + i], s = m->sin[pos * (D / 2) + i];
        x[i] = a * c - b * s;
        x[i + D / 2] = b * c + a * s;
    }
}

// Where the key of head g of token t lies; behind it those of the next tokens of its block.
static float *key(const cache *kv, int64_t layer, int64_t request, int64_t t, int64_t g) {
    int64_t block = kv->table[request * kv->width + t / kv->size];
    return kv->keys + layer * kv->layer + ((block * NKV + g) * kv->size + t % kv->size) * HS;
}

static void heads(const net *m, const layer *l, int64_t number, const cache *kv, ints owner, ints pos,
                  int64_t n) {
    #pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < n; r++)  // q and k: norm, rotation; k and v: into the cache
        for (int h = 0; h < NH + 2 * NKV; h++) {
            float *x = m->qkv + r * m->stride + h * D;
            if (h < NH + NKV && l->qn) scale(x, h < NH ? l->qn : l->kn, NULL, x, D, 1, m->eps);
            if (h < NH + NKV && m->cos) rotate(m, x, pos[r]);
            if (h < NH) continue;
            float *to = key(kv, number, owner[r], pos[r], (h - NH) % NKV) + (h < NH + NKV ? 0 : kv->values);
            memcpy(to, x, sizeof(float[D]));
            for (int d = D; d < HS; d++) to[d] = 0;  // what lies behind a query does not count
        }
}

// p (G, width) = by * q (G, D) k' for T keys of a block: LANES keys give as many vectors of partial sums,
// whose lanes are added up pairwise.
static void scores(const float *q, const float *k, int64_t T, float by, int64_t width, float (*p)[width]) {
    for (int64_t t = 0; t < T; t += LANES)
        for (int h = 0; h < G; h++) {
            vec a[LANES];
            #pragma GCC unroll 16
            for (int j = 0; j < LANES; j++) {
                a[j] = load(q + h * D) * load(k + (t + j) * HS);
                #pragma GCC unroll 16
                for (int c = 1; c < L; c++)
                    a[j] += load(q + h * D + LANES * c) * load(k + (t + j) * HS + LANES * c);
            }
            #pragma GCC unroll 4
            for (int s = LANES / 2; s; s /= 2)
                #pragma GCC unroll 8
                for (int j = 0; j < s; j++) a[j] = pairs(a[2 * j], a[2 * j + 1]);
            a[0] *= by;
            memcpy(p[h] + t, a, sizeof(vec));
        }
}

static void softmax(float *s, int64_t T) {  // of s[0 .. T], which has room for whole vectors of 16
    float top = most(s, T), sum = 0;
    int64_t T16 = (T + 15) / 16 * 16;
    for (int64_t t = T; t < T16; t++) s[t] = -INFINITY;
    #pragma omp simd reduction(+:sum)
    for (int64_t t = 0; t < T16; t++) sum += s[t] = exp_(s[t] - top);
    for (int64_t t = 0; t < T16; t++) s[t] /= sum;
}

// o += p (G, T) v (T, HS) for T tokens of a block, in U sums of every U-th value: an addition need not wait
// for the last. `soon` is what will be read next.
static void mix(const float *v, const float *soon, int64_t T, int64_t width, float (*p)[width],
                vec (*o)[G][L]) {
    int64_t t = 0;
    for (; t + U <= T; t += U)
        #pragma GCC unroll 8
        for (int u = 0; u < U; u++) {
            for (int c = 0; c < HS; c += 16) __builtin_prefetch(soon + (t + u) * HS + c);
            for (int h = 0; h < G; h++)
                for (int c = 0; c < L; c++) o[u][h][c] += p[h][t + u] * load(v + (t + u) * HS + LANES * c);
        }
    for (; t < T; t++)
        for (int h = 0; h < G; h++)
            for (int c = 0; c < L; c++) o[0][h][c] += p[h][t] * load(v + t * HS + LANES * c);
}

// Token r asks the heads [first, end) of the keys, each with G queries; p (NH, width) is work space. Memory
// is the limit. A block's heads lie side by side: block by block it is read in order, and the keys of row
// `next` are fetched while these values are. Head by head takes 1.3 times as long (AVX-512, 64 requests).
static void attend(const net *m, int64_t number, const cache *kv, ints owner, ints pos, int64_t r,
                   int64_t next, int64_t first, int64_t end, int64_t width, float (*p)[width]) {
    int64_t T = pos[r] + 1, size = kv->size;
    const float *q = m->qkv + r * m->stride;
    vec o[NKV][U][G][L] = {0};
    for (int64_t t = 0; t < T; t += size) {
        int64_t count = T - t < size ? T - t : size;
        for (int64_t g = first; g < end; g++) {
            const float *k = key(kv, number, owner[r], t, g);
            scores(q + g * G * D, k, count, m->scale, width, (float (*)[width])&p[g * G][t]);
        }
    }
    for (int64_t h = first * G; h < end * G; h++) softmax(p[h], T);
    for (int64_t t = 0; t < T; t += size) {
        int64_t count = T - t < size ? T - t : size;
        for (int64_t g = first; g < end; g++) {
            const float *v = key(kv, number, owner[r], t, g) + kv->values;
            mix(v, key(kv, number, owner[next], t, g), count, width, (float (*)[width])&p[g * G][t], o[g]);
        }
    }
    for (int64_t g = first; g < end; g++) {
        for (int u = 1; u < U; u++)
            for (int h = 0; h < G; h++)
                for (int c = 0; c < L; c++) o[g][0][h][c] += o[g][u][h][c];
        for (int h = 0; h < G; h++)
            memcpy(m->att + r * m->stride + (g * G + h) * D, o[g][0][h], sizeof(float[D]));
    }
}

// A job is a token, or one of its heads where there are fewer tokens than threads.
static void attention(const net *m, int64_t number, const cache *kv, ints owner, ints pos, int64_t n,
                      int64_t width, float (*p)[width]) {
    int64_t parts = n < team() ? NKV : 1, heads = NKV / parts;
    #pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < n * parts; i++) {
        int64_t r = i / parts, next = r + 1 < n ? r + 1 : r, g = i % parts * heads;
        attend(m, number, kv, owner, pos, r, next, g, g + heads, width, p);
    }
}

static fault check(const net *m, const cache *kv, ints ids, ints owner, ints pos, int64_t n, int64_t width) {
    NEED(n <= m->rows && width % 16 == 0 && kv->size > 0 && kv->size % 16 == 0);
    NEED(m->stride >= padded(m->C) && m->stride >= padded(m->inner));
    NEED(m->stride >= padded((NH + 2 * NKV) * D) && m->stride >= (NH - 1) * D + HS);
    for (int64_t i = 0; i < n; i++) {
        NEED(ids[i] >= 0 && ids[i] < m->V);
        NEED(owner[i] >= 0 && owner[i] < kv->requests);
        NEED(pos[i] >= 0 && pos[i] < m->positions && pos[i] < width && pos[i] < kv->width * kv->size);
        const int32_t *block = kv->table + owner[i] * kv->width;
        for (int64_t t = 0; t <= pos[i] / kv->size; t++) NEED(block[t] >= 0 && block[t] < kv->blocks);
    }
    return NULL;
}

static void walk(const net *m, int64_t layers, const cache *kv, ints ids, ints owner, ints pos, int64_t n,
                 int64_t width, float (*p)[width], gate *g) {
    embed(m, ids, pos, n);
    meet(g);
    for (int64_t i = 0; i < layers; i++) {
        const layer *l = m->layers + i;
        norm(m, l->n1, l->n1b, NULL, n);
        meet(g);
        linear(m->y, m->stride, l->qkv, l->qkvb, m->C, (NH + 2 * NKV) * D, m->qkv, m->stride, n, SET);
        meet(g);
        heads(m, l, i, kv, owner, pos, n);
        meet(g);
        attention(m, i, kv, owner, pos, n, width, p);
        meet(g);
        linear(m->att, m->stride, l->o, l->ob, NH * D, m->C, m->x, m->stride, n, ADD);
        meet(g);
        norm(m, l->n2, l->n2b, NULL, n);
        meet(g);
        linear(m->y, m->stride, l->up, l->upb, m->C, m->inner, m->mid, m->stride, n, m->act);
        meet(g);
        linear(m->mid, m->stride, l->down, l->downb, m->inner, m->C, m->x, m->stride, n, ADD);
        meet(g);
    }
}

// n tokens: their ids, the request (a row of kv's table) and the position of each. width: more than the
// largest position, a multiple of 16. Leaves the last layer's output in x.
fault forward(const net *m, int64_t layers, const cache *kv, ints ids, ints owner, ints pos, int64_t n,
              int64_t width) {
    fault wrong = check(m, kv, ids, owner, pos, n, width);
    if (wrong) return wrong;
    float *scores = malloc(sizeof(float) * (threads() * NH * width + 1));  // a thread's: (NH, width)
    NEED(scores);
    gate g = {0, 0};
    #pragma omp parallel
    walk(m, layers, kv, ids, owner, pos, n, width, (float (*)[width])(scores + me() * NH * width), &g);
    free(scores);
    return NULL;
}

// z (zn, sz): its first n rows become the logits of the rows `at` of x.
fault logits(const net *m, ints at, int64_t n, float *z, int64_t zn, int64_t sz) {
    NEED(n <= m->rows && n <= zn && sz >= padded(m->V) && m->stride >= m->C);
    for (int64_t i = 0; i < n; i++) NEED(at[i] >= 0 && at[i] < m->rows);
    gate g = {0, 0};
    #pragma omp parallel
    {
        norm(m, m->nf, m->nfb, at, n);
        meet(&g);
        linear(m->y, m->stride, m->head, m->headb, m->C, m->V, z, sz, n, SET);
        meet(&g);
    }
    return NULL;
}
#endif


#ifdef DRAW
// ----------------------------------------------------------------------------------------------------
// Drawing a token: see kernels.draw. The mass of each PART of words is added up, then one part is searched.
enum { PART = 512 };

// The first word at which the mass so far exceeds `left`; one without mass is never drawn.
static int64_t find(const float *x, int64_t V, const double *mass, int64_t parts, float top, float cool,
                    double left) {
    int64_t p = -1, token = 0;
    for (int64_t i = 0; i < parts; i++)
        if (mass[i] > 0) {
            if (p >= 0) left -= mass[p];
            p = i;
            if (left < mass[p]) break;
        }
    for (int64_t i = p < 0 ? V : p * PART; i < V && i < p * PART + PART; i++) {
        double w = exp_((x[i] - top) * cool);
        if (w > 0) {
            token = i;
            if (left < w) break;
            left -= w;
        }
    }
    return token;
}

// z: n rows of V words, sz floats apart; u, temperature, token, logp, raw: N numbers
fault draw(const float *z, int64_t sz, int64_t n, int64_t V, int64_t N, const double *u,
           const float *temperature, int64_t *token, float *logp, float *raw) {
    NEED(n <= N && V > 0 && (n < 2 || sz >= V));
    int64_t parts = (V + PART - 1) / PART;
    #pragma omp parallel for
    for (int64_t r = 0; r < n; r++) {
        const float *x = z + r * sz, cool = temperature[r] > 0 ? 1 / temperature[r] : 1;
        float peak[parts], top;
        double mass[parts], one = 0, all = 0;  // one, all: the mass at temperature 1 and at the request's
        for (int64_t p = 0; p < parts; p++) peak[p] = most(x + p * PART, p + 1 < parts ? PART : V - p * PART);
        top = most(peak, parts);
        for (int64_t p = 0; p < parts; p++) {
            float a = 0, b = 0;
            int64_t end = p * PART + PART < V ? p * PART + PART : V;
            #pragma omp simd reduction(+:a)
            for (int64_t i = p * PART; i < end; i++) a += exp_(x[i] - top);
            if (cool != 1) {
                #pragma omp simd reduction(+:b)
                for (int64_t i = p * PART; i < end; i++) b += exp_((x[i] - top) * cool);
            }
            one += a;
            mass[p] = cool != 1 ? b : a;
            all += mass[p];
        }
        int64_t p = 0, t;
        if (temperature[r] > 0)
            t = find(x, V, mass, parts, top, cool, u[r] * all);
        else {  // greedy: the first of the largest
            while (p < parts - 1 && peak[p] < top) p++;
            for (t = p * PART; t < V - 1 && x[t] < top; ) t++;
        }
        token[r] = t;
        raw[r] = x[t] - top - log(one);
        logp[r] = temperature[r] > 0 ? (x[t] - top) * cool - log(all) : raw[r];
    }
    return NULL;
}
#endif
