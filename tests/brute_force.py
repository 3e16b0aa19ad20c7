"""Native Sparse Attention in float64 NumPy, written from the equations, one query and one head at a time.

It shares no code with the library and is no faster than it has to be: every visible token is found by asking, for each
one, whether the definition holds. Arguments and layouts are those of the public functions of `nsa_jax`; everything is
computed in float64.
"""

import math

import numpy as np


def _positions_of_queries(q, query_offset):
    return range(int(query_offset), int(query_offset) + q.shape[1])


def _scale(q, scale):
    return q.shape[-1] ** -0.5 if scale is None else scale


def _same_segment(segment_ids, b, *positions):
    """Whether all `positions` of row `b` lie in one segment."""
    return segment_ids is None or len({int(segment_ids[b][position]) for position in positions}) == 1


def _visible_compressed(b, t, Nc, config, segment_ids):
    """Compressed tokens that the query at `t` sees: complete, in one segment, and in the query's."""
    visible = []
    for i in range(Nc):
        first = i * config.compress_stride
        last = first + config.compress_block - 1
        if last <= t and _same_segment(segment_ids, b, first, last, t):
            visible.append(i)
    return visible


def _softmax_average(q, keys, values, positions, scale):
    """One query over the keys at `positions`: the output and the log of the sum of exponentials."""
    if not positions:
        return np.zeros(values.shape[-1]), -math.inf
    scores = np.array([float(q @ keys[position]) * scale for position in positions])
    highest = scores.max()
    exponentials = np.exp(scores - highest)
    total = exponentials.sum()
    return (exponentials / total) @ values[positions], highest + math.log(total)


def _attend(q, k, v, visible, scale):
    """Attention where `visible(b, t_index, kv_head)` lists the key positions that a query sees."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, Tq, H, _ = q.shape
    G = H // k.shape[2]
    scale = _scale(q, scale)
    o = np.zeros((B, Tq, H, v.shape[-1]))
    lse = np.full((B, H, Tq), -math.inf)
    for b in range(B):
        for row in range(Tq):
            for h in range(H):
                kv_head = h // G
                positions = visible(b, row, kv_head)
                o[b, row, h], lse[b, h, row] = _softmax_average(
                    q[b, row, h], k[b, :, kv_head], v[b, :, kv_head], positions, scale
                )
    return o, lse


def compressed_attention(q, k, v, *, config, scale=None, segment_ids=None, query_offset=0):
    """Branch 1: `(o [B, Tq, H, Dv], lse [B, H, Tq])`; 0 and -inf where a query sees no compressed token."""
    times = _positions_of_queries(q, query_offset)
    return _attend(
        q, k, v, lambda b, row, _: _visible_compressed(b, times[row], k.shape[1], config, segment_ids), scale
    )


def shared_chunks(i, j, config):
    """c(i, j): how many chunks of `compress_stride` tokens compressed token `i` and selection block `j` share."""
    d = config.compress_stride
    chunks_of_token = {i + chunk for chunk in range(config.compress_block // d)}
    chunks_of_block = {j * (config.select_block // d) + chunk for chunk in range(config.select_block // d)}
    return len(chunks_of_token & chunks_of_block)


def importance(q, k, lse, *, config, scale=None, segment_ids=None, query_offset=0):
    """Importance of every block up to that of the last query, [B, K, Tq, blocks]; `k` are the compressed keys."""
    q, k, lse = (np.asarray(x, np.float64) for x in (q, k, lse))
    B, Tq, H, _ = q.shape
    Nc, K = k.shape[1:3]
    G = H // K
    scale = _scale(q, scale)
    times = _positions_of_queries(q, query_offset)
    blocks = times[-1] // config.select_block + 1
    chunks = [[(j, shared_chunks(i, j, config)) for j in range(blocks)] for i in range(Nc)]
    chunks = [[(j, c) for j, c in row if c > 0] for row in chunks]
    result = np.zeros((B, K, Tq, blocks))
    for b in range(B):
        for row, t in enumerate(times):
            for i in _visible_compressed(b, t, Nc, config, segment_ids):
                for h in range(H):
                    p = math.exp(float(q[b, row, h] @ k[b, i, h // G]) * scale - lse[b, h, row])
                    for j, c in chunks[i]:
                        result[b, h // G, row, j] += c * p
    return result


def _select(scores, t, first_block, config):
    """Chosen blocks of one query, ascending, and the relative gap between the last one ranked in and the first out."""
    last_block = t // config.select_block
    candidates = range(first_block, last_block + 1)
    forced = [j for j in candidates if j < first_block + config.num_init or j > last_block - config.num_local]
    ranked = sorted((j for j in candidates if j not in forced), key=lambda j: (-scores[j], j))
    if not config.select_in_window:
        ranked = [j for j in ranked if j * config.select_block <= t - config.window]
    places = config.num_selected - len(forced)
    taken, left = ranked[:places], ranked[places:]
    if not taken or not left or scores[taken[-1]] == 0:  # zeros on both sides of the cut are exact in any precision
        margin = math.inf
    else:
        margin = (scores[taken[-1]] - scores[left[0]]) / scores[taken[-1]]
    return sorted(forced + taken), margin


def select_blocks_and_margin(q, k, lse, *, config, scale=None, segment_ids=None, query_offset=0):
    """`(block_indices [B, K, Tq, n], margin [B, K, Tq])`: the selection, and how far it is from another one.

    The margin is the relative difference in importance between the last block that won its place and the first that
    did not; infinite where nothing was ranked or nothing was left out.
    """
    scores = importance(q, k, lse, config=config, scale=scale, segment_ids=segment_ids, query_offset=query_offset)
    B, K, Tq, _ = scores.shape
    indices = np.full((B, K, Tq, config.num_selected), -1, np.int32)
    margin = np.full((B, K, Tq), math.inf)
    for b in range(B):
        for row, t in enumerate(_positions_of_queries(q, query_offset)):
            segment_start = min(u for u in range(t + 1) if _same_segment(segment_ids, b, u, t))
            first_block = segment_start // config.select_block
            for kv_head in range(K):
                chosen, margin[b, kv_head, row] = _select(scores[b, kv_head, row], t, first_block, config)
                indices[b, kv_head, row, : len(chosen)] = chosen
    return indices, margin


def select_blocks(q, k, lse, **options):
    """Section 3 of the maths: int32 [B, K, Tq, n], ascending, padded with -1 at the end."""
    return select_blocks_and_margin(q, k, lse, **options)[0]


def selected_attention(
    q, k, v, block_indices, *, config, scale=None, segment_ids=None, query_offset=0, return_lse=False
):
    """Branch 2: softmax over the tokens of the chosen blocks, no later than the query and in its segment."""
    times = _positions_of_queries(q, query_offset)

    def visible(b, row, kv_head):
        t = times[row]
        chosen = {int(j) for j in block_indices[b, kv_head, row]}
        return [u for u in range(t + 1) if u // config.select_block in chosen and _same_segment(segment_ids, b, u, t)]

    o, lse = _attend(q, k, v, visible, scale)
    return (o, lse) if return_lse else o


def window_attention(q, k, v, *, config, scale=None, segment_ids=None, query_offset=0, return_lse=False):
    """Branch 3: softmax over the last `window` positions, the query's own included, in its segment."""
    times = _positions_of_queries(q, query_offset)

    def visible(b, row, _):
        t = times[row]
        return [u for u in range(t + 1) if u > t - config.window and _same_segment(segment_ids, b, u, t)]

    o, lse = _attend(q, k, v, visible, scale)
    return (o, lse) if return_lse else o


def nsa_attention(q, kv, gates, *, config, scale=None, segment_ids=None, query_offset=0):
    """The whole of NSA: the three branches, each times its gate, [B, Tq, H, Dv]."""
    options = dict(config=config, scale=scale, segment_ids=segment_ids, query_offset=query_offset)
    gates = np.asarray(gates, np.float64)
    o_cmp, lse = compressed_attention(q, kv.cmp_k, kv.cmp_v, **options)
    block_indices = select_blocks(q, kv.cmp_k, lse, **options)
    o_slc = selected_attention(q, kv.slc_k, kv.slc_v, block_indices, **options)
    o_win = window_attention(q, kv.win_k, kv.win_v, **options)
    return gates[..., 0:1] * o_cmp + gates[..., 1:2] * o_slc + gates[..., 2:3] * o_win


def compress(x, position_embedding, phi, *, config):
    """Compressed tokens of `x` [B, T, K, D]: `phi` of each flattened window of `x + position_embedding` [l, D]."""
    x, position_embedding = (np.asarray(a, np.float64) for a in (x, position_embedding))
    B, T, K, D = x.shape
    starts = [u for u in range(0, T, config.compress_stride) if u + config.compress_block <= T]
    result = np.zeros((B, len(starts), K, D))
    for b in range(B):
        for i, u in enumerate(starts):
            for head in range(K):
                result[b, i, head] = phi((x[b, u : u + config.compress_block, head] + position_embedding).ravel())
    return result
