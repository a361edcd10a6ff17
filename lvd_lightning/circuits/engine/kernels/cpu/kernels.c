/* Fused passes over the units of a circuit: what PyTorch does in many operations on large arrays, fold by fold.

   Compiled once for -DREAL=float -DBITS=uint32_t and once for -DREAL=double -DBITS=uint64_t. Shapes: F folded nodes, H outer units, K inner units,
   B batch, S categories, P parameter rows, Y alternatives of a row. The structs are mirrored in passes.py and
   updates.py.

   Examples come in blocks of WIDTH columns; the last block is filled up with examples of value 1. Units are rows: the
   numbers of a block are contiguous, unit after unit, so that those of a fold fit the first caches.
   Work is cut into items that write to different places and are computed in one fixed order each: results do not depend
   on the number of threads. */

#include <stdint.h>
#include <string.h>

typedef REAL real;
typedef BITS Bits; /* an unsigned integer of equal size */

enum { GRAIN = 32768, WIDTH = 64, BLOCKS_AT_ONCE = 4 };
enum { FRACTION = sizeof(real) == 4 ? 23 : 52, BIAS = sizeof(real) == 4 ? 127 : 1023 }; /* of IEEE numbers */
static const real SMALLEST = (real)1e-30; /* of distributions.py */
static const real TINY = (real)(sizeof(real) == 4 ? 1e-30 : 1e-280); /* of layers.py */

/* ---- threads: the pool of the OpenMP runtime that PyTorch has loaded ---- */

typedef void (*Parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
static Parallel parallel = 0;
static int (*thread_number)(void) = 0;

void set_parallel(void *start, void *number) {
    parallel = (Parallel)start;
    thread_number = (int (*)(void))number;
}

typedef void (*Run)(const void *job, int64_t item, real *scratch);

enum { MAX_THREADS = 256 };

typedef struct {
    Run run;
    const void *job;
    int64_t count, threads, scratch_size;
    real *scratch; /* scratch_size numbers for every thread */
    struct {
        int64_t next, stop, apart[6];
    } share[MAX_THREADS];
} Items;

/* A thread takes the items of its own share, the same in every pass, so that it finds their numbers in its caches; then
   what others have left. */
static void take_items(void *data) {
    Items *items = data;
    const int64_t own = items->threads > 1 ? thread_number() : 0;
    for (int64_t i = 0; i < items->threads; i++) {
        const int64_t other = (own + i) % items->threads;
        for (;;) {
            const int64_t item = __atomic_fetch_add(&items->share[other].next, 1, __ATOMIC_RELAXED);
            if (item >= items->share[other].stop) break;
            items->run(items->job, item, items->scratch + own * items->scratch_size);
        }
    }
}

/* `size`: numbers that all items touch together; less than GRAIN is not worth waking threads. */
static void run_items(Run run, const void *job, int64_t count, int64_t size, int threads, real *scratch,
                      int64_t scratch_size) {
    Items items;
    if (threads > count) threads = (int)count;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads < 1 || size < GRAIN || !parallel || !thread_number) threads = 1;
    items.run = run, items.job = job, items.count = count, items.threads = threads;
    items.scratch = scratch, items.scratch_size = scratch_size;
    for (int64_t t = 0; t < threads; t++) {
        items.share[t].next = t * count / threads;
        items.share[t].stop = (t + 1) * count / threads;
    }
    if (threads > 1)
        parallel(take_items, &items, (unsigned)threads, 0);
    else
        take_items(&items);
}

/* ---- products of small matrices ---- */

#if defined(__AVX512F__)
enum { BYTES = 64, TILE = 8 };
#elif defined(__AVX__)
enum { BYTES = 32, TILE = 4 };
#else
enum { BYTES = 16, TILE = 4 };
#endif
enum { LANES = BYTES / sizeof(real), STRIP = 2 * LANES };
typedef real vec __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));

/* rows x STRIP numbers of A B, with A (rows, depth) at any strides and B (depth, STRIP): written to `out`, or added to
   its first `columns` columns. */
static inline __attribute__((always_inline)) void tile(int rows, const real *a, int64_t a_row, int64_t a_step,
                                                       const real *b, int64_t b_step, int64_t depth, real *out,
                                                       int64_t out_row, int add, int64_t columns) {
    vec sum[TILE][2];
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = (vec){0};
    for (int64_t k = 0; k < depth; k++) {
        const vec left = *(const vec *)(b + k * b_step), right = *(const vec *)(b + k * b_step + LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const real factor = a[r * a_row + k * a_step];
            sum[r][0] += factor * left;
            sum[r][1] += factor * right;
        }
    }
    for (int r = 0; r < rows; r++) {
        real *place = out + r * out_row;
        if (!add) {
            *(vec *)place = sum[r][0];
            *(vec *)(place + LANES) = sum[r][1];
        } else if (columns >= STRIP) {
            *(vec *)place += sum[r][0];
            *(vec *)(place + LANES) += sum[r][1];
        } else {
            for (int64_t c = 0; c < columns; c++) place[c] += sum[r][c / LANES][c % LANES];
        }
    }
}

/* out = A B or, with `add`, out += A B: A (m, depth), B (depth, n); without `add`, n is a multiple of STRIP. */
static void multiply(int64_t m, int64_t n, int64_t depth, const real *a, int64_t a_row, int64_t a_step, const real *b,
                     int64_t b_step, real *out, int64_t out_row, int add) {
    for (int64_t c = 0; c < n; c += STRIP) {
        int64_t r = 0;
        for (; r + TILE <= m; r += TILE)
            tile(TILE, a + r * a_row, a_row, a_step, b + c, b_step, depth, out + r * out_row + c, out_row, add, n - c);
        for (; r + 2 <= m; r += 2)
            tile(2, a + r * a_row, a_row, a_step, b + c, b_step, depth, out + r * out_row + c, out_row, add, n - c);
        for (; r < m; r++)
            tile(1, a + r * a_row, a_row, a_step, b + c, b_step, depth, out + r * out_row + c, out_row, add, n - c);
    }
}

/* ---- products with sparse matrices, on blocks of WIDTH columns ---- */

enum { VECS = WIDTH / LANES, CHAINS = VECS >= 8 ? 1 : 2 }; /* sums in flight hide the time that an addition takes */

/* out (rows, WIDTH) = A B: row r of A has the numbers value[start[r] - start[0]...], or those at `place` of them, in the
   columns `column`. */
static inline __attribute__((always_inline)) void multiply_edges(int64_t rows, const int64_t *start,
                                                                 const uint16_t *column, const int32_t *place,
                                                                 const real *value, const real *b, real *out) {
    for (int64_t r = 0; r < rows; r++) {
        vec sum[CHAINS][VECS];
        for (int i = 0; i < CHAINS; i++)
            for (int j = 0; j < VECS; j++) sum[i][j] = (vec){0};
        int64_t e = start[r];
        for (; e + CHAINS <= start[r + 1]; e += CHAINS)
#pragma GCC unroll 2
            for (int i = 0; i < CHAINS; i++) {
                const real factor = value[place ? place[e + i] : e + i - start[0]];
                const real *from = b + (int64_t)column[e + i] * WIDTH;
#pragma GCC unroll 32
                for (int j = 0; j < VECS; j++) sum[i][j] += factor * *(const vec *)(from + j * LANES);
            }
        for (; e < start[r + 1]; e++) {
            const real factor = value[place ? place[e] : e - start[0]];
            const real *from = b + (int64_t)column[e] * WIDTH;
#pragma GCC unroll 32
            for (int j = 0; j < VECS; j++) sum[0][j] += factor * *(const vec *)(from + j * LANES);
        }
#pragma GCC unroll 32
        for (int j = 0; j < VECS; j++) *(vec *)(out + r * WIDTH + j * LANES) = sum[0][j] + sum[CHAINS - 1][j] * (CHAINS > 1);
    }
}

typedef real four __attribute__((vector_size(4 * sizeof(real)), aligned(sizeof(real)), may_alias));
#if defined(__clang__)
#define PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t four_int32 __attribute__((vector_size(16)));
typedef int64_t four_int64 __attribute__((vector_size(32)));
#define PICK(a, b, i, j, k, l) \
    __builtin_shuffle(a, b, __builtin_choose_expr(sizeof(real) == 4, (four_int32){i, j, k, l}, (four_int64){i, j, k, l}))
#endif

/* Add the sums of the lanes of four vectors to four numbers. */
static inline __attribute__((always_inline)) void add_lanes(const vec *part, real *out) {
    real all[4][LANES];
    memcpy(all, part, sizeof all);
    if (LANES < 4) {
        for (int i = 0; i < 4; i++)
            for (int lane = 0; lane < LANES; lane++) out[i] += all[i][lane];
        return;
    }
    four sum[4];
    for (int i = 0; i < 4; i++) {
        sum[i] = *(const four *)all[i];
        for (int lane = 4; lane < LANES; lane += 4) sum[i] += *(const four *)(all[i] + lane);
    }
    const four ab = PICK(sum[0], sum[1], 0, 4, 1, 5) + PICK(sum[0], sum[1], 2, 6, 3, 7);
    const four xy = PICK(sum[2], sum[3], 0, 4, 1, 5) + PICK(sum[2], sum[3], 2, 6, 3, 7);
    *(four *)out += PICK(ab, xy, 0, 1, 4, 5) + PICK(ab, xy, 2, 3, 6, 7);
}

/* out[e] += the product of row r of A and row column[e] of B, for the edges e of every row r, over `blocks` blocks. */
static inline __attribute__((always_inline)) void add_products(int64_t rows, const int64_t *start,
                                                               const uint16_t *column, const real *a, int64_t a_block,
                                                               const real *b, int64_t b_block, int blocks, real *out) {
    for (int64_t r = 0; r < rows; r++) {
        vec left[BLOCKS_AT_ONCE][VECS];
        for (int k = 0; k < blocks; k++)
            for (int j = 0; j < VECS; j++) left[k][j] = *(const vec *)(a + k * a_block + r * WIDTH + j * LANES);
        for (int64_t e = start[r]; e < start[r + 1]; e += 4) {
            const int count = start[r + 1] - e < 4 ? (int)(start[r + 1] - e) : 4;
            vec part[4];
            real found[4] = {0};
            for (int i = 0; i < 4; i++) {
                const real *right = b + (int64_t)column[e + (i < count ? i : 0)] * WIDTH;
                vec sum[BLOCKS_AT_ONCE];
#pragma GCC unroll 4
                for (int k = 0; k < blocks; k++) {
                    sum[k] = left[k][0] * *(const vec *)(right + k * b_block);
#pragma GCC unroll 32
                    for (int j = 1; j < VECS; j++) sum[k] += left[k][j] * *(const vec *)(right + k * b_block + j * LANES);
                }
                part[i] = sum[0];
                for (int k = 1; k < blocks; k++) part[i] += sum[k];
            }
            add_lanes(part, found);
            for (int i = 0; i < count; i++) out[e - start[0] + i] += found[i];
        }
    }
}

/* `in` (rows, WIDTH) to `out` (WIDTH, padded), filled up with 0. */
static void transpose(const real *restrict in, int64_t rows, real *restrict out, int64_t padded) {
    const int64_t whole = rows / 4 * 4;
    for (int64_t c = 0; c < WIDTH; c += 4) {
        for (int64_t r = 0; r < whole; r += 4) {
            const real *place = in + r * WIDTH + c;
            const four a = *(const four *)place, b = *(const four *)(place + WIDTH);
            const four x = *(const four *)(place + 2 * WIDTH), y = *(const four *)(place + 3 * WIDTH);
            const four ab = PICK(a, b, 0, 4, 1, 5), xy = PICK(x, y, 0, 4, 1, 5);
            const four ab2 = PICK(a, b, 2, 6, 3, 7), xy2 = PICK(x, y, 2, 6, 3, 7);
            real *to = out + c * padded + r;
            *(four *)to = PICK(ab, xy, 0, 1, 4, 5);
            *(four *)(to + padded) = PICK(ab, xy, 2, 3, 6, 7);
            *(four *)(to + 2 * padded) = PICK(ab2, xy2, 0, 1, 4, 5);
            *(four *)(to + 3 * padded) = PICK(ab2, xy2, 2, 3, 6, 7);
        }
    }
    for (int64_t r = whole; r < padded; r++)
        for (int64_t c = 0; c < WIDTH; c++) out[c * padded + r] = r < rows ? in[r * WIDTH + c] : 0;
}

/* ---- forward and backward pass ---- */

typedef struct { /* input nodes: a table of probabilities or, with `values`, discretised logistic distributions */
    int64_t start, units, size, folds; /* first value row, K, S, F */
    const int32_t *fold, *table_row; /* of every unit, (F * K): its fold; its row of the table as (P * K, S) */
    const real *table; /* (P, K, S); of logistics (mean, 1 / scale, 1 - e^(-1 / scale), (1 / scale) / (e^(1 / scale) - 1)) */
    const int64_t *x; /* (F, B) */
    const real *values; /* (F, B), or null */
    const uint8_t *observed; /* (F, B), or null: all */
    real *table_grad; /* (P, K, S); null: not wanted, or nodes are tied */
    real *rows_grad; /* (F * K, B), for tied nodes */
    const int64_t *circuit; /* (F) */
    int32_t *shift; /* (F, B): 2 to this power times p(x | unit) is what units of logistics have */
    real *largest; /* (F, B): the largest of these among the units that are read, of logistics */
    double *sums; /* (F * K, SUMS), of logistics; or null */
    double last; /* value of logistics */
} Leaf;

typedef struct { /* sum nodes of one shape and level; value rows are those of plan.py */
    int64_t folds, outer, units; /* F, H, K */
    int64_t first_edge, first_row, first_node; /* places of fold 0 in `inner`, in `sums` and `scaled`, in `peaks` */
    const int64_t *parameter_rows, *grad_rows; /* (F) */
    const real *weight; /* (P, H, K), or of live edges alone */
    real *weight_grad; /* (., H, K), or of live edges; or null */
    const int64_t *edge_start; /* (F H + 1): where the live edges of every row start; null: all edges are stored */
    const uint16_t *edge_column;
    const int64_t *by_column_start; /* (F K + 1): the same edges by inner unit; their rows, and places in the fold */
    const uint16_t *by_column_row;
    const int32_t *by_column_place;
    const int32_t *factor_start, *factor; /* value rows that inner row n is the product of; none: it is 0 */
    const int32_t *target_start; /* (F + 1): value rows that fold f reads, and the inner rows that read each of them */
    const int32_t *target, *source_start, *source;
} Layer;

typedef struct {
    int64_t batch, blocks, first_sum, num_sums, num_edges, num_nodes, num_leaves, num_layers, scratch_size;
    int64_t num_circuits, num_heads;
    const Leaf *leaves;
    const Layer *layers;
    const int64_t *circuit_of_node;
    const int64_t *columns; /* (num_circuits): how many of the first examples each computes, by whole blocks; null: all */
    const int64_t *head_rows; /* (num_circuits * num_heads), value rows; below first_sum: the circuit has fewer heads */
    real *sums, *scaled; /* (blocks, num_sums, WIDTH): values; their gradients divided by the values */
    real *inner; /* (blocks, num_edges, WIDTH), products divided by the largest of each node; null: no backward pass */
    real *peaks; /* (blocks, num_nodes, WIDTH): what they were divided by */
    real *lowest; /* (blocks, num_nodes, WIDTH): the smallest sum among factors */
    real *scratch; /* scratch_size numbers for every thread */
} Space;

typedef struct {
    const Space *space;
    const Layer *layer;
    const Leaf *leaf;
} Pass;

static const Leaf *leaf_of(const Space *space, int64_t row) {
    const Leaf *leaf = space->leaves + space->num_leaves - 1;
    while (row < leaf->start) leaf--;
    return leaf;
}

static int64_t columns_of(const Space *space, int64_t block) {
    const int64_t left = space->batch - block * WIDTH;
    return left < WIDTH ? left : WIDTH;
}

/* How many of the first blocks a circuit computes. */
static int64_t blocks_of(const Space *space, int64_t circuit) {
    return space->columns ? (space->columns[circuit] + WIDTH - 1) / WIDTH : space->blocks;
}

/* Gradients are divided by sums, which may be 0. */
static real positive(real value) {
    const real tiny = sizeof(real) == 4 ? (real)1.17549435e-38 : (real)2.2250738585072014e-308;
    return value < tiny ? tiny : value;
}

/* ---- discretised logistic distributions: see logistic.py ---- */

typedef Bits bits __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));

/* Of two vectors, `a` in the lanes of a comparison that holds and `b` in the others. */
#define PICK_LANES(holds, a, b) ((vec)(((bits)(holds) & (bits)(a)) | (~(bits)(holds) & (bits)(b))))

enum { FEW = 30, SUMS = 4, DEGREE = sizeof(real) == 4 ? 7 : 13 };

/* e^y for y <= 0; 0 where that is below the normal numbers. */
static inline __attribute__((always_inline)) real exp_negative(real y) {
    static const real part[] = {1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320,
                                1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
    const real log2_e = (real)1.4426950408889634, lowest = sizeof(real) == 4 ? (real)-87.3 : (real)-708.3;
    const real high = (real)(sizeof(real) == 4 ? 0.693359375 : 0.693147180369123816490);
    const real low = (real)(sizeof(real) == 4 ? -2.12194440054690583e-4 : 1.90821492927058770002e-10);
    const real shift = (real)1.5 * (real)((Bits)1 << FRACTION); /* added, it rounds to whole numbers in the last bits */
    const real clamped = y < lowest ? lowest : y, shifted = clamped * log2_e + shift, whole = shifted - shift;
    const real rest = (clamped - whole * high) - whole * low;
    real sum = part[DEGREE], power;
    Bits bits;
    for (int i = DEGREE - 1; i >= 0; i--) sum = sum * rest + part[i];
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << FRACTION) + ((Bits)BIAS << FRACTION);
    memcpy(&power, &bits, sizeof bits);
    return y < lowest ? 0 : sum * power;
}

/* Values of a block of examples, filled up with 0. */
static void read_values(const Leaf *leaf, int64_t place, int64_t n, real *restrict x) {
    memcpy(x, leaf->values + place, n * sizeof(real));
    for (int64_t c = n; c < WIDTH; c++) x[c] = 0;
}

/* Powers of 2 of a block of examples as exponents of e, filled up with 0. */
static void read_shifts(const Leaf *leaf, int64_t place, int64_t n, real *restrict nats) {
    for (int64_t c = 0; c < n; c++) nats[c] = (real)leaf->shift[place + c] * (real)0.6931471805599453;
    for (int64_t c = n; c < WIDTH; c++) nats[c] = 0;
}

/* s(b) s(-a) (1 - e^(a - b)), with the edges a and b of the value's bin and the sigmoid s, times e^nats. That is 1 but
   for values in the tails of all units, where one of both sigmoids is the exponential. */
static void logistic(const real *restrict params, real last, const real *restrict x, const real *restrict nats,
                     real *restrict out) {
    const real mean = params[0], inverse = params[1], between = params[2];
    for (int c = 0; c < WIDTH; c++) {
        const real centre = x[c] - mean, a = (centre - (real)0.5) * inverse, b = (centre + (real)0.5) * inverse;
        const real ea = exp_negative(a > 0 ? nats[c] - a : a), eb = exp_negative(b < 0 ? nats[c] + b : -b);
        const int has_low = x[c] > 0, has_high = x[c] < last, is_tail = nats[c] > 0;
        const real left = has_low ? (a > 0 ? ea : 1) : 1, right = has_high ? (b < 0 ? eb : 1) : 1;
        const real below = has_low ? 1 + (is_tail ? 0 : ea) : 1, above = has_high ? 1 + (is_tail ? 0 : eb) : 1;
        out[c] = left * right * (has_low & has_high ? between : 1) / (below * above);
    }
}

/* Add the sums of g, g w, g E[r z | x] and g E[r z^2 | x] over a block of examples with the gradients g. */
static void add_scores(const real *restrict params, real last, const real *restrict x, const real *restrict grad,
                       double *restrict out) {
    const real mean = params[0], inverse = params[1], within = params[3];
    real flow = 0, weight = 0, first = 0, second = 0;
#pragma omp simd reduction(+ : flow, weight, first, second)
    for (int c = 0; c < WIDTH; c++) {
        const real centre = x[c] - mean, a = (centre - (real)0.5) * inverse, b = (centre + (real)0.5) * inverse;
        const real ea = exp_negative(a < 0 ? a : -a), eb = exp_negative(b < 0 ? b : -b);
        const int has_low = x[c] > 0, has_high = x[c] < last;
        const real above = has_low ? (a > 0 ? 1 : ea) / (1 + ea) : 0, below = has_high ? (b < 0 ? 1 : eb) / (1 + eb) : 0;
        const real up = has_low ? (a > 0 ? a : 0) : 0, down = has_high ? (b < 0 ? -b : 0) : 0;
        const real z = up + down, e = up > 0 ? ea : eb, z2 = z * z; /* the nearest edge of a bin that 0 is not in */
        const real near = (real)0.5 - z2 * ((real)(1.0 / 24) - z2 * ((real)(1.0 / 240) - z2 * ((real)(17.0 / 40320) - z2 * (real)(31.0 / 725760))));
        const real precision = z < (real)0.1 ? near : (1 - e) / ((1 + e) * z); /* tanh(z / 2) / z */
        flow += grad[c];
        weight += grad[c] * precision;
        first += grad[c] * (above - below);
        second += grad[c] * (1 + a * above - b * below - (has_low & has_high ? within : 0));
    }
    out[0] += flow, out[1] += weight, out[2] += first, out[3] += second;
}

/* p(x | unit) of a block of examples. */
static void look_up(const Space *space, int64_t row, int64_t block, real *restrict out) {
    const Leaf *leaf = leaf_of(space, row);
    const real *restrict table = leaf->table + leaf->table_row[row - leaf->start] * leaf->size;
    const int64_t n = columns_of(space, block), place = leaf->fold[row - leaf->start] * space->batch + block * WIDTH;
    if (leaf->values) {
        real x[WIDTH], nats[WIDTH];
        read_values(leaf, place, n, x);
        read_shifts(leaf, place, n, nats);
        logistic(table, (real)leaf->last, x, nats, out);
    } else {
        const int64_t *restrict x = leaf->x + place;
        for (int64_t c = 0; c < n; c++) {
            int64_t i = x[c];
            __asm__("" : "+r"(i)); /* one by one: gather instructions are slower */
            out[c] = table[i];
        }
    }
    if (leaf->observed)
        for (int64_t c = 0; c < n; c++) out[c] = leaf->observed[place + c] ? out[c] : 1;
    for (int64_t c = n; c < WIDTH; c++) out[c] = 1;
    if (leaf->values) {
        real *restrict largest = leaf->largest + place;
        for (int64_t c = 0; c < n; c++) largest[c] = out[c] > largest[c] ? out[c] : largest[c];
    }
}

/* The product of the rows that an inner unit reads; `lowest` follows the smallest sum among them. */
static void multiply_factors(const Space *space, const Layer *layer, int64_t unit, int64_t block, real *restrict out,
                             real *restrict lowest) {
    const real *sums = space->sums + (block * space->num_sums - space->first_sum) * WIDTH;
    const int32_t start = layer->factor_start[unit], stop = layer->factor_start[unit + 1];
    real looked_up[WIDTH];
    if (start == stop) memset(out, 0, WIDTH * sizeof(real));
    for (int32_t i = start; i < stop; i++) {
        const int64_t row = layer->factor[i];
        if (row >= space->first_sum) {
            const real *restrict sum = sums + row * WIDTH;
            for (int c = 0; c < WIDTH; c++) lowest[c] = sum[c] < lowest[c] ? sum[c] : lowest[c];
            if (i == start)
                memcpy(out, sum, WIDTH * sizeof(real));
            else
                for (int c = 0; c < WIDTH; c++) out[c] *= sum[c];
        } else if (i == start) {
            look_up(space, row, block, out);
        } else {
            look_up(space, row, block, looked_up);
            for (int c = 0; c < WIDTH; c++) out[c] *= looked_up[c];
        }
    }
}

/* Where the weights of a fold start. */
static int64_t first_weight(const Layer *layer, int64_t fold) {
    if (layer->edge_start) return layer->edge_start[fold * layer->outer];
    return layer->parameter_rows[fold] * layer->outer * layer->units;
}

/* One fold and one block: inner units, which are products divided by the largest of them, and their weighted sums. */
static void forward_item(const void *job, int64_t item, real *scratch) {
    const Space *space = ((const Pass *)job)->space;
    const Layer *layer = ((const Pass *)job)->layer;
    const int64_t fold = item / space->blocks, block = item % space->blocks, units = layer->units;
    const int64_t edge = block * space->num_edges + layer->first_edge + fold * units;
    const int64_t node = block * space->num_nodes + layer->first_node + fold;
    real *restrict inner = space->inner ? space->inner + edge * WIDTH : scratch;
    real *restrict peak = space->peaks + node * WIDTH, *restrict lowest = space->lowest + node * WIDTH;
    real *out = space->sums + (block * space->num_sums + layer->first_row + fold * layer->outer) * WIDTH;
    real inverse[WIDTH];
    for (int c = 0; c < WIDTH; c++) lowest[c] = (real)__builtin_inff();
    if (block >= blocks_of(space, space->circuit_of_node[layer->first_node + fold])) {
        for (int c = 0; c < WIDTH; c++) peak[c] = 1;
        for (int64_t i = 0; i < layer->outer * WIDTH; i++) out[i] = 1;
        return;
    }
    for (int c = 0; c < WIDTH; c++) peak[c] = 0;
    for (int64_t k = 0; k < units; k++) {
        real *restrict product = inner + k * WIDTH;
        multiply_factors(space, layer, fold * units + k, block, product, lowest);
        for (int c = 0; c < WIDTH; c++) peak[c] = product[c] > peak[c] ? product[c] : peak[c];
    }
    for (int c = 0; c < WIDTH; c++) peak[c] = peak[c] < TINY ? 1 : peak[c]; /* nothing to scale: see linear.py */
    for (int c = 0; c < WIDTH; c++) inverse[c] = 1 / peak[c];
    for (int64_t k = 0; k < units; k++)
        for (int c = 0; c < WIDTH; c++) inner[k * WIDTH + c] *= inverse[c];
    const real *weight = layer->weight + first_weight(layer, fold);
    if (layer->edge_start)
        multiply_edges(layer->outer, layer->edge_start + fold * layer->outer, layer->edge_column, 0, weight, inner, out);
    else
        multiply(layer->outer, WIDTH, units, weight, units, 1, inner, WIDTH, out, WIDTH, 0);
}

/* One fold of logistics: where a value lies far out in the tails of all units, how far it does from the nearest one. */
static void shift_item(const void *job, int64_t fold, real *scratch) {
    const Pass *pass = job;
    const Leaf *leaf = pass->leaf;
    const int64_t batch = pass->space->batch;
    const real last = (real)leaf->last;
    (void)scratch;
    for (int64_t block = 0; block < blocks_of(pass->space, leaf->circuit[fold]); block++) {
        const int64_t n = columns_of(pass->space, block), place = fold * batch + block * WIDTH;
        real x[WIDTH], nearest[WIDTH], no_low[WIDTH], no_high[WIDTH]; /* 0: no tail, for all beyond counts as well */
        read_values(leaf, place, n, x);
        memset(leaf->largest + place, 0, n * sizeof(real));
        for (int c = 0; c < WIDTH; c++) {
            nearest[c] = (real)1e30;
            no_low[c] = x[c] <= 0 ? 0 : 1;
            no_high[c] = x[c] >= last ? 0 : 1;
        }
        for (int64_t unit = fold * leaf->units; unit < (fold + 1) * leaf->units; unit++) {
            const real *restrict params = leaf->table + leaf->table_row[unit] * leaf->size;
            const real mean = params[0], inverse = params[1];
            for (int c = 0; c < WIDTH; c += LANES) { /* by hand: as a loop over columns it had branches */
                const vec centre = *(vec *)(x + c) - mean, least = *(vec *)(nearest + c);
                const bits is_above = (bits)(centre > 0);
                const vec distance = (PICK_LANES(is_above, centre, -centre) - (real)0.5) * inverse;
                const vec out = distance * PICK_LANES(is_above, *(vec *)(no_low + c), *(vec *)(no_high + c));
                *(vec *)(nearest + c) = PICK_LANES(out < least, out, least);
            }
        }
        for (int64_t c = 0; c < n; c++) {
            const real power = nearest[c] * (real)1.4426950408889634;
            const int is_far = power > FEW && power < (real)1e9;
            leaf->shift[place + c] = is_far && (!leaf->observed || leaf->observed[place + c]) ? (int32_t)power : 0;
        }
    }
}

void forward(const Space *space, int threads) {
    for (const Leaf *leaf = space->leaves; leaf < space->leaves + space->num_leaves; leaf++) {
        const Pass pass = {space, 0, leaf};
        if (leaf->values)
            run_items(shift_item, &pass, leaf->folds, leaf->folds * leaf->units * space->batch, threads, 0, 0);
    }
    for (const Layer *layer = space->layers; layer < space->layers + space->num_layers; layer++) {
        const Pass pass = {space, layer, 0};
        run_items(forward_item, &pass, layer->folds * space->blocks, layer->folds * layer->units * space->batch,
                  threads, space->scratch, space->scratch_size);
    }
}

/* Multiply x 2^exponent by `factor` and keep x within 1..2; correct for normal numbers only. */
static void multiply_apart(const real *restrict factor, real *restrict x, int32_t *restrict exponent) {
    for (int c = 0; c < WIDTH; c++) {
        Bits bits;
        const real product = x[c] * factor[c];
        memcpy(&bits, &product, sizeof bits);
        exponent[c] += (int32_t)(bits >> FRACTION) - BIAS;
        bits = (bits & (((Bits)1 << FRACTION) - 1)) | (Bits)BIAS << FRACTION;
        memcpy(&x[c], &bits, sizeof bits);
    }
}

static real least(const real *restrict value, int64_t n, real lowest) {
#pragma omp simd reduction(min : lowest)
    for (int64_t i = 0; i < n; i++) lowest = value[i] < lowest ? value[i] : lowest;
    return lowest;
}

/* The product of all peaks of each circuit, as `fraction` in 1..2 and `exponent`, both (num_circuits, blocks, WIDTH),
   and the values of all heads, (num_circuits, num_heads, B). Returns the least peak times the least sum. */
double finish(const Space *space, real *fraction, int32_t *exponent, real *heads) {
    const int64_t size = space->blocks * WIDTH;
    const real *lowest = space->lowest;
    real peak = (real)__builtin_inff(), sum = peak;
    for (int64_t i = 0; i < space->num_circuits * size; i++) fraction[i] = 1;
    memset(exponent, 0, space->num_circuits * size * sizeof(int32_t));
    for (int64_t block = 0; block < space->blocks; block++) {
        const real *peaks = space->peaks + block * space->num_nodes * WIDTH;
        for (int64_t node = 0; node < space->num_nodes; node++) {
            const int64_t place = space->circuit_of_node[node] * size + block * WIDTH;
            multiply_apart(peaks + node * WIDTH, fraction + place, exponent + place);
        }
        for (int64_t h = 0; h < space->num_circuits * space->num_heads; h++) {
            const int64_t row = space->head_rows[h] - space->first_sum, n = columns_of(space, block);
            real *out = heads + h * space->batch + block * WIDTH;
            if (row < 0) {
                memset(out, 0, n * sizeof(real));
                continue;
            }
            memcpy(out, space->sums + (block * space->num_sums + row) * WIDTH, n * sizeof(real));
            sum = least(out, n, sum);
        }
    }
    for (const Leaf *leaf = space->leaves; leaf < space->leaves + space->num_leaves; leaf++)
        for (int64_t fold = 0; leaf->values && fold < leaf->folds; fold++)
            for (int64_t i = 0; i < space->batch; i++) exponent[leaf->circuit[fold] * size + i] -= leaf->shift[fold * space->batch + i];
    peak = least(space->peaks, space->blocks * space->num_nodes * WIDTH, peak);
    sum = least(lowest, space->blocks * space->num_nodes * WIDTH, sum);
    return (double)peak * (double)sum;
}

/* ---- what numbers that were too small can have led astray: see error_bound.py ---- */

typedef struct { /* sum nodes of one level, as `Layer` has them, and what they are products of */
    int64_t folds, outer, first_node, first_row, sums_width, inputs_width;
    const int64_t *sums, *inputs; /* (F, sums_width), nodes; (F, inputs_width), rows of `largest_input`; filled with -1 */
    const double *losses; /* (F) */
} Level;

typedef struct {
    const Space *space;
    const Level *level;
    const real *largest_input; /* (L, B) */
    double smallest, *share; /* (blocks, num_nodes, WIDTH): the bound, relative to the largest unit */
    real *largest; /* (blocks, num_nodes, WIDTH): that unit */
} Bound;

static void bound_item(const void *job, int64_t item, real *scratch) {
    const Bound *bound = job;
    const Space *space = bound->space;
    const Level *level = bound->level;
    const int64_t fold = item / space->blocks, block = item % space->blocks, node = level->first_node + fold;
    const int64_t n = columns_of(space, block), first = block * space->num_nodes;
    const real *peak = space->peaks + (first + node) * WIDTH;
    const real *sums = space->sums + (block * space->num_sums + level->first_row + fold * level->outer) * WIDTH;
    real *restrict own = bound->largest + (first + node) * WIDTH;
    double product[WIDTH], sum[WIDTH] = {0}, *restrict share = bound->share + (first + node) * WIDTH;
    (void)scratch;
    if (block >= blocks_of(space, space->circuit_of_node[node])) return;
    for (int c = 0; c < WIDTH; c += LANES) {
        vec most = *(const vec *)(sums + c);
        for (int64_t h = 1; h < level->outer; h++) {
            const vec other = *(const vec *)(sums + h * WIDTH + c);
            most = PICK_LANES(other > most, other, most);
        }
        *(vec *)(own + c) = most;
    }
    for (int c = 0; c < WIDTH; c++) product[c] = 1 / (double)peak[c];
    for (int64_t i = 0; i < level->sums_width; i++) {
        const int64_t child = level->sums[fold * level->sums_width + i];
        if (child < 0) continue;
        const real *restrict largest = bound->largest + (first + child) * WIDTH;
        const double *restrict below = bound->share + (first + child) * WIDTH;
        for (int c = 0; c < WIDTH; c++) product[c] *= positive(largest[c]), sum[c] += below[c];
    }
    for (int64_t i = 0; i < level->inputs_width; i++) {
        const int64_t input = level->inputs[fold * level->inputs_width + i];
        if (input < 0) continue;
        const real *restrict largest = bound->largest_input + input * space->batch + block * WIDTH;
        for (int64_t c = 0; c < n; c++) product[c] *= largest[c];
    }
    for (int c = 0; c < WIDTH; c++)
        share[c] = (product[c] * sum[c] + level->losses[fold] * bound->smallest / peak[c]) / positive(own[c]);
}

/* By how much the heads of circuits may be too small, (num_circuits, B); of their roots, which are nodes. */
void bound_error(const Space *space, const Level *levels, int64_t count, const real *largest_input, double smallest,
                 const int64_t *roots, double *share, real *largest, double *out, int threads) {
    for (const Level *level = levels; level < levels + count; level++) {
        const Bound bound = {space, level, largest_input, smallest, share, largest};
        run_items(bound_item, &bound, level->folds * space->blocks, level->folds * level->outer * space->batch, threads, 0, 0);
    }
    for (int64_t g = 0; g < space->num_circuits; g++)
        for (int64_t b = 0; b < space->batch; b++) {
            const int64_t place = (b / WIDTH * space->num_nodes + roots[g]) * WIDTH + b % WIDTH;
            out[g * space->batch + b] = b / WIDTH < blocks_of(space, g) ? share[place] * positive(largest[place]) : 0;
        }
}

static void scatter(const int64_t *restrict x, const real *restrict value, int64_t n, real *restrict out) {
    for (int64_t c = 0; c < n; c++) out[x[c]] += value[c];
}

/* Flow / parameter; where the parameter is 0 the flow is 0 as well, and so is this gradient by convention. */
static void divide_by(const real *restrict table, int64_t n, real *restrict out) {
    for (int64_t s = 0; s < n; s++) out[s] /= table[s] < SMALLEST ? SMALLEST : table[s];
}

/* Hand the gradient for the log-value of a row on: to the sum below, or to a table. */
static void pass_down(const Space *space, int64_t row, int64_t block, real *restrict grad) {
    if (row >= space->first_sum) {
        const int64_t place = (block * space->num_sums + row - space->first_sum) * WIDTH;
        const real *restrict sum = space->sums + place;
        real *restrict scaled = space->scaled + place;
        for (int c = 0; c < WIDTH; c++) scaled[c] = grad[c] / positive(sum[c]);
        return;
    }
    const Leaf *leaf = leaf_of(space, row);
    const int64_t unit = row - leaf->start, n = columns_of(space, block);
    const int64_t place = leaf->fold[unit] * space->batch + block * WIDTH;
    if (leaf->observed)
        for (int64_t c = 0; c < n; c++) grad[c] = leaf->observed[place + c] ? grad[c] : 0;
    if (leaf->sums) {
        real x[WIDTH];
        read_values(leaf, place, n, x);
        add_scores(leaf->table + leaf->table_row[unit] * leaf->size, (real)leaf->last, x, grad, leaf->sums + unit * SUMS);
    } else if (leaf->table_grad)
        scatter(leaf->x + place, grad, n, leaf->table_grad + leaf->table_row[unit] * leaf->size);
    else if (leaf->rows_grad)
        memcpy(leaf->rows_grad + unit * space->batch + block * WIDTH, grad, n * sizeof(real));
}

/* Gradients for all rows that a fold reads, from examples of blocks low..high. `raw` has those of its inner units,
   divided by them, for these blocks only; `is_last`: no others follow. */
static void pass_all_down(const Space *space, const Layer *layer, int64_t fold, int64_t low, int64_t high, int is_last,
                          const real *restrict raw) {
    real grad[WIDTH];
    for (int32_t t = layer->target_start[fold]; t < layer->target_start[fold + 1]; t++) {
        const int64_t row = layer->target[t];
        const Leaf *leaf = row < space->first_sum ? leaf_of(space, row) : 0;
        const int64_t place = leaf ? leaf->table_row[row - leaf->start] * leaf->size : 0;
        if (low == 0 && leaf && leaf->table_grad)
            memset(leaf->table_grad + place, 0, leaf->size * sizeof(real));
        if (low == 0 && leaf && leaf->sums)
            memset(leaf->sums + (row - leaf->start) * SUMS, 0, SUMS * sizeof(double));
        for (int64_t block = low; block < high; block++) {
            const real *restrict inner = space->inner + (block * space->num_edges + layer->first_edge) * WIDTH;
            const real *restrict raw_block = raw + ((block - low) * layer->units - fold * layer->units) * WIDTH;
            for (int c = 0; c < WIDTH; c++) grad[c] = 0;
            for (int32_t i = layer->source_start[t]; i < layer->source_start[t + 1]; i++) {
                const int64_t unit = layer->source[i];
                for (int c = 0; c < WIDTH; c++) grad[c] += inner[unit * WIDTH + c] * raw_block[unit * WIDTH + c];
            }
            pass_down(space, row, block, grad);
        }
        if (leaf && leaf->table_grad && is_last)
            divide_by(leaf->table + place, leaf->size, leaf->table_grad + place);
    }
}

/* Gradients of the weights of a fold and, divided by its inner units, of these: blocks low..high, all edges stored. */
static void backward_dense(const Space *space, const Layer *layer, int64_t fold, int64_t low, int64_t high,
                           real *restrict raw, real *restrict weight_grad, real *restrict transposed) {
    const int64_t units = layer->units, outer = layer->outer, padded = (units + STRIP - 1) / STRIP * STRIP;
    const real *weight = layer->weight + first_weight(layer, fold);
    for (int64_t block = low; block < high; block++) {
        const real *inner = space->inner + (block * space->num_edges + layer->first_edge + fold * units) * WIDTH;
        const real *scaled = space->scaled + (block * space->num_sums + layer->first_row + fold * outer) * WIDTH;
        multiply(units, WIDTH, outer, weight, 1, units, scaled, WIDTH, raw + (block - low) * units * WIDTH, WIDTH, 0);
        if (!weight_grad) continue;
        transpose(inner, units, transposed, padded);
        multiply(outer, units, WIDTH, scaled, WIDTH, 1, transposed, padded, weight_grad, units, 1);
    }
}

/* The same for live edges. */
static void backward_sparse(const Space *space, const Layer *layer, int64_t fold, int64_t low, int64_t high,
                            real *restrict raw, real *restrict weight_grad) {
    const int64_t units = layer->units, outer = layer->outer;
    const int64_t inner_block = space->num_edges * WIDTH, scaled_block = space->num_sums * WIDTH;
    const real *inner = space->inner + low * inner_block + (layer->first_edge + fold * units) * WIDTH;
    const real *scaled = space->scaled + low * scaled_block + (layer->first_row + fold * outer) * WIDTH;
    const real *weight = layer->weight + first_weight(layer, fold);
    const int64_t *start = layer->edge_start + fold * outer;
    for (int64_t block = 0; block < high - low; block++)
        multiply_edges(units, layer->by_column_start + fold * units, layer->by_column_row, layer->by_column_place, weight,
                       scaled + block * scaled_block, raw + block * units * WIDTH);
    if (!weight_grad) return;
    if (high - low == BLOCKS_AT_ONCE) {
        add_products(outer, start, layer->edge_column, scaled, scaled_block, inner, inner_block, BLOCKS_AT_ONCE,
                     weight_grad);
        return;
    }
    for (int64_t block = 0; block < high - low; block++)
        add_products(outer, start, layer->edge_column, scaled + block * scaled_block, 0, inner + block * inner_block, 0,
                     1, weight_grad);
}

/* One fold: gradients of its weights and of all rows that it reads. */
static void backward_item(const void *job, int64_t fold, real *scratch) {
    const Space *space = ((const Pass *)job)->space;
    const Layer *layer = ((const Pass *)job)->layer;
    const int64_t units = layer->units, outer = layer->outer, *start = layer->edge_start;
    real *raw = scratch, *transposed = scratch + BLOCKS_AT_ONCE * units * WIDTH, *weight_grad = 0;
    const int64_t blocks = blocks_of(space, space->circuit_of_node[layer->first_node + fold]);
    if (!blocks) return;
    if (layer->weight_grad && start) {
        weight_grad = layer->weight_grad + first_weight(layer, fold);
        memset(weight_grad, 0, (start[(fold + 1) * outer] - start[fold * outer]) * sizeof(real));
    } else if (layer->weight_grad) {
        weight_grad = layer->weight_grad + layer->grad_rows[fold] * outer * units;
        memset(weight_grad, 0, outer * units * sizeof(real));
    }
    for (int64_t low = 0; low < blocks; low += BLOCKS_AT_ONCE) {
        const int64_t high = low + BLOCKS_AT_ONCE < blocks ? low + BLOCKS_AT_ONCE : blocks;
        if (start)
            backward_sparse(space, layer, fold, low, high, raw, weight_grad);
        else
            backward_dense(space, layer, fold, low, high, raw, weight_grad, transposed);
        pass_all_down(space, layer, fold, low, high, high == blocks, raw);
    }
}

/* From the gradient of all heads, (num_circuits, num_heads, B). */
void backward(const Space *space, const real *grad, int threads) {
    for (int64_t h = 0; h < space->num_circuits * space->num_heads; h++) {
        const int64_t row = space->head_rows[h] - space->first_sum;
        for (int64_t block = 0; row >= 0 && block < space->blocks; block++) {
            const int64_t place = (block * space->num_sums + row) * WIDTH, n = columns_of(space, block);
            const real *from = grad + h * space->batch + block * WIDTH;
            for (int64_t c = 0; c < WIDTH; c++)
                space->scaled[place + c] = c < n ? from[c] / positive(space->sums[place + c]) : 0;
        }
    }
    for (const Layer *layer = space->layers + space->num_layers - 1; layer >= space->layers; layer--) {
        const Pass pass = {space, layer, 0};
        run_items(backward_item, &pass, layer->folds, layer->folds * layer->units * space->batch, threads,
                  space->scratch, space->scratch_size);
    }
}

/* Tied inputs: a parameter row collects from all folds that own it, in their order. */
typedef struct {
    const Leaf *leaf;
    const int64_t *fold_start, *fold; /* the folds of each parameter row */
    real *out; /* (P, K, S) */
    int64_t batch;
} Ties;

static void tied_item(const void *job, int64_t item, real *scratch) {
    const Ties *ties = job;
    const Leaf *leaf = ties->leaf;
    const int64_t row = item / leaf->units, unit = item % leaf->units, batch = ties->batch;
    real *out = ties->out + item * leaf->size;
    (void)scratch;
    memset(out, 0, leaf->size * sizeof(real));
    for (int64_t i = ties->fold_start[row]; i < ties->fold_start[row + 1]; i++) {
        const int64_t fold = ties->fold[i];
        scatter(leaf->x + fold * batch, leaf->rows_grad + (fold * leaf->units + unit) * batch, batch, out);
    }
    divide_by(leaf->table + item * leaf->size, leaf->size, out);
}

void collect_ties(const Leaf *leaf, int64_t rows, const int64_t *fold_start, const int64_t *fold, int64_t batch,
                  real *out, int threads) {
    const Ties ties = {leaf, fold_start, fold, out, batch};
    const int64_t size = leaf->units * (rows * leaf->size + fold_start[rows] * batch);
    run_items(tied_item, &ties, rows * leaf->units, size, threads, 0, 0);
}

/* ---- top-down probabilities through live edges ---- */

typedef struct {
    int64_t outer, units;
    const int64_t *start; /* (F H + 1) */
    const uint16_t *column;
    const real *weight, *from; /* of the edges; (F, H) */
    real *out; /* (F, K) */
} Edges;

static void edges_item(const void *job, int64_t fold, real *scratch) {
    const Edges *edges = job;
    real *restrict out = edges->out + fold * edges->units;
    (void)scratch;
    memset(out, 0, edges->units * sizeof(real));
    for (int64_t r = fold * edges->outer; r < (fold + 1) * edges->outer; r++)
        for (int64_t e = edges->start[r]; e < edges->start[r + 1]; e++)
            out[edges->column[e]] += edges->weight[e] * edges->from[r];
}

/* out[k] = the sum of from[h] times the weight of edge (h, k), for folds that start at `start`. */
void pass_edges(int64_t folds, int64_t outer, int64_t units, const int64_t *start, const uint16_t *column,
                const real *weight, const real *from, real *out, int threads) {
    const Edges edges = {outer, units, start, column, weight, from, out};
    run_items(edges_item, &edges, folds, start[folds * outer] - start[0], threads, 0, 0);
}

/* ---- EM updates: rows of a table, (rows, Y) ---- */

typedef struct {
    int64_t rows, width, rows_per_item;
    const int64_t *starts; /* (rows + 1): rows of unequal length; null: all are `width` long */
    real *theta;
    const real *grad; /* of the loss: minus flow / parameter; null: no new flows */
    const uint8_t *live; /* (rows, Y), or null: all */
    int64_t floor; /* whether positive probabilities stay at SMALLEST or above */
    double step, pseudocount;
    /* Anemone: */
    real *flow; /* moving average */
    const real *scale; /* (rows): (1 - s) N TD; null: average only */
    double momentum, forgotten; /* flows up to `forgotten` become 0; below 0: none do */
    /* A smooth prior: */
    int64_t radius;
    const real *kernel, *inside; /* (radius + 1), null: no prior; (Y), over how much of the kernel lies in the range */
    double share, constant, correction; /* flows are divided by the last one */
    real *scratch; /* 2 (Y + radius) numbers for every thread */
} Update;

/* Add `added` in equal parts to the live ones of n alternatives, and keep the floor. */
static void settle(const Update *update, int64_t n, real *restrict theta, const uint8_t *restrict live, real added) {
    if (added != 0 && live) {
        int64_t count = 0;
        for (int64_t i = 0; i < n; i++) count += live[i];
        const real part = count ? added / (real)count : 0;
        for (int64_t i = 0; i < n; i++) theta[i] += live[i] ? part : 0;
    } else if (added != 0) {
        const real part = added / (real)n;
        for (int64_t i = 0; i < n; i++) theta[i] += part;
    }
    if (update->floor)
        for (int64_t i = 0; i < n; i++) theta[i] = theta[i] > 0 && theta[i] < SMALLEST ? SMALLEST : theta[i];
}

/* (1 - s) theta + s (F + a / |ch|) / (sum F + a). Rows without flow stay; NaN spreads. */
static void em_row(const Update *update, int64_t n, real *restrict theta, const real *restrict grad,
                   const uint8_t *live) {
    const real step = (real)update->step, pseudocount = (real)update->pseudocount;
    real total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) total += -theta[i] * grad[i];
    if (total <= 0) return;
    const real rate = step / positive(total + pseudocount), keep = 1 - step;
    for (int64_t i = 0; i < n; i++) theta[i] = theta[i] * keep - theta[i] * grad[i] * rate;
    settle(update, n, theta, live, rate * pseudocount);
}

/* (s F + TD theta + a / |ch|) / (the sum of that), with F the moving average and TD scaled. Rows without flow stay. */
static void anemone_row(const Update *update, int64_t n, real *restrict theta, const real *restrict grad,
                        const uint8_t *live, real *restrict flow, const real *scale) {
    const real momentum = (real)update->momentum, fresh = (real)(1 - update->momentum), forgotten = (real)update->forgotten;
    if (grad)
        for (int64_t i = 0; i < n; i++) flow[i] = flow[i] * momentum - fresh * theta[i] * grad[i];
    if (grad && forgotten >= 0)
        for (int64_t i = 0; i < n; i++) flow[i] = flow[i] <= forgotten ? 0 : flow[i];
    if (!scale) return;
    real total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) total += flow[i];
    if (total <= 0) return;
    const real step = (real)update->step, pseudocount = (real)update->pseudocount;
    const real weight = positive(step * total + *scale + pseudocount), keep = *scale / weight, rate = step / weight;
    for (int64_t i = 0; i < n; i++) theta[i] = theta[i] * keep + flow[i] * rate;
    settle(update, n, theta, live, pseudocount / weight);
}

/* (s (F + A) + (1 - s) (old + sum A) theta + a / |ch|) / (the sum of that), with A = (share sum F + constant) F * g over
   sum F; `expected` is `old` of Anemone, where a is not multiplied by s. Rows without flow stay. `both` and `source` have
   room for n numbers, and `source` for `radius` zeros on either side of them. */
static void prior_row(const Update *update, int64_t n, real *restrict theta, const real *restrict grad,
                      const real *restrict flow, const real *expected, real *restrict both, real *restrict source) {
    const real step = (real)update->step, pseudocount = (real)update->pseudocount;
    real total = 0;
    if (flow) {
        const real scale = (real)(1 / update->correction);
        for (int64_t i = 0; i < n; i++) both[i] = flow[i] * scale;
    } else {
        for (int64_t i = 0; i < n; i++) both[i] = -theta[i] * grad[i];
    }
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) total += both[i];
    if (total <= 0) return;
    const real amount = (real)update->share * total + (real)update->constant, part = 1 / positive(total);
    for (int64_t i = 0; i < n; i++) source[i] = both[i] * part * update->inside[i];
    for (int64_t i = 0; i < n; i++) both[i] += amount * update->kernel[0] * source[i];
    for (int64_t offset = 1; offset <= update->radius; offset++) {
        const real weight = amount * update->kernel[offset];
        for (int64_t i = 0; i < n; i++) both[i] += weight * (source[i - offset] + source[i + offset]);
    }
    const real old = expected ? *expected : total + pseudocount, added = expected ? pseudocount : step * pseudocount;
    const real scale = (1 - step) * (old + amount), weight = positive(step * (total + amount) + scale + added);
    const real keep = scale / weight, rate = step / weight;
    for (int64_t i = 0; i < n; i++) theta[i] = theta[i] * keep + both[i] * rate;
    settle(update, n, theta, 0, added / weight);
}

static void update_item(const void *job, int64_t item, real *scratch) {
    const Update *update = job;
    if (update->kernel) memset(scratch, 0, 2 * (update->width + update->radius) * sizeof(real));
    const int64_t low = item * update->rows_per_item, stop = low + update->rows_per_item;
    for (int64_t row = low; row < stop && row < update->rows; row++) {
        const int64_t place = update->starts ? update->starts[row] : row * update->width;
        const int64_t n = update->starts ? update->starts[row + 1] - place : update->width;
        const real *grad = update->grad ? update->grad + place : 0;
        const uint8_t *live = update->live ? update->live + place : 0;
        if (update->kernel)
            prior_row(update, n, update->theta + place, grad, update->flow ? update->flow + place : 0,
                      update->scale ? update->scale + row : 0, scratch, scratch + n + update->radius);
        else if (update->flow)
            anemone_row(update, n, update->theta + place, grad, live, update->flow + place,
                        update->scale ? update->scale + row : 0);
        else
            em_row(update, n, update->theta + place, grad, live);
    }
}

void update_table(const Update *update, int threads) {
    const int64_t items = (update->rows + update->rows_per_item - 1) / update->rows_per_item;
    run_items(update_item, update, items, update->rows * update->width, threads, update->scratch,
              update->kernel ? 2 * (update->width + update->radius) : 0);
}
