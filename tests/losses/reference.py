"""Slow, obvious float64 references: Python loops over utterances and frames."""

import math

import torch

#: With these weights factorized KL equals plain KL, if both are summed over frames instead of averaged.
ALL_WEIGHTS = dict(blank_weight=1.0, nonblank_weight=1.0, nonblank_on_blank_weight=1.0)


def softmax(logits, temperature=1.0):
    x = [v / temperature for v in logits]
    top = max(x)
    e = [math.exp(v - top) for v in x]
    return [v / sum(e) for v in e]


def divergence(p, q):
    """Σ p log(p/q), with 0 log 0 = 0."""
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


def rows(student, teacher, counted, temperature=1.0):
    """Yield (p, q, teacher argmax) of each frame that counts."""
    for s, t, c in zip(student.tolist(), teacher.tolist(), counted.tolist()):
        for s_frame, t_frame, counts in zip(s, t, c):
            if counts:
                yield softmax(t_frame, temperature), softmax(s_frame, temperature), t_frame.index(max(t_frame))


def binary(p, q, blank):
    return divergence([p[blank], 1 - p[blank]], [q[blank], 1 - q[blank]])


def tokens(p, q, blank):
    """The non-blank KL of one frame, without the factor 1 − b."""
    rest = [k for k in range(len(p)) if k != blank]
    return divergence([p[k] / (1 - p[blank]) for k in rest], [q[k] / (1 - q[blank]) for k in rest])


def average(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def kl(student, teacher, counted, blank_id=0, temperature=1.0):
    return average(divergence(p, q) for p, q, _ in rows(student, teacher, counted, temperature))


def blank_kl(student, teacher, counted, blank_id=0, temperature=1.0):
    return average(binary(p, q, blank_id) for p, q, _ in rows(student, teacher, counted, temperature))


def factorized_kl(student, teacher, counted, blank_id=0, temperature=1.0, weights=(1.0, 1.0, 0.0)):
    every = list(rows(student, teacher, counted, temperature))
    nb = [(1 - p[blank_id]) * tokens(p, q, blank_id) for p, q, best in every if best != blank_id]
    bl = [(1 - p[blank_id]) * tokens(p, q, blank_id) for p, q, best in every if best == blank_id]
    blank = average(binary(p, q, blank_id) for p, q, _ in every)
    return weights[0] * blank + weights[1] * average(nb) + weights[2] * average(bl)


def softmax_l2(student, teacher, counted, blank_id=0, temperature=1.0):
    return average(sum((a - b) ** 2 for a, b in zip(p, q)) for p, q, _ in rows(student, teacher, counted, temperature))


def guided_ctc(student, teacher, counted, blank_id=0, temperature=1.0, log=False):
    spikes = [q[best] for _, q, best in rows(student, teacher, counted, temperature) if best != blank_id]
    return -average(math.log(q) if log else q for q in spikes)


def guided_ctc_log(student, teacher, counted, blank_id=0, temperature=1.0):
    return guided_ctc(student, teacher, counted, blank_id, temperature, log=True)


def consistency(first, second, counted, blank_id=0, temperature=1.0):
    return 0.5 * (kl(first, second, counted, 0, temperature) + kl(second, first, counted, 0, temperature))


def delays(student, teacher, counted, lengths, temperature=1.0, max_delay=4):
    """Yield {delay: mean KL} of each utterance, for the delays that leave it at least one frame."""
    for s, t, c, length in zip(student.tolist(), teacher.tolist(), counted.tolist(), lengths.tolist()):
        means = {}
        for d in range(max_delay + 1):
            frames = [i for i in range(length - d) if c[i]]
            if frames:
                pairs = [(softmax(t[i], temperature), softmax(s[i + d], temperature)) for i in frames]
                means[d] = average(divergence(p, q) for p, q in pairs)
        yield means


def delayed_kl(student, teacher, counted, blank_id=0, temperature=1.0, max_delay=4, lengths=None):
    lengths = counted.sum(1) if lengths is None else lengths
    least = [min(m.values(), default=0) for m in delays(student, teacher, counted, lengths, temperature, max_delay)]
    counts = counted.sum(1).tolist()
    return sum(n * x for n, x in zip(counts, least)) / sum(counts)


def nonblank_mass(logits, blank_id=0):
    return torch.tensor([[1 - softmax(z)[blank_id] for z in row] for row in logits.tolist()], dtype=torch.float64)


def activation_energy(hidden):
    return torch.tensor([[average(v * v for v in h) for h in row] for row in hidden.tolist()], dtype=torch.float64)


def weighted_representation(student, teacher, counted, weights):
    every = [
        (w, sum((u - v) ** 2 for u, v in zip(x, y)) / len(x))
        for xs, ys, ws, cs in zip(student.tolist(), teacher.tolist(), weights.tolist(), counted.tolist())
        for x, y, w, c in zip(xs, ys, ws, cs)
        if c
    ]
    scale = average(w for w, _ in every)
    return average(w / scale * d for w, d in every) if scale else 0.0


def factorized_representation(student, teacher, logits, counted, distance, blank_id=0):
    halves = ([], [])
    for b in range(len(counted)):
        for t in range(len(counted[b])):
            if not counted[b][t]:
                continue
            x, y, z = student[b, t].tolist(), teacher[b, t].tolist(), logits[b, t].tolist()
            if distance == "l2":
                d = sum((u - v) ** 2 for u, v in zip(x, y)) / len(x)
            else:
                d = 1 - sum(u * v for u, v in zip(x, y)) / math.hypot(*x) / math.hypot(*y)
            halves[z.index(max(z)) == blank_id].append(d)
    return 0.5 * (average(halves[0]) + average(halves[1]))


def batch(lengths=(7, 4, 1), width=6, scale=3.0, seed=0, dtype=torch.float64):
    """Random student and teacher (B, T, width), lengths and their mask; about half the teacher's frames are blank."""
    g = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths), width)
    student, teacher = (torch.randn(shape, generator=g, dtype=torch.float64) * scale for _ in range(2))
    # Blank wins on every other frame by a small margin, so that both blank and non-blank frames occur.
    teacher[:, ::2, 0] = teacher[:, ::2].amax(-1) + 0.3
    lengths = torch.tensor(lengths)
    mask = torch.tensor([[t < n for t in range(shape[1])] for n in lengths.tolist()])
    return student.to(dtype), teacher.to(dtype), lengths, mask
