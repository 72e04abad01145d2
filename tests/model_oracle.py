"""A second implementation of both model families, to judge pgolf_fast/model.py by.

Written from the recipes' specifications and sharing nothing with the package: one sequence at a time,
parameters by their published names in a dict, attention by an explicit mask, positions and hashes by
plain loops. The dtype is that of the parameters.
"""

import math

import torch


def norm(x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 2.0**-23)


def rotary(z, positions, dims, base):
    """Pairs (j, j + dims/2) as complex numbers, turned by exp(-i angle)."""
    half = dims // 2
    frequency = torch.tensor([base ** (-2 * j / dims) for j in range(half)], dtype=torch.float64)
    angle = positions[:, None].double() * frequency
    turn = torch.polar(torch.ones_like(angle), -angle)[:, None]
    pairs = torch.complex(z[..., :half].double(), z[..., half:dims].double()) * turn
    return torch.cat([pairs.real.to(z.dtype), pairs.imag.to(z.dtype), z[..., dims:]], dim=-1)


def attend(q, k, v, segment, exclusive):
    """q [T, H, D], k and v [T, K, D], segment [T]: one output per head, its own value's direction removed."""
    length, heads, width = q.shape
    visible = (segment[:, None] == segment[None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    outputs = []
    for h in range(heads):
        kv = h // (heads // k.shape[1])
        scores = torch.where(visible, q[:, h] @ k[:, kv].T / math.sqrt(width), -math.inf)
        y = torch.softmax(scores, dim=-1) @ v[:, kv]
        if exclusive:
            direction = v[:, kv] / torch.sqrt((v[:, kv] ** 2).sum(-1, keepdim=True)).clamp(min=1e-12)
            y = y - (y * direction).sum(-1, keepdim=True) * direction
        outputs.append(y)
    return torch.stack(outputs, dim=1)


def losses_of(logits, targets, cap=30.0):
    z = cap * torch.tanh(logits / cap)
    return torch.logsumexp(z, -1) - z[torch.arange(len(targets)), targets]


def loss_of(logits, targets):
    return losses_of(logits, targets).mean()


def uncorrected(visit, product, x):
    return 0.0


def project_heads(x, weight, width):
    return (x @ weight.T).reshape(len(x), -1, width)


def sp1024(p, tokens, targets, segment, *, gepa, head_dim, rope_dims, base, xsa_from, ve_layers):
    """Sections 1.2 to 1.10 of the sp1024 specification; `gepa` is its Family G. Mean loss of one sequence."""
    bigram, smear = ("bigram_emb", "smear_gate") if gepa else ("bigram", "smear")
    up, down = ("up_proj", "down_proj") if gepa else ("fc", "proj")
    layers = len({name.split(".")[1] for name in p if name.startswith("blocks.")})
    table, ids = p[f"{bigram}.embed.weight"], tokens.tolist()
    buckets = [len(table) - 1] + [((36313 * x) ^ (27191 * before)) % (len(table) - 1) for before, x in zip(ids, ids[1:])]
    u = p["tok_emb.weight"][tokens] + p[f"{bigram}.scale"] * (table[buckets] @ p[f"{bigram}.proj.weight"].T)
    n = norm(u)
    g = torch.sigmoid(p[f"{smear}.gate"])
    x0 = torch.stack([(1 - g) * n[t] + (g * n[t - 1] if t else 0) for t in range(len(n))])
    e = p["ve_shared.scale"] * (p["ve_shared.embed.weight"][tokens] @ p["ve_shared.proj.weight"].T)
    positions = torch.arange(len(tokens))

    h, outputs = x0, []
    for layer in range(layers):
        b = {name.removeprefix(f"blocks.{layer}."): value for name, value in p.items() if name.startswith(f"blocks.{layer}.")}
        i = layer - layers // 2
        if 0 <= i < layers // 2:
            skip = p["skip_weights"][i] * outputs.pop()
            if gepa:
                gate = torch.sigmoid(p["skip_gates"][i])
                h = gate * h + (1 - gate) * skip
            else:
                h = h + skip
        h = b["resid_mix"][0] * h + b["resid_mix"][1] * x0
        a = norm(h) * (layer + 1) ** -0.5
        q = rotary(norm(project_heads(a, b["attn.c_q.weight"], head_dim)), positions, rope_dims, base) * b["attn.q_gain"][:, None]
        k = rotary(norm(project_heads(a, b["attn.c_k.weight"], head_dim)), positions, rope_dims, base)
        v = a @ b["attn.c_v.weight"].T
        if layer in ve_layers:
            v = v + p[f"ve_layer_scales.{ve_layers.index(layer)}"] * e
        y = attend(q, k, v.reshape(len(a), -1, head_dim), segment, exclusive=layer >= xsa_from)
        h = h + b["attn_scale"] * (y.flatten(1) @ b["attn.proj.weight"].T)
        hidden = (norm(h) * (layer + 1) ** -0.5) @ b[f"mlp.{up}.weight"].T
        active = torch.relu(hidden) ** 2
        if gepa:
            active = b["mlp.scale"] * active + b["mlp.bias"]
        h = h + b["mlp_scale"] * (active @ b[f"mlp.{down}.weight"].T)
        if layer < layers // 2:
            outputs.append(h)
    return loss_of(norm(h) @ p["tok_emb.weight"].T, targets)


def caseops(p, tokens, targets, segment, *, looped, head_dim, rope_dims, gate_scale, order, first_lane, correct=uncorrected):
    """Sections 1.5 to 1.11 of the CaseOps specification. `order` is the looped execution order. Each loss of one sequence.

    correct(visit, product, input) is added to the products q, k, v, o and mlp of every visit, and to the head's (visit None)
    """
    layers = len({name.split(".")[1] for name in p if name.startswith("blocks.")})
    e, w, lam = p["tok_emb.weight"][tokens], p["smear_gate.weight"][0], p["smear_lambda"][0]
    smeared = [e[0]]
    for t in range(1, len(tokens)):
        keep = 0.0 if tokens[t] == 1 else 1.0
        smeared.append(e[t] + keep * lam * torch.sigmoid(e[t, : len(w)] @ w) * e[t - 1])
    x = x0 = norm(torch.stack(smeared))
    positions = torch.arange(len(tokens))

    def attention(visit, i, n):
        b = f"blocks.{i}.attn."

        def project(name, product):
            y = n @ p[b + name].T + correct(visit, product, n)
            return y.reshape(len(n), -1, head_dim)

        q = rotary(norm(project("c_q.weight", "q")), positions, rope_dims, 10000.0) * p[b + "q_gain"][:, None]
        k = rotary(norm(project("c_k.weight", "k")), positions, rope_dims, 10000.0)
        y = attend(q, k, project("c_v.weight", "v"), segment, exclusive=True)
        gate = torch.sigmoid(gate_scale * (n[:, : p[b + "attn_gate_w"].shape[1]] @ p[b + "attn_gate_w"].T))
        return p[f"blocks.{i}.attn_scale"] * ((gate[..., None] * y).flatten(1) @ p[b + "proj.weight"].T + correct(visit, "o", n))

    def mlp(visit, i, m):
        u = m @ p[f"blocks.{i}.mlp.fc.weight"].T
        return p[f"blocks.{i}.mlp_scale"] * (
            torch.where(u > 0, u * u, u * u / 4) @ p[f"blocks.{i}.mlp.proj.weight"].T + correct(visit, "mlp", m)
        )

    visits = order if looped else list(range(layers))
    half = len(visits) // 2
    stack = []
    for visit, i in enumerate(visits[:half]):
        mix, c = p[f"blocks.{i}.resid_mix"], 1 / math.sqrt(i + 1)
        x_in = mix[0] * x + mix[1] * x0
        x = x_in + attention(visit, i, c * norm(x_in))
        x = x + mlp(visit, i, c * norm(x))
        stack.append(x)
    lanes = None
    for s, i in enumerate(visits[half:]):
        visit = half + s
        if i == first_lane:
            lanes = [x, x]
        if stack:
            gamma = torch.sigmoid(p["skip_gates"][s])
            merged = (1 - gamma) * (p["skip_weights"][s] * stack.pop()) + gamma * (lanes[0] if lanes else x)
            if lanes:
                lanes[0] = merged
            else:
                x = merged
        mix, c = p[f"blocks.{i}.resid_mix"], 1 / math.sqrt(i + 1)
        if lanes:
            a = attention(visit, i, c * norm(mix[0] * lanes[0] + mix[1] * x0))
            m = mlp(visit, i, c * norm(lanes[1]))
            rho, pi = p["parallel_resid_lambdas"][i], p["parallel_post_lambdas"][i]
            lanes = [rho[j] * lanes[j] + pi[0, j] * a + pi[1, j] * m for j in (0, 1)]
        else:
            x_in = mix[0] * x + mix[1] * x0
            x = x_in + attention(visit, i, c * norm(x_in))
            x = x + mlp(visit, i, c * norm(x))
    h = norm((lanes[0] + lanes[1]) / 2)
    return losses_of(h @ p["tok_emb.weight"].T + correct(None, "head", h), targets)
