"""Slow reference implementations: the equations as explicit loops over Python floats and NumPy.

Each function follows its equation one position, head, item or pair at a time, in float64, and uses
nothing from the package. Parameters `p` are dictionaries with the names of a model's parameters.
"""

import itertools
import math

import numpy as np


def softmax_loop(logits):
    """Softmax of a list of logits."""
    largest = max(logits)
    powers = [math.exp(logit - largest) for logit in logits]
    return np.array([power / sum(powers) for power in powers])


def norm_loop(x, p):
    """LayerNorm of one vector, with epsilon 1e-6."""
    mean = sum(x) / len(x)
    variance = sum((entry - mean) ** 2 for entry in x) / len(x)
    return (x - mean) / math.sqrt(variance + 1e-6) * p['scale'] + p['bias']


def gelu_loop(x):
    """GELU of one vector, in its tanh approximation."""
    inner = [math.sqrt(2 / math.pi) * (entry + 0.044715 * entry**3) for entry in x]
    return np.array([entry / 2 * (1 + math.tanh(y)) for entry, y in zip(x, inner)])


def relu_loop(x):
    """ReLU of one vector."""
    return np.array([max(entry, 0.0) for entry in x])


def leaky_relu_loop(x):
    """LeakyReLU of one number, with slope 0.2."""
    return x if x > 0 else 0.2 * x


def affine_loop(x, p, name, index):
    """x W, plus the bias if the parameters have one."""
    y = x @ p[name][index]
    return y + p[f'{name}_bias'][index] if f'{name}_bias' in p else y


# Attention and the Transformer block.


def attend_loop(x_LD, segments_L, i, query_K, p, h, scale):
    """Attention of position i's query in head h: the weights [L] and the weighted sum of values."""
    length, width = x_LD.shape
    divisor = math.sqrt({'head': len(query_K), 'model': width}[scale])
    seen = [j for j in range(i + 1) if segments_L[j] == segments_L[i]]
    logits = []
    for j in seen:
        logit = sum(query_K * affine_loop(x_LD[j], p, 'key', h)) / divisor
        if 'distance' in p:
            logit += p['distance'][h][min(i - j, len(p['distance'][h]) - 1)]
        logits.append(logit)
    weight_L = np.zeros(length)
    weight_L[seen] = softmax_loop(logits)
    return weight_L, sum(weight_L[j] * affine_loop(x_LD[j], p, 'value', h) for j in seen)


def attention_loop(x_LD, segments_L, p, scale):
    """Multi-head attention with its output projection: [L, D], and the weights [H, L, L]."""
    num_heads, length = len(p['query']), len(x_LD)
    out_LD, weight_HLL = np.zeros(x_LD.shape), np.zeros((num_heads, length, length))
    for i in range(length):
        if not segments_L[i]:
            continue
        out_LD[i] = p['output_bias']
        for h in range(num_heads):
            query_K = affine_loop(x_LD[i], p, 'query', h)
            weight_HLL[h, i], mixed_K = attend_loop(x_LD, segments_L, i, query_K, p, h, scale)
            out_LD[i] += mixed_K @ p['output'][h]
    return out_LD, weight_HLL


def block_loop(x_LD, segments_L, p, scale='head'):
    """One Transformer block of one row: h = LN(x + attention(x)), then LN(h + FFN(h))."""
    attended_LD, weight_HLL = attention_loop(x_LD, segments_L, p['attention'], scale)
    up, down = p['feed_forward']['up'], p['feed_forward']['down']
    out_LD = np.zeros(x_LD.shape)
    for i in range(len(x_LD)):
        h_D = norm_loop(x_LD[i] + attended_LD[i], p['attention_norm'])
        inner = gelu_loop(h_D @ up['kernel'] + up['bias'])
        out_LD[i] = norm_loop(h_D + inner @ down['kernel'] + down['bias'], p['feed_forward_norm'])
    return out_LD, weight_HLL


def comparable_loop(x_D, similarity, temperature=1.0):
    """A vector as the similarity compares it: unchanged for dot, unit / temperature for cosine."""
    length = np.sqrt(sum(entry * entry for entry in x_D))
    return x_D if similarity == 'dot' or not length else x_D / length / temperature


# FAME.


def facet_loop(x_LD, segments_L, p, model):
    """The FAME block's output u [L, D] of one row, eqs. 7 to 17, and all intermediates.

    `model` has the options of FAME as attributes.
    """
    num_heads, num_experts = model.num_heads, model.num_experts
    length, width = x_LD.shape
    head_width = width // num_heads
    u_LD = np.zeros((length, width))
    out = {
        'attention_HNQS': np.zeros((num_heads, num_experts, length, length)),
        'router_LHN': np.zeros((length, num_heads, num_experts)),
        'heads_LHK': np.zeros((length, num_heads, head_width)),
        'gate_LH': np.zeros((length, num_heads)),
    }
    for i in range(length):
        if not segments_L[i]:
            continue
        f_HK = []
        for h in range(num_heads):
            f_NK = []
            for n in range(num_experts):
                query_K = affine_loop(x_LD[i], p, 'query', (h, n))  # (12)
                out['attention_HNQS'][h, n, i], f_K = attend_loop(  # (13) to (15)
                    x_LD, segments_L, i, query_K, p, h, model.attention_scale
                )
                f_NK.append(f_K)
            read = np.concatenate(f_NK) if model.routing == 'outputs' else x_LD[i]
            beta_N = softmax_loop(read @ p['router'][h])  # (16)
            active = sorted(range(num_experts), key=lambda n: (-beta_N[n], n))
            idle = active[model.active_experts or num_experts :]
            beta_N[idle] = 0
            beta_N = beta_N / sum(beta_N)
            out['router_LHN'][i, h] = beta_N
            if model.routing == 'inputs':
                out['attention_HNQS'][h, idle, i] = 0
            f_HK.append(sum(beta * f_K for beta, f_K in zip(beta_N, f_NK)))  # (17)
        f_D = np.concatenate(f_HK)
        if model.output_projection == 'keep':
            f_D = sum(f_HK[h] @ p['output'][h] for h in range(num_heads)) + p['output_bias']
        if model.attention_residual in ('slice', 'norm'):
            f_D = x_LD[i] + f_D
        if model.attention_residual == 'norm':
            f_D = norm_loop(f_D, p['attention_norm'])
        for h in range(num_heads):
            f_K, own = f_D[h * head_width : (h + 1) * head_width], 0 if model.ffn_shared else h
            inner_K = relu_loop(affine_loop(f_K, p, 'up', own))
            f_K = norm_loop(f_K + affine_loop(inner_K, p, 'down', own), p['feed_forward_norm'])
            out['heads_LHK'][i, h] = f_K  # (7)
        gate_H = softmax_loop(out['heads_LHK'][i].reshape(-1) @ p['gate'] + p['gate_bias'])  # (10)
        out['gate_LH'][i] = gate_H * (num_heads if model.gate_scale == 'heads' else 1)
        for h in range(num_heads):
            u_LD[i] += out['gate_LH'][i, h] * p['facet'][h] @ out['heads_LHK'][i, h]
    return u_LD, out


# Losses.


def cross_entropy_loop(query_TD, item_VD, target_T, weight_T):
    """Full softmax cross-entropy, a token and an item at a time: sum, count and both gradients."""
    share_TF = np.ones((len(target_T), 1))
    return soft_cross_entropy_loop(query_TD, item_VD, target_T[:, None], weight_T, share_TF)


def soft_cross_entropy_loop(query_TD, item_VD, target_TF, weight_T, share_TF, factor_TV=None):
    """The loss of soft labels, without their entropy, where an item's exp counts `factor` times.

    A token and an item at a time; returns the sum, the count and both gradients.
    """
    query_TD, item_VD = np.asarray(query_TD, np.float64), np.asarray(item_VD, np.float64)
    if factor_TV is None:
        factor_TV = np.ones((len(query_TD), len(item_VD)))
    total, d_query_TD, d_item_VD = 0.0, np.zeros(query_TD.shape), np.zeros(item_VD.shape)
    for t, (query_D, weight) in enumerate(zip(query_TD, weight_T)):
        if weight == 0:
            continue
        scores = [float(query_D @ item_D) for item_D in item_VD[1:]]
        label = [0.0] * len(scores)
        for target, share in zip(target_TF[t], share_TF[t]):
            if share:
                label[target - 1] += share
        largest = max(scores)
        terms = [f * math.exp(s - largest) for s, f in zip(scores, factor_TV[t][1:])]
        picked = sum(a * s for a, s in zip(label, scores))
        total += weight * (largest + math.log(sum(terms)) - picked)
        for v, term in enumerate(terms, start=1):
            slope = weight * (term / sum(terms) - label[v - 1])
            d_query_TD[t] += slope * item_VD[v]
            d_item_VD[v] += slope * query_D
    return total, float(np.sum(weight_T)), d_query_TD, d_item_VD


def nt_xent_loop(one, other, temperature):
    """NT-Xent of A pairs of views, the mean over all 2 A views.

    A view's term is -log of the softmax of its pair's other view among all views but itself.
    """
    every = [*one, *other]
    total = 0.0
    for i, anchor in enumerate(every):
        logits = [sum(anchor * view) / temperature for view in every]
        largest = max(logits)
        rest = sum(math.exp(logits[a] - largest) for a in range(len(every)) if a != i)
        total += largest + math.log(rest) - logits[(i + len(one)) % len(every)]
    return total / len(every)


# Session graphs (MSGIFSR).


def graph_loop(history, order):
    """Nodes of each level by first occurrence, and edges {(kind, a, b): set of node pairs}."""
    nodes, edges = [], {}
    for k in range(1, order + 1):
        runs = [tuple(history[i : i + k]) for i in range(len(history) - k + 1)]
        nodes.append(list(dict.fromkeys(runs)))
        edges[f'intra_{k}', k - 1, k - 1] = set(itertools.pairwise(runs))
        if k > 1:
            alone = [(item,) for item in history]
            edges['inter', 0, k - 1] = set(zip(alone, runs[1:]))
            edges['inter', k - 1, 0] = set(zip(runs, alone[k:]))
    return nodes, edges


def gather_loop(p, node, sources):
    """Graph attention (GAT) of one node over its sources, in each head: [H, D]."""
    gathered = np.zeros(p['source'].shape)
    for h in range(len(gathered)):
        value = [x_D @ p['kernel'][h] for x_D in sources]
        own = (node @ p['kernel'][h]) @ p['target'][h]
        weights = (
            softmax_loop([leaky_relu_loop(v @ p['source'][h] + own) for v in value])
            if value
            else []
        )
        for weight, v in zip(weights, value):
            gathered[h] += weight * v
    return gathered


def graph_layer_loop(p, x, edges):
    """One layer over levels of {run: vector} and sets of edges; returns the new levels."""
    out = []
    for k, level in enumerate(x):
        out.append({})
        for run in level:
            h = level[run] @ p[f'residual_{k + 1}'] + p[f'bias_{k + 1}']
            for (kind, a, b), pairs in edges.items():
                if b == k:
                    sources = [x[a][s] for s, q in sorted(pairs) if q == run]
                    h = h + gather_loop(p[f'{kind}_forward'], level[run], sources)
                if a == k:
                    sources = [x[b][q] for s, q in sorted(pairs) if s == run]
                    h = h + gather_loop(p[f'{kind}_reverse'], level[run], sources)
            out[k][run] = h.max(axis=0) + sum(level.values()) / len(level)
    return out


# The item graph.


def item_graph_loop(histories, num_items, window, decay):
    """How often two items are near in a history, in either order: [V + 1, V + 1]."""
    graph_VV = np.zeros((num_items + 1, num_items + 1))
    for history in histories:
        for p, first in enumerate(history):
            for q in range(p + 1, min(p + window, len(history) - 1) + 1):
                graph_VV[first, history[q]] += decay ** (q - p - 1)
                graph_VV[history[q], first] += decay ** (q - p - 1)
    return graph_VV


def item_graph_scores_loop(history, graph_VV, count_V, setting):
    """The scores of all items after a history, [V + 1]; `setting` has the options as attributes."""
    items = range(1, len(graph_VV))

    def step(i, j):
        return graph_VV[i, j] / sum(graph_VV[i]) if graph_VV[i, j] else 0.0

    score_V = np.zeros(len(graph_VV))
    for n, last in enumerate(history[::-1][: setting.last]):
        for v in items:
            two = sum(step(last, j) * step(j, v) for j in items)
            path = step(last, v) + setting.second_hop * two
            score_V[v] += setting.fade**n * path / max(count_V[v], 1) ** setting.exponent
    return score_V


def item_graph_rank_loop(score_V, count_V, target, left_out):
    """1 + the items not left out that have the target's score and count, or are ahead of it."""
    if target in left_out:
        return len(score_V) - 1
    worst = score_V[target], count_V[target]
    others = [v for v in range(1, len(score_V)) if v != target and v not in left_out]
    return 1 + sum((score_V[v], count_V[v]) >= worst for v in others)
