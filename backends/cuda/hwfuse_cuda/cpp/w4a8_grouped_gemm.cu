// Grouped GEMM of fp8 rows and int4 weights for Hopper (sm_90a).
//
// The product is computed transposed: the weight is the left operand of `wgmma` (64 of its rows,
// from registers, where int4 becomes fp8), the rows of `a` are the right one (from shared memory).
// So the side that a routing makes ragged is the one whose size `wgmma` takes in steps of 8.
//
// A CTA is one thread that copies (the producer) and WARPGROUPS times 4 warps that multiply (the
// consumers).  Between them lies a ring of STAGES in shared memory; a stage is 128 of the
// contracted elements of one *tile*, up to MAX_TILE rows of one expert, and of 64 * WARPGROUPS rows
// of its weight.
//
// Compiled once for each variant, with nothing included.  What a variant, a line of
// cpp_ops/w4a8_grouped_gemm.py, defines:
//   WARPGROUPS           groups of 4 consumer warps, each with 64 rows of the weight
//   STAGES               length of the ring
//   CTAS_PER_SM          how many run on a multiprocessor at a time
//   MIN_TILE, TILE_STEP, MAX_TILE   rows of a tile: MIN_TILE, MIN_TILE + TILE_STEP, ..., MAX_TILE
//   CONSUMER_REGISTERS   0, or what `setmaxnreg` gives to each consumer thread
//   CLUSTER              how many CTAs at most share one tile by splitting the contracted dimension
//   SHORT_K              1: the kernel for K = 256, where a tile stays while weights stream past it

#define DEVICE __device__ __forceinline__

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// The driver's CUtensorMap: opaque, filled on the host.
struct alignas(64) TensorMap {
    u8 bytes[128];
};

// The rows of `a`, once for each size of a tile: a copy moves a whole tile.
struct RowsOfA {
    TensorMap by_tile[(MAX_TILE - MIN_TILE) / TILE_STEP + 1];

    DEVICE const TensorMap* of(int tile) const { return by_tile + (tile - MIN_TILE) / TILE_STEP; }
};

constexpr int GROUP = 128;        // elements of K that share a scale: one stage
constexpr int BLOCK_ROWS = 64;    // rows of the weight in one block: those of one wgmma
constexpr int BLOCK_BYTES = 4224; // 64 x 128 int4, then 64 bfloat16 scales
constexpr int MAX_EXPERTS = 1024;
constexpr int CONSUMERS = 128 * WARPGROUPS;
// setmaxnreg moves registers between whole warpgroups, so the producer is then one, too.
constexpr int THREADS = CONSUMERS + (CONSUMER_REGISTERS ? 128 : 32);
constexpr int TILE_BYTES = MAX_TILE * GROUP;
constexpr int STAGED_ROW = 2 * BLOCK_ROWS + 16; // bytes; the 16 keep stmatrix free of conflicts
constexpr int STAGED_BYTES = MAX_TILE * STAGED_ROW;

static_assert(TILE_STEP % 8 == 0 && MAX_TILE % TILE_STEP == 0 && MIN_TILE % TILE_STEP == 0, "");
static_assert(CLUSTER == 1 || MAX_TILE == 8, "partial sums are one float4");

// A value that the compiler cannot see through, nor compute before its place.
DEVICE int opaque(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// ------------------------------------------------------------------------------------ barriers

DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

DEVICE void barrier_init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra out;\n"
        "bra again;\n"
        "out:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// All threads of one warpgroup; 0 is __syncthreads.
DEVICE void warpgroup_sync(int warpgroup) {
    asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// -------------------------------------------------------------------------------------- copies

DEVICE void copy_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to), "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
}

// A tile's 128 bytes of each row, swizzled; rows past the last of the tensor become 0.
DEVICE void copy_tile(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row)
        : "memory");
}

// A ring of stages: `full` and `empty` are arrays of one mbarrier for each stage.
template <int LENGTH>
struct Ring {
    u32 full, empty, stage = 0, parity = 0;

    DEVICE void wait_full() const { barrier_wait(full + 8 * stage, parity); }
    DEVICE void wait_empty() const { barrier_wait(empty + 8 * stage, parity ^ 1); }
    DEVICE void advance(int steps = 1) {
        stage += steps;
        if (stage >= LENGTH) {
            stage -= LENGTH;
            parity ^= 1;
        }
    }
    // Only after the data was *consumed*: after a load into registers was merely issued, the next
    // copy can overtake it.  Each warp speaks for itself.
    DEVICE void release(u32 used) const {
        if (threadIdx.x % 32 == 0) barrier_arrive(empty + 8 * used);
    }
    // One thread, before all others use it; consumers: how many warps release a stage.
    DEVICE void init(int consumers) const {
        for (int i = 0; i < LENGTH; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, consumers);
        }
    }
};

// ------------------------------------------------------------------------------------- weights

// What one thread holds of a block: the wgmma operand for 4 steps of 32 elements, and the scales
// of the two rows of the weight that it computes.
struct Fragment {
    u32 code[16];
    float scale[2];
};

// Eight int4 to eight fp8.  The fp8 codes 0x00 to 0x08 are 0 to 8 times 2^-9 (subnormals run
// linearly into the first binade), so the magnitude is the byte; the caller multiplies by 2^9.
// A number v is stored as its sign and v or ~v in 3 bits: sign + code is the byte for both signs.
// One byte holds two: bits 7 and 2-0 for row g of 16, bits 6 and 5-3 for row g + 8.
DEVICE void decode(u32 word, u32& low, u32& high) {
    u32 low_sign = (word >> 7) & 0x01010101u;
    u32 high_sign = (word >> 6) & 0x01010101u;
    low = (word & 0x87878787u) + low_sign;
    high = ((word >> 3) & 0x07070707u) + high_sign * 0x81u;
}

DEVICE void load_fragment(Fragment& f, u32 block) {
    const int thread = threadIdx.x % 128;
    u32 word[8], scales;
#pragma unroll
    for (int half = 0; half < 2; half++)
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(word[4 * half]), "=r"(word[4 * half + 1]), "=r"(word[4 * half + 2]),
                       "=r"(word[4 * half + 3])
                     : "r"(block + 2048 * half + 16 * thread));
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(scales) : "r"(block + 4096 + thread / 4 * 4));
    f.scale[0] = __uint_as_float(scales << 16); // a bfloat16 is the upper half of a float
    f.scale[1] = __uint_as_float(scales & 0xffff0000u);
#pragma unroll
    for (int i = 0; i < 8; i++) decode(word[i], f.code[2 * i], f.code[2 * i + 1]);
    // Pinned here: otherwise the compiler moves the conversion behind the wait for the tensor
    // cores, which it should overlap.
#pragma unroll
    for (int i = 0; i < 16; i++) asm volatile("" : "+r"(f.code[i])::"memory");
}

// ---------------------------------------------------------------------------------------- wgmma

// One instruction: d (64 x TILE) = a (64 x 32, registers) * b (32 x TILE) + (ADD ? d : 0).
// Inline PTX numbers its operands, results first, so each size spells out its own list: *_j is that
// of 8 * j columns, 4 registers for each 8.
template <int TILE>
struct Wgmma;

#define OUT(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define OUT_1 OUT(0)
#define OUT_2 OUT_1, OUT(4)
#define OUT_3 OUT_2, OUT(8)
#define OUT_4 OUT_3, OUT(12)
#define OUT_5 OUT_4, OUT(16)
#define OUT_6 OUT_5, OUT(20)
#define OUT_7 OUT_6, OUT(24)
#define OUT_8 OUT_7, OUT(28)
#define OUT_9 OUT_8, OUT(32)
#define OUT_10 OUT_9, OUT(36)
#define OUT_11 OUT_10, OUT(40)
#define OUT_12 OUT_11, OUT(44)
#define OUT_13 OUT_12, OUT(48)
#define OUT_14 OUT_13, OUT(52)
#define OUT_15 OUT_14, OUT(56)
#define OUT_16 OUT_15, OUT(60)
#define OUT_17 OUT_16, OUT(64)
#define OUT_18 OUT_17, OUT(68)
#define OUT_19 OUT_18, OUT(72)
#define OUT_20 OUT_19, OUT(76)

#define LIST_1 "%0, %1, %2, %3"
#define LIST_2 LIST_1 ", %4, %5, %6, %7"
#define LIST_3 LIST_2 ", %8, %9, %10, %11"
#define LIST_4 LIST_3 ", %12, %13, %14, %15"
#define LIST_5 LIST_4 ", %16, %17, %18, %19"
#define LIST_6 LIST_5 ", %20, %21, %22, %23"
#define LIST_7 LIST_6 ", %24, %25, %26, %27"
#define LIST_8 LIST_7 ", %28, %29, %30, %31"
#define LIST_9 LIST_8 ", %32, %33, %34, %35"
#define LIST_10 LIST_9 ", %36, %37, %38, %39"
#define LIST_11 LIST_10 ", %40, %41, %42, %43"
#define LIST_12 LIST_11 ", %44, %45, %46, %47"
#define LIST_13 LIST_12 ", %48, %49, %50, %51"
#define LIST_14 LIST_13 ", %52, %53, %54, %55"
#define LIST_15 LIST_14 ", %56, %57, %58, %59"
#define LIST_16 LIST_15 ", %60, %61, %62, %63"
#define LIST_17 LIST_16 ", %64, %65, %66, %67"
#define LIST_18 LIST_17 ", %68, %69, %70, %71"
#define LIST_19 LIST_18 ", %72, %73, %74, %75"
#define LIST_20 LIST_19 ", %76, %77, %78, %79"

#define WGMMA(TILE, J, A0, A1, A2, A3, B, FLAG)                                                    \
    template <>                                                                                    \
    struct Wgmma<TILE> {                                                                           \
        template <int ADD>                                                                         \
        static DEVICE void run(float (&d)[TILE / 2], const u32* a, u64 b) {                        \
            asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #FLAG ", 0;\n"                   \
                         "wgmma.mma_async.sync.aligned.m64n" #TILE "k32.f32.e4m3.e4m3 {" LIST_##J  \
                         "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", add, 1, 1;\n}"     \
                         : OUT_##J                                                                 \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD));          \
        }                                                                                          \
    };

WGMMA(8, 1, 4, 5, 6, 7, 8, 9)
WGMMA(16, 2, 8, 9, 10, 11, 12, 13)
WGMMA(24, 3, 12, 13, 14, 15, 16, 17)
WGMMA(32, 4, 16, 17, 18, 19, 20, 21)
WGMMA(40, 5, 20, 21, 22, 23, 24, 25)
WGMMA(48, 6, 24, 25, 26, 27, 28, 29)
WGMMA(56, 7, 28, 29, 30, 31, 32, 33)
WGMMA(64, 8, 32, 33, 34, 35, 36, 37)
WGMMA(72, 9, 36, 37, 38, 39, 40, 41)
WGMMA(80, 10, 40, 41, 42, 43, 44, 45)
WGMMA(88, 11, 44, 45, 46, 47, 48, 49)
WGMMA(96, 12, 48, 49, 50, 51, 52, 53)
WGMMA(104, 13, 52, 53, 54, 55, 56, 57)
WGMMA(112, 14, 56, 57, 58, 59, 60, 61)
WGMMA(120, 15, 60, 61, 62, 63, 64, 65)
WGMMA(128, 16, 64, 65, 66, 67, 68, 69)
WGMMA(136, 17, 68, 69, 70, 71, 72, 73)
WGMMA(144, 18, 72, 73, 74, 75, 76, 77)
WGMMA(152, 19, 76, 77, 78, 79, 80, 81)
WGMMA(160, 20, 80, 81, 82, 83, 84, 85)

// 64 x 128 of a weight times 128 x TILE of a tile, begun; the tile is in shared memory as TMA put
// it: rows of 128 bytes, swizzled by 128 bytes, which is what the descriptor says.
template <int TILE>
DEVICE void begin_product(float (&part)[TILE / 2], const Fragment& f, u32 tile) {
    const u64 descriptor = u64((tile >> 4) & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    Wgmma<TILE>::template run<0>(part, f.code, descriptor);
    Wgmma<TILE>::template run<1>(part, f.code + 4, descriptor + 2);
    Wgmma<TILE>::template run<1>(part, f.code + 8, descriptor + 4);
    Wgmma<TILE>::template run<1>(part, f.code + 12, descriptor + 6);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int LENGTH>
DEVICE void end_product(float (&part)[LENGTH]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < LENGTH; i++) asm volatile("" : "+f"(part[i])::"memory");
}

// The sum of one group joins that of all, times its scales.  wgmma keeps about 14 bits within the
// group; across groups this is plain float32.
template <int LENGTH>
DEVICE void add_group(float (&sum)[LENGTH], const float (&part)[LENGTH], const Fragment& f) {
#pragma unroll
    for (int i = 0; i < LENGTH; i++) sum[i] += f.scale[i / 2 % 2] * part[i];
}

template <int LENGTH>
DEVICE void clear(float (&x)[LENGTH]) {
#pragma unroll
    for (int i = 0; i < LENGTH; i++) x[i] = 0.0f;
}

// ------------------------------------------------------------------------------------- results

DEVICE u32 pack_bf16(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Transpose the sums of one warpgroup into [row of the tile][64 columns] of shared memory.
template <int TILE>
DEVICE void stage_results(const float (&sum)[TILE / 2], float factor, u32 staged, int thread) {
    const int warp = thread / 32, lane = thread % 32;
    const u32 to = staged + lane % 8 * STAGED_ROW + warp * 32 + lane / 8 % 2 * 16;
#pragma unroll
    for (int j = 0; j < TILE / 8; j++) {
        u32 first = pack_bf16(sum[4 * j] * factor, sum[4 * j + 1] * factor);
        u32 second = pack_bf16(sum[4 * j + 2] * factor, sum[4 * j + 3] * factor);
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(
                         to + 8 * j * STAGED_ROW),
                     "r"(first), "r"(second)
                     : "memory");
    }
}

struct Vector {
    u32 x, y, z, w;
};

DEVICE Vector load_shared(u32 from) {
    Vector v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from));
    return v;
}

DEVICE void store_global(u16* to, const Vector& v) {
    // With K = 256 and many rows the results are far larger than L2: .cs, last to stay there.
    if constexpr (SHORT_K && MAX_TILE > 32)
        asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y),
                     "r"(v.z), "r"(v.w)
                     : "memory");
    else
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y),
                     "r"(v.z), "r"(v.w)
                     : "memory");
}

// Where a warpgroup's results go: *row* and *column* of the first, rows that belong to the expert.
struct Place {
    u16* out;
    int n, row, rows, column;
};

// Write TILE rows of VECTORS * 8 columns, as many rows at a time as PARTNERS threads can.
template <int TILE, int VECTORS, int PARTNERS>
DEVICE void write_rows(u32 staged, u16* out, const Place& place, int partner) {
    constexpr int STEP = PARTNERS / VECTORS, PASSES = (TILE + STEP - 1) / STEP;
    const int row = partner / VECTORS, vector = partner % VECTORS;
    const u32 from = staged + row * STAGED_ROW + vector * 16;
    u16* to = out + (u64)row * place.n + vector * 8;
    Vector values[PASSES] = {}; // all loads before the first store
#pragma unroll
    for (int i = 0; i < PASSES; i++)
        if (row + i * STEP < place.rows) values[i] = load_shared(from + i * STEP * STAGED_ROW);
#pragma unroll
    for (int i = 0; i < PASSES; i++)
        if (row + i * STEP < place.rows) store_global(to + (u64)i * STEP * place.n, values[i]);
}

template <int TILE>
DEVICE void write_results(const float (&sum)[TILE / 2], float factor, u32 staged,
                          const Place& place, int warpgroup) {
    // Opaque, or addresses would be kept in registers while the tensor cores work.
    const int thread = opaque(threadIdx.x % 128), warp = thread / 32;
    u16* out = place.out + (u64)place.row * place.n + place.column;
    stage_results<TILE>(sum, factor, staged, thread);
    if constexpr (SHORT_K && TILE <= 32) {
        // Each warp writes its own 16 columns: short pieces, but no warp waits for another.
        __syncwarp();
        write_rows<TILE, 2, 32>(staged + warp * 32, out + warp * 16, place, thread % 32);
        __syncwarp(); // before the next results are staged
    } else {
        warpgroup_sync(warpgroup);
        write_rows<TILE, 8, 128>(staged, out, place, thread);
        warpgroup_sync(warpgroup);
    }
}

// -------------------------------------------------------------------------------------- schedule

// What every thread of a CTA knows about the call's routing; in shared memory.
struct Schedule {
    int first_row[MAX_EXPERTS + 1];
    int first_tile[MAX_EXPERTS + 1];
    int num_experts;

    DEVICE int rows_of(int expert) const { return first_row[expert + 1] - first_row[expert]; }
    DEVICE int tiles_of(int expert) const { return (rows_of(expert) + MAX_TILE - 1) / MAX_TILE; }
    DEVICE int num_tiles() const { return first_tile[num_experts]; }

    // Rows of an expert's tiles: as even as the step allows, so that 161 rows are not 160 and 1.
    DEVICE int tile_rows(int expert) const {
        if (MIN_TILE == MAX_TILE) return MAX_TILE;
        const int tiles = tiles_of(expert);
        const int rows = tiles ? (rows_of(expert) + tiles - 1) / tiles : 0;
        return (rows + TILE_STEP - 1) / TILE_STEP * TILE_STEP;
    }

    // All threads of the CTA.
    DEVICE void build(const int* expert_offsets, int experts) {
        if (threadIdx.x == 0) num_experts = experts;
        for (int e = threadIdx.x; e <= experts; e += THREADS) first_row[e] = expert_offsets[e];
        __syncthreads();
        if (threadIdx.x < 32) add_up_tiles(threadIdx.x);
        __syncthreads();
    }

    // One warp: each lane adds up the same number of experts, odd to be free of bank conflicts.
    DEVICE void add_up_tiles(int lane) {
        const int run = (num_experts + 31) / 32 | 1;
        const int begin = min(lane * run, num_experts), end = min(begin + run, num_experts);
        int before = 0; // tiles of this lane's experts so far, then of those before them
        for (int e = begin; e < end; e++) {
            before += tiles_of(e);
            first_tile[e + 1] = before;
        }
        const int mine = before;
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(~0u, before, step);
            if (lane >= step) before += other;
        }
        before -= mine;
        if (lane == 0) first_tile[0] = 0;
        for (int e = begin; e < end; e++) first_tile[e + 1] += before;
    }
};

// Rows of one expert that are multiplied together.
struct Tile {
    int expert, row, rows; // rows may end before `size`, which is what is computed
    int size;

    DEVICE Tile(const Schedule& schedule, int tile) {
        int end = schedule.num_experts; // the last expert that starts at or before tile
        for (expert = 0; end - expert > 1;) {
            const int middle = (expert + end) / 2;
            if (schedule.first_tile[middle] <= tile) expert = middle;
            else end = middle;
        }
        const int most = schedule.tile_rows(expert);
        const int skipped = (tile - schedule.first_tile[expert]) * most;
        row = schedule.first_row[expert] + skipped;
        rows = min(most, schedule.rows_of(expert) - skipped);
        size = max(MIN_TILE, (rows + TILE_STEP - 1) / TILE_STEP * TILE_STEP);
    }
};

template <int N>
struct Size {
    static constexpr int value = N;
};

// Call body(Size<N>()) for the tile size N that was found at run time.
template <int N = MIN_TILE, typename Body>
DEVICE void with_size(int size, const Body& body) {
    if constexpr (N < MAX_TILE)
        if (size > N) return with_size<N + TILE_STEP>(size, body);
    body(Size<N>());
}

// Programmatic dependent launch: this kernel may have begun before the one before it has ended.
DEVICE void wait_for_earlier_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next one may begin when all CTAs have come by.  Late: CTAs that take a place as soon as it
// is free end up beside their neighbours, and with them all the longer shares of the work.
DEVICE void allow_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

struct Call {
    const u8* weights;
    const float* a_scale;
    u16* out;
    int n, k;
};

#if !SHORT_K

// ------------------------------------------------------------------------------- general kernel

// A unit of work is one tile times 64 * WARPGROUPS rows of its expert's weight, over the part of K
// that is this CTA's.  CTAs take units in turn; those of one tile are neighbours and run at the
// same time, so that the tile comes from L2.
struct Units {
    int count, in_tile; // in_tile: row blocks of a tile
    int split, part;    // into how many parts K is cut, and which one is this CTA's
    int first, step;    // units of this CTA

    DEVICE Units(const Schedule& schedule, int n, int chunks) {
        in_tile = (n + BLOCK_ROWS * WARPGROUPS - 1) / (BLOCK_ROWS * WARPGROUPS);
        count = schedule.num_tiles() * in_tile;
        split = 1;
        // Too few units to fill the device: several CTAs of a cluster share each.
        if constexpr (CLUSTER > 1)
            while (split < CLUSTER && 2 * split * count <= gridDim.x && 4 * split <= chunks)
                split *= 2;
        part = blockIdx.x % split;
        first = blockIdx.x / split;
        step = gridDim.x / split;
    }

    DEVICE int begin(int chunks) const { return chunks * part / split; }
    DEVICE int end(int chunks) const { return chunks * (part + 1) / split; }
};

struct Stages {
    u32 tiles, weights; // in shared memory

    DEVICE u32 tile(u32 stage) const { return tiles + stage * TILE_BYTES; }
    DEVICE u32 block(u32 stage, int warpgroup) const {
        return weights + (stage * WARPGROUPS + warpgroup) * BLOCK_BYTES;
    }
};

// One thread copies all that the CTA reads.
DEVICE void produce(Ring<STAGES> ring, const Stages& stages, const Schedule& schedule,
                    const Units& units, const Call& call, const RowsOfA& rows_of_a) {
    const int chunks = call.k / GROUP, blocks = call.n / BLOCK_ROWS;
    for (int unit = units.first; unit < units.count; unit += units.step) {
        const Tile tile(schedule, unit / units.in_tile);
        const u8* weights[WARPGROUPS];
        for (int i = 0; i < WARPGROUPS; i++) {
            // With N an odd multiple of 64, the last warpgroup repeats a block, and stores nothing.
            const int block = min(unit % units.in_tile * WARPGROUPS + i, blocks - 1);
            weights[i] = call.weights + ((u64)tile.expert * blocks + block) * chunks * BLOCK_BYTES;
        }
        const u32 bytes = WARPGROUPS * BLOCK_BYTES + tile.size * GROUP;
        const TensorMap* rows = rows_of_a.of(tile.size);
        for (int chunk = units.begin(chunks); chunk < units.end(chunks); chunk++) {
            ring.wait_empty();
            const u32 full = ring.full + 8 * ring.stage;
            barrier_expect(full, bytes);
#pragma unroll
            for (int i = 0; i < WARPGROUPS; i++)
                copy_bytes(stages.block(ring.stage, i), weights[i] + (u64)chunk * BLOCK_BYTES,
                           BLOCK_BYTES, full);
            copy_tile(stages.tile(ring.stage), rows, chunk * GROUP, tile.row, full);
            ring.advance();
        }
    }
    allow_next_kernel();
}

// Sum over the chunks of one unit.  While the tensor cores multiply one chunk, the next one's
// weights are converted.
template <int TILE>
DEVICE void multiply(Ring<STAGES>& ring, const Stages& stages, int warpgroup, int chunks,
                     float (&sum)[TILE / 2]) {
    float part[TILE / 2];
    Fragment even = {}, odd = {}; // uninitialised, they confuse the register allocation
    clear(sum);
    clear(part);
    auto load = [&](Fragment& f) {
        ring.wait_full();
        load_fragment(f, stages.block(ring.stage, warpgroup));
    };
    // *more*: another chunk follows.  As a branch of its own, unknown to the compiler, it keeps the
    // conversion of the next chunk before the wait for this one, so that they overlap.
    auto step = [&](const Fragment& now, Fragment& next, bool more) {
        const u32 used = ring.stage;
        ring.advance();
        begin_product<TILE>(part, now, stages.tile(used));
        if (more) load(next);
        end_product(part);
        ring.release(used);
        add_group(sum, part, now);
    };
    load(even);
    for (int left = chunks; left > 0; left -= 2) {
        step(even, odd, left > 1);
        if (opaque(left) > 1) step(odd, even, left > 2);
    }
}

// Add up the parts of K that the CTAs of one unit hold, in their order; true for the first of them,
// which then has the whole sum.  All threads of the cluster pass two barriers.
DEVICE bool add_parts(float (&sum)[4], float4* mine, const Units& units) {
    mine[threadIdx.x] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    cluster_sync();
    if (units.part == 0) {
        const u32 address = shared_address(mine + threadIdx.x), rank = blockIdx.x % CLUSTER;
        for (int other = 1; other < units.split; other++) {
            float x, y, z, w;
            asm volatile(
                "{\n.reg .b32 remote;\n"
                "mapa.shared::cluster.u32 remote, %4, %5;\n"
                "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}"
                : "=f"(x), "=f"(y), "=f"(z), "=f"(w)
                : "r"(address), "r"(rank + other)
                : "memory");
            sum[0] += x, sum[1] += y, sum[2] += z, sum[3] += w;
        }
    }
    cluster_sync(); // nobody leaves while it is read
    return units.part == 0;
}

DEVICE void consume(Ring<STAGES> ring, const Stages& stages, u32 staged, float4* partial,
                    const Schedule& schedule, const Units& units, const Call& call,
                    int warpgroup) {
    const int chunks = units.end(call.k / GROUP) - units.begin(call.k / GROUP);
    const float factor = *call.a_scale * 512.0f; // 2^9: see `decode`
    for (int unit = units.first; unit < units.count; unit += units.step) {
        const Tile tile(schedule, unit / units.in_tile);
        const int column = (unit % units.in_tile * WARPGROUPS + warpgroup) * BLOCK_ROWS;
        const int rows = column < call.n ? tile.rows : 0; // 0: a repeated block
        with_size(tile.size, [&](auto size) {
            constexpr int TILE = decltype(size)::value;
            float sum[TILE / 2];
            multiply<TILE>(ring, stages, warpgroup, chunks, sum);
            if constexpr (CLUSTER > 1)
                if (units.split > 1 && !add_parts(sum, partial, units)) return;
            const Place place{call.out, call.n, opaque(tile.row), rows, column};
            write_results<TILE>(sum, factor, staged, place, warpgroup);
        });
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS_PER_SM)
    w4a8_grouped_gemm(const __grid_constant__ RowsOfA rows_of_a, const u8* weights,
                      const float* a_scale, const int* expert_offsets, u16* out, int num_experts,
                      int n, int k) {
    extern __shared__ __align__(1024) u8 memory[]; // a swizzled tile begins at a multiple of 1024
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    __shared__ Schedule schedule;
    __shared__ float4 partial[CLUSTER > 1 ? CONSUMERS : 1];
    const Ring<STAGES> ring{shared_address(barriers), shared_address(barriers + STAGES)};
    const Stages stages{shared_address(memory), shared_address(memory) + STAGES * TILE_BYTES};
    const u32 staged = stages.weights + STAGES * WARPGROUPS * BLOCK_BYTES;
    // The shuffle shows the compiler that all threads of a warp take the same branch below;
    // without it, it would wait for each wgmma before the next.
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
        ring.init(4 * WARPGROUPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); // TMA sees them, too
    }
    wait_for_earlier_kernel();
    schedule.build(expert_offsets, num_experts);
    const Units units(schedule, n, k / GROUP);
    const Call call{weights, a_scale, out, n, k};
    const bool is_idle = units.first >= units.count;
    if (warpgroup == WARPGROUPS) {
        if constexpr (CONSUMER_REGISTERS > 0) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == CONSUMERS) produce(ring, stages, schedule, units, call, rows_of_a);
        if constexpr (CLUSTER > 1) __syncwarp();
    } else {
        if constexpr (CONSUMER_REGISTERS > 0)
            asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        consume(ring, stages, staged + warpgroup * STAGED_BYTES, partial, schedule, units, call,
                warpgroup);
    }
    if constexpr (CLUSTER > 1)
        if (units.split > 1 && (is_idle || warpgroup == WARPGROUPS)) {
            cluster_sync(); // those of `add_parts`
            cluster_sync();
        }
}

#else

// --------------------------------------------------------------------------- kernel for K = 256

// With two chunks there is no ring to fill for each unit.  A tile stays in shared memory while all
// 64-row blocks of its expert's weight stream past it, whole rows of K at a time.  CTAs take equal,
// contiguous ranges of (tile, block); within one, the warpgroups take blocks in turn.

constexpr int SHORT_CHUNKS = 2;
constexpr int TILE_SLOTS = 2; // the next tile arrives while this one is used
constexpr int SLOT_BYTES = SHORT_CHUNKS * TILE_BYTES;
constexpr int STREAM_BYTES = SHORT_CHUNKS * BLOCK_BYTES;
static_assert(STAGES % WARPGROUPS == 0, "each warpgroup has its own stages");

struct Range {
    int begin, end; // of (tile, block) pairs, counted block by block
    int in_tile;    // blocks of a tile

    DEVICE Range(const Schedule& schedule, int n) {
        in_tile = n / BLOCK_ROWS;
        const long long count = (long long)schedule.num_tiles() * in_tile;
        begin = int(count * blockIdx.x / gridDim.x);
        end = int(count * (blockIdx.x + 1) / gridDim.x);
    }

    DEVICE int first_tile() const { return begin / in_tile; }
    DEVICE bool reaches(int tile) const { return tile * in_tile < end; }
    DEVICE int begin_in(int tile) const { return max(begin, tile * in_tile); }
    DEVICE int end_in(int tile) const { return min(end, (tile + 1) * in_tile); }
};

// One thread copies all that the CTA reads.
DEVICE void produce(Ring<STAGES> ring, Ring<TILE_SLOTS> tiles, u32 stages, u32 slots,
                    const Schedule& schedule, const Range& range, const Call& call,
                    const RowsOfA& rows_of_a) {
    for (int t = range.first_tile(); range.reaches(t); t++) {
        const Tile tile(schedule, t);
        tiles.wait_empty();
        const u32 of_tile = tiles.full + 8 * tiles.stage;
        barrier_expect(of_tile, SHORT_CHUNKS * tile.size * GROUP);
        for (int i = 0; i < SHORT_CHUNKS; i++)
            copy_tile(slots + tiles.stage * SLOT_BYTES + i * TILE_BYTES, rows_of_a.of(tile.size),
                      i * GROUP, tile.row, of_tile);
        tiles.advance();
        const u8* weights = call.weights + (u64)tile.expert * range.in_tile * STREAM_BYTES;
        for (int i = range.begin_in(t); i < range.end_in(t); i++) {
            ring.wait_empty();
            const u32 full = ring.full + 8 * ring.stage;
            barrier_expect(full, STREAM_BYTES);
            copy_bytes(stages + ring.stage * STREAM_BYTES,
                       weights + (u64)(i - t * range.in_tile) * STREAM_BYTES, STREAM_BYTES, full);
            ring.advance();
        }
    }
    allow_next_kernel();
}

// One warpgroup's blocks of one tile: *count* of them, WARPGROUPS apart.  The weights of the next
// block are converted while the tensor cores work on this one.
template <int TILE>
DEVICE void multiply(Ring<STAGES>& ring, u32 stages, u32 slot, u32 staged, Place place,
                     float factor, int warpgroup, int count) {
    float part[TILE / 2], sum[TILE / 2];
    Fragment first, second;
    u32 used;
    auto load_first = [&]() {
        ring.wait_full();
        load_fragment(first, stages + ring.stage * STREAM_BYTES);
    };
    auto load_second = [&]() {
        load_fragment(second, stages + ring.stage * STREAM_BYTES + BLOCK_BYTES);
        used = ring.stage;
        ring.advance(WARPGROUPS);
    };
    clear(part);
    load_first();
    load_second();
    for (int i = 0; i < count; i++) {
        clear(sum);
        begin_product<TILE>(part, first, slot);
        end_product(part);
        ring.release(used); // `second` was converted before the product began
        add_group(sum, part, first);
        begin_product<TILE>(part, second, slot + TILE_BYTES);
        if (i + 1 < count) load_first();
        end_product(part);
        add_group(sum, part, second);
        if (i + 1 < count) load_second();
        write_results<TILE>(sum, factor, staged, place, warpgroup);
        place.column += BLOCK_ROWS * WARPGROUPS;
    }
}

DEVICE void consume(Ring<STAGES> ring, Ring<TILE_SLOTS> tiles, u32 stages, u32 slots, u32 staged,
                    const Schedule& schedule, const Range& range, const Call& call,
                    int warpgroup) {
    const float factor = *call.a_scale * 512.0f; // 2^9: see `decode`
    ring.advance(warpgroup);
    for (int t = range.first_tile(); range.reaches(t); t++) {
        const Tile tile(schedule, t);
        // Blocks go to the warpgroups in turn through all tiles, as stages do.
        const int skip = (range.begin_in(t) - range.begin + WARPGROUPS - warpgroup) % WARPGROUPS;
        const int first = range.begin_in(t) + (skip ? WARPGROUPS - skip : 0);
        const int count = (range.end_in(t) - first + WARPGROUPS - 1) / WARPGROUPS;
        const Place place{call.out, call.n, tile.row, tile.rows,
                          (first - t * range.in_tile) * BLOCK_ROWS};
        tiles.wait_full();
        if (count > 0)
            with_size(tile.size, [&](auto size) {
                multiply<decltype(size)::value>(ring, stages, slots + tiles.stage * SLOT_BYTES,
                                                staged, place, factor, warpgroup, count);
            });
        __syncwarp();
        tiles.release(tiles.stage);
        tiles.advance();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS_PER_SM)
    w4a8_grouped_gemm(const __grid_constant__ RowsOfA rows_of_a, const u8* weights,
                      const float* a_scale, const int* expert_offsets, u16* out, int num_experts,
                      int n, int k) {
    extern __shared__ __align__(1024) u8 memory[]; // a swizzled tile begins at a multiple of 1024
    __shared__ __align__(8) u64 barriers[2 * (STAGES + TILE_SLOTS)];
    __shared__ Schedule schedule;
    const u32 of_tiles = shared_address(barriers + 2 * STAGES);
    const Ring<STAGES> ring{shared_address(barriers), shared_address(barriers + STAGES)};
    const Ring<TILE_SLOTS> tiles{of_tiles, of_tiles + 8 * TILE_SLOTS};
    const u32 slots = shared_address(memory), stages = slots + TILE_SLOTS * SLOT_BYTES;
    const u32 staged = stages + STAGES * STREAM_BYTES;
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0); // as in the general kernel
    if (threadIdx.x == 0) {
        ring.init(4);
        tiles.init(4 * WARPGROUPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); // TMA sees them, too
    }
    wait_for_earlier_kernel();
    schedule.build(expert_offsets, num_experts);
    const Range range(schedule, n);
    const Call call{weights, a_scale, out, n, k};
    if (range.begin >= range.end) return;
    if (warpgroup == WARPGROUPS) {
        if constexpr (CONSUMER_REGISTERS > 0) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == CONSUMERS)
            produce(ring, tiles, stages, slots, schedule, range, call, rows_of_a);
    } else {
        if constexpr (CONSUMER_REGISTERS > 0)
            asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        consume(ring, tiles, stages, slots, staged + warpgroup * STAGED_BYTES, schedule, range,
                call, warpgroup);
    }
}
#endif
