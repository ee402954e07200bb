// w4a8_moe_prep: a stable counting sort of the routes by expert, in one launch.
//
// Each warp owns consecutive routes and has counters of its own, so a row depends on nothing but
// the ids: repeats give the same bits.  Pass 1 ranks each route among those of its expert in the
// warp; a scan over the warps, the blocks of the cluster and the experts turns counts into first
// rows; pass 2 adds the two.
//
// Macros: THREADS, at least half as many as experts; CLUSTER blocks, each on its own SM; BITS of an
// expert's number; ROUNDS of 32 routes per warp, or 0 for any number; STAGED, only with ROUNDS: a
// block sorts its tokens in shared memory, so that neighbours go to neighbouring rows; PDL.
#include "common.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int CHUNK = ROUNDS ? ROUNDS : 8;  // rounds whose ids are loaded together

__device__ __forceinline__ void cluster_arrive() {
    if (CLUSTER > 1) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    if (CLUSTER > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// What stands at the same place in the shared memory of another block of the cluster.
__device__ __forceinline__ int2 from_block(const int2* place, unsigned block) {
    const unsigned local = (unsigned)__cvta_generic_to_shared(place);
    unsigned remote;
    int2 value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(block));
    asm volatile("ld.shared::cluster.v2.b32 {%0, %1}, [%2];"
                 : "=r"(value.x), "=r"(value.y) : "r"(remote) : "memory");
    return value;
}

// The lanes whose valid id is the same as this one's.  Votes, because match.any takes a turn for
// each different value.
__device__ __forceinline__ unsigned same_as_mine(int id, bool is_valid) {
    unsigned same = __ballot_sync(~0u, is_valid);
#pragma unroll
    for (int bit = 0; bit < BITS; bit++) {
        const bool is_set = id >> bit & 1;
        const unsigned set = __ballot_sync(~0u, is_set);
        same &= is_set ? set : ~set;
    }
    return same;
}

extern "C" __global__ void __launch_bounds__(THREADS) w4a8_moe_prep(
    const int* ids, int* expert_offsets, int* problem_sizes1, int* problem_sizes2,
    int* route_to_row, int* row_to_token,
    int num_routes, int topk, unsigned topk_factor, unsigned topk_shift, long long stride,
    int num_experts, int rounds, int n, int k) {
    extern __shared__ int2 memory[];
    const int pairs = (num_experts + 1) / 2;
    int2* totals = memory;                            // [pairs] of this block
    int2* bases = totals + pairs;                     // [pairs] first rows of this block
    unsigned* counts = (unsigned*)(bases + pairs);    // [WARPS][pairs] of two 16-bit counters
    int* sums = (int*)(counts + WARPS * pairs);       // [33]
    int* block_sums = sums + 33;                      // [33]
    int* block_bases = block_sums + 33;               // [2 * pairs] first places in `staged`
    int2* staged = (int2*)(block_bases + 2 * pairs);  // [THREADS * ROUNDS] of token and row
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int block = CLUSTER > 1 ? blockIdx.x : 0;
    const int begin = (block * WARPS + warp) * rounds * 32;
    const int end = min(num_routes, begin + rounds * 32);
    unsigned short* mine = (unsigned short*)(counts + warp * pairs);
    int id[CHUNK], rank[CHUNK];
    auto token_of = [&](int route) {
        return topk == 1 ? route : (int)(__umulhi(route, topk_factor) >> topk_shift);
    };
    auto load = [&](int route) {
        if (route >= end) return -1;
        const int token = token_of(route);
        const int found = ids[token * stride + (route - token * topk)];
        return (unsigned)found < (unsigned)num_experts ? found : -1;
    };

    if (PDL) pdl_start();
    for (int i = threadIdx.x; i < WARPS * pairs; i += THREADS) counts[i] = 0;
    __syncthreads();
    if (PDL) pdl_wait();

    for (int from = begin; from < end; from += CHUNK * 32) {
#pragma unroll
        for (int i = 0; i < CHUNK; i++) id[i] = load(from + i * 32 + lane);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            const bool is_valid = id[i] >= 0;
            const unsigned same = same_as_mine(id[i], is_valid);
            const int before = __popc(same & ((1u << lane) - 1));
            const int count = is_valid ? mine[id[i]] : 0;
            __syncwarp();
            if (is_valid && before == 0) mine[id[i]] = count + __popc(same);
            __syncwarp();
            rank[i] = count + before;
            const int route = from + i * 32 + lane;
            if (!ROUNDS && route < end) route_to_row[route] = rank[i];
        }
    }
    __syncthreads();

    // A thread per pair of experts; the last sum is taken apart, it may need a 17th bit.
    const int pair = threadIdx.x;
    int2 total = make_int2(0, 0), before = make_int2(0, 0);
    if (pair < pairs) {
        unsigned sum = 0, count = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            sum += count;
            count = counts[w * pairs + pair];
            counts[w * pairs + pair] = sum;
        }
        total = make_int2((sum & 0xffff) + (count & 0xffff), (sum >> 16) + (count >> 16));
        totals[pair] = total;
    }
    const int2 own = total;
    if (CLUSTER > 1) {
        cluster_arrive();
        cluster_wait();
        if (pair < pairs) {
            total = make_int2(0, 0);
#pragma unroll
            for (int other = 0; other < CLUSTER; other++) {
                const int2 its = from_block(totals + pair, other);
                if (other < block) before.x += its.x, before.y += its.y;
                total.x += its.x, total.y += its.y;
            }
        }
        cluster_arrive();
    }
    int row = total.x + total.y, place = own.x + own.y;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, row, step);
        if (lane >= step) row += other;
        if (STAGED) {
            const int others = __shfl_up_sync(~0u, place, step);
            if (lane >= step) place += others;
        }
    }
    if (lane == 31) sums[warp] = row, block_sums[warp] = place;
    __syncthreads();
    if (pair < pairs) {
        for (int w = 0; w < warp; w++) row += sums[w], place += block_sums[w];
        if (pair == pairs - 1) sums[32] = row, block_sums[32] = place;
        row -= total.x + total.y, place -= own.x + own.y;
        block_bases[2 * pair] = place, block_bases[2 * pair + 1] = place + own.x;
        bases[pair] = make_int2(row + before.x, row + total.x + before.y);
        if (block == 0) {
            for (int e = 2 * pair; e < min(2 * pair + 2, num_experts); e++) {
                const int count = e % 2 ? total.y : total.x;
                expert_offsets[e] = row;
                problem_sizes1[3 * e] = 2 * n;
                problem_sizes1[3 * e + 1] = count;
                problem_sizes1[3 * e + 2] = k;
                problem_sizes2[3 * e] = k;
                problem_sizes2[3 * e + 1] = count;
                problem_sizes2[3 * e + 2] = n;
                row += count;
            }
            if (pair == pairs - 1) expert_offsets[num_experts] = row;
        }
    }
    __syncthreads();

    for (int from = begin; from < end; from += CHUNK * 32) {
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            const int route = from + i * 32 + lane;
            if (!ROUNDS) {
                id[i] = load(route);
                if (route < end) rank[i] = route_to_row[route];
            }
        }
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            const int route = from + i * 32 + lane;
            int row = -1;
            if (id[i] >= 0) {
                const int nth = mine[id[i]] + rank[i], token = token_of(route);
                row = ((const int*)bases)[id[i]] + nth;
                if (STAGED) staged[block_bases[id[i]] + nth] = make_int2(token, row);
                else row_to_token[row] = token;
            }
            if (route < end) route_to_row[route] = row;
        }
    }
    if (STAGED) {
        __syncthreads();
        for (int i = threadIdx.x; i < block_sums[32]; i += THREADS)
            row_to_token[staged[i].y] = staged[i].x;
    }
    for (int i = sums[32] + block * THREADS + threadIdx.x; i < num_routes; i += CLUSTER * THREADS)
        row_to_token[i] = 0;
    cluster_wait();  // until the others have read this block's totals
}
