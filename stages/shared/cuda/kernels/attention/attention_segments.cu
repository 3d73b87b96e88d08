// What the attention kernels need to know of a packed micro-batch, computed once for all its layers.

// bounds[i] = [first token, one past the last token) of the segment of token i.
// cu_seqlens: [segments + 1], increasing, from 0 to tokens. One thread a token.
extern "C" __global__ void attention_bounds(const int* __restrict__ cu_seqlens, int segments, int tokens,
                                            int2* __restrict__ bounds) {
    int token = blockIdx.x * blockDim.x + threadIdx.x;
    if (token >= tokens) return;
    int low = 0, high = segments;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (cu_seqlens[middle] <= token) low = middle;
        else high = middle;
    }
    bounds[token] = make_int2(cu_seqlens[low], cu_seqlens[low + 1]);
}

// Tiles of `rows` tokens in order of falling work, so that the longest blocks start first and the last wave is
// short. by_key 0: query tiles, whose work is the keys they see; 1: key tiles, whose work is the queries that
// see them. window 0: none. One block; order: [ceil(tokens / rows)].
extern "C" __global__ void attention_order(const int2* __restrict__ bounds, int tokens, int rows, int window,
                                           int by_key, int* __restrict__ order) {
    int tiles = (tokens + rows - 1) / rows;
    auto work = [&](int tile) {
        int first = tile * rows, last = min(first + rows, tokens) - 1;
        if (by_key) {
            int end = bounds[last].y;
            if (window > 0) end = min(end, last + window);
            return end - first;
        }
        int start = bounds[first].x;
        if (window > 0) start = max(start, first - window + 1);
        return last + 1 - start;
    };
    for (int tile = threadIdx.x; tile < tiles; tile += blockDim.x) {
        int own = work(tile), rank = 0;
        for (int other = 0; other < tiles; ++other) {
            int theirs = work(other);
            rank += theirs > own || (theirs == own && other < tile);
        }
        order[rank] = tile;
    }
}
