/* y += x Δᵀ on a processor: the survivors of a row are decoded once, and each is multiplied with up
 * to 64 tokens that lie side by side. Sums are float32, rounded once.
 * Compiled where there is a compiler (see setup.py) and called through ctypes by
 * compiled_product.py. */

#include <pthread.h>
#include <stdlib.h>

#include "_packed_rows.h"
#include "_token_tiles.h"

/* A panel is the part of x that rows of a strip are multiplied with before the next. */
enum { TOKENS = 64, STRIP = 64, PANEL_BYTES = 48 << 10, MOST_THREADS = 256 };
/* Outputs in a cache line of any dtype: no two threads write to one. */
enum { TOGETHER = 64 };

#if defined(__GNUC__) && !defined(__clang__)
#define SCALAR VECTORS __attribute__((optimize("no-tree-vectorize")))
#else
#define SCALAR
#endif

/* What is asked for, as compiled_product.py writes it. All deltas are (rows, columns); `width` is the
 * most entries that a row of any has; `weights` may be NULL, and a delta. */
typedef struct {
    const delta *const *deltas;
    int64_t count;
    const float *weights;
    const int64_t *token_slot;
    int64_t total, rows, columns, width;
    const void *x;
    int64_t x_dtype, x_stride;
    void *y;
    int64_t y_dtype, y_stride, transposed, threads;
} request;

/* ---- products of one tile ---- */

/* Rows of decoded entries, `stride` apart; row r has groups[r] groups of eight. */
typedef struct {
    const int32_t *column;
    const float *value;
    int64_t stride, rows;
    const int64_t *groups;
} strip;

/* sum[r] = Σ value[i] * x[column[i]]; gathering into vectors takes longer than it saves. */
SCALAR static void gather_one(const strip *s, const float *restrict x, float *restrict sum) {
    for (int64_t r = 0; r < s->rows; r++) {
        const int32_t *restrict column = s->column + r * s->stride;
        const float *restrict value = s->value + r * s->stride;
        float a = 0, b = 0, c = 0, d = 0; /* apart, so that none waits for another */
        for (int64_t i = 0; i < 8 * s->groups[r]; i += 4) {
            a += value[i] * x[column[i]];
            b += value[i + 1] * x[column[i + 1]];
            c += value[i + 2] * x[column[i + 2]];
            d += value[i + 3] * x[column[i + 3]];
        }
        sum[r] = (a + b) + (c + d);
    }
}

/* sum[r, t] += Σ value[i] * x[column[i], t] over the groups from … to - 1 of each row r; tokens are
 * 8 * `vectors`. Sums of `apart` entries are under way at once, to hide how long an addition takes. */
INLINE void gather_vectors(const strip *s, int64_t from, int64_t to, const float *restrict x,
                           float *restrict sum, const int vectors, const int apart) {
    for (int64_t r = 0; r < s->rows; r++, sum += 8 * vectors) {
        const int32_t *restrict column = s->column + r * s->stride;
        const float *restrict value = s->value + r * s->stride;
        int64_t end = 8 * smaller(to, s->groups[r]);
        eight sums[8];
#pragma GCC unroll 8
        for (int v = 0; v < vectors * apart; v++)
            sums[v] = v < vectors ? ((eight *)sum)[v] : (eight){0};
        for (int64_t i = 8 * from; i < end; i += apart)
#pragma GCC unroll 8
            for (int k = 0; k < apart; k++) {
                const eight *own = (const eight *)(x + (int64_t)column[i + k] * (8 * vectors));
#pragma GCC unroll 8
                for (int v = 0; v < vectors; v++) sums[vectors * k + v] += value[i + k] * own[v];
            }
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
#pragma GCC unroll 8
            for (int k = 1; k < apart; k++) sums[v] += sums[vectors * k + v];
            ((eight *)sum)[v] = sums[v];
        }
    }
}

/* The same of four tokens. */
INLINE void gather_four(const strip *s, int64_t from, int64_t to, const float *restrict x,
                        float *restrict sum) {
    for (int64_t r = 0; r < s->rows; r++) {
        const int32_t *restrict column = s->column + r * s->stride;
        const float *restrict value = s->value + r * s->stride;
        int64_t end = 8 * smaller(to, s->groups[r]);
        four sums[4] = {((four *)sum)[r]};
        for (int64_t i = 8 * from; i < end; i += 4)
            for (int k = 0; k < 4; k++)
                sums[k] += value[i + k] * ((const four *)x)[column[i + k]];
        ((four *)sum)[r] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
}

VECTORS static void gather(const strip *s, int64_t from, int64_t to, const float *restrict x,
                           int64_t tokens, float *restrict sum) {
    switch (tokens) {
    case 4: gather_four(s, from, to, x, sum); break;
    case 8: gather_vectors(s, from, to, x, sum, 1, 8); break;
    case 16: gather_vectors(s, from, to, x, sum, 2, 4); break;
    case 24: gather_vectors(s, from, to, x, sum, 3, 2); break;
    case 32: gather_vectors(s, from, to, x, sum, 4, 2); break;
    case 40: gather_vectors(s, from, to, x, sum, 5, 1); break;
    case 48: gather_vectors(s, from, to, x, sum, 6, 1); break;
    case 56: gather_vectors(s, from, to, x, sum, 7, 1); break;
    default: gather_vectors(s, from, to, x, sum, 8, 1);
    }
}

/* sum[column[i] - low, t] += value[i] * x[t]; no column comes twice, but for some zeros. */
VECTORS static void scatter(const int32_t *restrict column, const float *restrict value,
                            int64_t count, const float *restrict x, int64_t tokens, int64_t low,
                            float *restrict sum) {
    if (tokens == 1) {
        for (int64_t i = 0; i < count; i++) sum[column[i] - low] += value[i] * x[0];
    } else if (tokens == 4) {
        four own = *(const four *)x;
        for (int64_t i = 0; i < count; i++) {
            four *place = (four *)(sum + (column[i] - low) * 4);
            *place += value[i] * own;
        }
    } else {
        for (int64_t first = 0; first < tokens; first += 8) {
            eight own = *(const eight *)(x + first);
            for (int64_t i = 0; i < count; i++) {
                eight *place = (eight *)(sum + (column[i] - low) * tokens + first);
                *place += value[i] * own;
            }
        }
    }
}

/* ---- one delta ---- */

static int64_t lanes(int64_t count) { return count <= 1 ? 1 : count <= 4 ? 4 : (count + 7) / 8 * 8; }

/* Memory of one thread. */
typedef struct {
    int32_t *column, *start;
    float *value, *x, *sum;
} room;

/* Groups of a row that one panel holds. In compressed rows they may begin anywhere: about there. */
static int64_t panel_of(const delta *d, int64_t tokens) {
    int64_t apart = d->kind == BLOCKED ? d->block : d->rows * d->columns / larger(d->survivors, 1);
    return larger(PANEL_BYTES / larger(8 * apart * tokens * (int64_t)sizeof(float), 1), 1);
}

/* y[t] += weight * x[t] Δᵀ of the outputs low … high - 1. */
static void add_rows(const request *c, const delta *d, float weight, const tile *of, const float *x,
                     int64_t low, int64_t high, const room *own) {
    part p = part_of(d, 0, c->columns, c->width, own->start);
    int64_t most = (c->width + 7) / 8, tokens = of->width, groups[STRIP];
    int64_t panel = panel_of(d, tokens);
    decoded to = {own->column, own->value};
    for (int64_t row = low; row < high; row += STRIP) {
        strip all = {own->column, own->value, 8 * most, smaller(high - row, STRIP), groups};
        decode_rows(d, row, all.rows, &p, &to, all.stride, groups);
        if (tokens == 1) {
            gather_one(&all, x, own->sum);
        } else {
            memset(own->sum, 0, (size_t)(all.rows * tokens) * sizeof(float));
            for (int64_t first = 0; first < most; first += panel)
                gather(&all, first, first + panel, x, tokens, own->sum);
        }
        add_tile(own->sum, all.rows, weight, of, c->y, (int)c->y_dtype, c->y_stride, row);
    }
}

/* y[t] += weight * x[t] Δ of the outputs low … high - 1. */
static void add_columns(const request *c, const delta *d, float weight, const tile *of,
                        const float *x, int64_t low, int64_t high, const room *own) {
    int64_t panel = panel_of(d, of->width) * 8 * d->block;
    if (d->kind != BLOCKED) panel = high - low;
    decoded to = {own->column, own->value};
    for (int64_t first = low; first < high; first += panel) {
        part p = part_of(d, first, smaller(first + panel, high), c->width, own->start);
        memset(own->sum, 0, (size_t)((p.high - first) * of->width) * sizeof(float));
        for (int64_t row = 0; row < c->rows; row++) {
            int64_t groups;
            decode_rows(d, row, 1, &p, &to, 0, &groups);
            scatter(to.column, to.value, 8 * groups, x + row * of->width, of->width, first, own->sum);
        }
        add_tile(own->sum, p.high - first, weight, of, c->y, (int)c->y_dtype, c->y_stride, first);
    }
}

/* ---- all of it ---- */

static float *aligned(char **memory, int64_t floats) {
    uintptr_t at = ((uintptr_t)*memory + 63) / 64 * 64;
    *memory = (char *)at + floats * (int64_t)sizeof(float);
    return (float *)at;
}

/* For every token t whose slot s has a delta: y[t] += weights[s] * x[t] Δᵀ, or x[t] Δ where
 * transposed, of the outputs low … high - 1 alone. -1 where there is no memory. */
static int add_outputs(const request *c, int64_t low, int64_t high) {
    int64_t inputs = c->transposed ? c->rows : c->columns, most = lanes(smaller(c->total, TOKENS));
    int64_t width = (c->width + 7) / 8 * 8, each = width * (c->transposed ? 1 : STRIP);
    int64_t sums = (c->transposed ? high - low : STRIP) * most;
    int64_t floats = 2 * each + width + inputs * most + sums + 5 * 16;
    char *memory = malloc((size_t)floats * sizeof(float)), *rest = memory;
    if (!memory) return -1;
    room own;
    own.column = (int32_t *)aligned(&rest, each);
    own.value = aligned(&rest, each);
    own.start = (int32_t *)aligned(&rest, width);
    own.x = aligned(&rest, inputs * most);
    own.sum = aligned(&rest, sums);
    for (int64_t slot = 0; slot < c->count; slot++) {
        const delta *d = c->deltas[slot];
        if (!d) continue;
        for (int64_t next = 0; next < c->total;) {
            int64_t token[TOKENS], n = 0;
            for (; next < c->total && n < TOKENS; next++)
                if (c->token_slot[next] == slot) token[n++] = next;
            if (!n) break;
            tile of = {token, n, lanes(n)};
            const float *x = own.x;
            if (n == 1 && c->x_dtype == FLOAT32) x = (const float *)c->x + token[0] * c->x_stride;
            else load_tile(c->x, (int)c->x_dtype, c->x_stride, &of, inputs, own.x);
            (c->transposed ? add_columns : add_rows)(c, d, c->weights ? c->weights[slot] : 1.0f, &of,
                                                     x, low, high, &own);
        }
    }
    free(memory);
    return 0;
}

/* Outputs shared out among threads: a sum never depends on how many there are. */
typedef struct {
    const request *asked;
    int64_t next;
    int failed;
} job;

static void work(void *shared) {
    job *all = shared;
    const request *c = all->asked;
    int64_t outputs = c->transposed ? c->columns : c->rows, parts = c->threads;
    for (;;) {
        int64_t share = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED);
        if (share >= parts) return;
        int64_t low = outputs * share / parts / TOGETHER * TOGETHER;
        int64_t high = outputs * (share + 1) / parts / TOGETHER * TOGETHER;
        if (share + 1 == parts) high = outputs;
        if (low < high && add_outputs(c, low, high)) __atomic_store_n(&all->failed, 1, __ATOMIC_RELAXED);
    }
}

static void *work_of_thread(void *shared) {
    work(shared);
    return NULL;
}

/* GOMP_parallel of the OpenMP that PyTorch runs on, whose threads are awake; or NULL. */
typedef void (*fork_join)(void (*function)(void *), void *data, unsigned threads, unsigned flags);

/* The products that are asked for, by at most `threads` threads. -1 where there is no memory. */
EXPORT int dare_products(const request *asked, fork_join parallel, unsigned team) {
    job all = {asked, 0, 0};
    if (asked->threads > 1 && parallel) {
        parallel(work, &all, team, 0);
    } else if (asked->threads > 1) {
        pthread_t others[MOST_THREADS];
        int64_t started = 0;
        while (started < smaller(asked->threads, MOST_THREADS) - 1 &&
               !pthread_create(others + started, NULL, work_of_thread, &all)) started++;
        work(&all);
        for (int64_t i = 0; i < started; i++) pthread_join(others[i], NULL);
    } else {
        work(&all);
    }
    return all.failed ? -1 : 0;
}
