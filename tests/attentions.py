"""Attention of two heads in plain operators, with one thing or another written differently, and what each is read as."""

from __future__ import annotations

from collections.abc import Sequence

WEIGHTS = {
    "wq": "float[4,8]",
    "bq": "float[8]",
    "wk": "float[4,8]",
    "wv": "float[4,8]",
    "wo": "float[8,3]",
    "scale = {0.5}": "float",
    "heads = {0, 0, 2, 4}": "int64[4]",
    "flat = {0, 0, 8}": "int64[3]",
}
STEPS = {
    "q": "q0 = MatMul(x, wq) q = Add(q0, bq)",
    "qt": "qh = Reshape(q, heads) qt = Transpose<perm=[0,2,1,3]>(qh)",
    "k": "k = MatMul(x, wk)",
    "kt": "kh = Reshape(k, heads) kt = Transpose<perm=[0,2,3,1]>(kh)",
    "v": "v = MatMul(x, wv)",
    "vt": "vh = Reshape(v, heads) vt = Transpose<perm=[0,2,1,3]>(vh)",
    "s0": "[score] s0 = MatMul(qt, kt)",
    "s": "s = Mul(s0, scale)",
    "p": "p = Softmax<axis=-1>(s)",
    "o": "o = MatMul(p, vt) ot = Transpose<perm=[0,2,1,3]>(o)",
    "y": "h = Reshape(ot, flat) y = MatMul(h, wo)",
}
PAIRS, VALUES = "a: k[2] 8 > pairs of score", "b: h[2] 8 > y"
NOT_LINEAR = "MatMul 'score' contracts them with a tensor that no weight makes linearly"
NOT_LEVEL = "MatMul 'score' contracts two computed tensors"


def attention(
    read: Sequence[str] = (PAIRS, VALUES),
    takes: str = "float[N,5,4] x",
    gives: str = "float[N,5,3] y",
    weights: dict[str, str] | None = None,
    **steps: str,
) -> tuple[str, list[str]]:
    """A graph as text, in which these weights are added or replaced, and these steps written so; and what it is read as."""
    declared = ", ".join(f"{kind} {name}" for name, kind in (WEIGHTS | (weights or {})).items())
    assert steps.keys() <= STEPS.keys()
    return f"({takes}) => ({gives}) <{declared}> {{ {' '.join((STEPS | steps).values())} }}", list(read)


def rotated(name: str, moved: str) -> str:
    """Two halves of the channels of each head rotated by the place."""
    return f"""
        {name}1 = Slice({moved}, nought, half, last) {name}2 = Slice({moved}, half, end, last) {name}3 = Neg({name}2)
        {name}4 = Concat<axis=3>({name}3, {name}1) {name}5 = Mul({moved}, cos) {name}6 = Mul({name}4, sin)
        {name}7 = Add({name}5, {name}6)"""


def root_mean_square(name: str, moved: str) -> str:
    """Each head normalised, and scaled by channel, as exporters write it."""
    return f"""
        {name}1 = Mul({moved}, {moved}) {name}2 = ReduceMean({name}1, last) {name}3 = Add({name}2, scale)
        {name}4 = Sqrt({name}3) {name}5 = Div({moved}, {name}4) {name}6 = Mul({name}5, gain)"""


ROTARY = {
    "cos": "float[5,4]",
    "sin": "float[5,4]",
    "nought = {0}": "int64[1]",
    "half = {2}": "int64[1]",
    "end = {4}": "int64[1]",
    "last = {3}": "int64[1]",
}
WHOLE = ["a: h[2] 8 > y"]
QUERY, KEY = "qh = Reshape(q, heads) q1 = Transpose<perm=[0,2,1,3]>(qh)", "kh = Reshape(k, heads)"

ATTENTIONS = {
    "attention": attention(s0="qs = Mul(qt, scale) [score] s0 = MatMul(qs, kt)", s="s = Identity(s0)"),
    "attention whose queries have a bias for each head": attention(
        weights={"hb": "float[2,4]"}, qt="qh = Reshape(q, heads) qb = Add(qh, hb) qt = Transpose<perm=[0,2,1,3]>(qb)"
    ),
    "attention whose queries and keys have a bias for each head": attention(
        ["a: k2.before[2] 8 > pairs of score", VALUES],
        weights={"hq": "float[2,1,4]", "hk": "float[2,1,4]"},
        qt=f"{QUERY} qt = Add(q1, hq)",
        kt=f"{KEY} k1 = Transpose<perm=[0,2,1,3]>(kh) k2 = Add(hk, k1) kt = Transpose<perm=[0,1,3,2]>(k2)",
    ),
    "attention whose queries have a table of places for each head": attention(
        weights={"pos": "float[2,5,4]"}, s0="qs = Add(qt, pos) [score] s0 = MatMul(qs, kt)"
    ),
    "attention whose queries have a gain for each channel": attention(
        [*WHOLE, f"whole rows: {NOT_LINEAR}"],
        weights={"gain": "float[4]"},
        s0="qs = Mul(qt, gain) [score] s0 = MatMul(qs, kt)",
    ),
    "attention whose values have a gain for each channel": attention(
        weights={"gain": "float[4]"}, o="vg = Mul(vt, gain) o = MatMul(p, vg) ot = Transpose<perm=[0,2,1,3]>(o)"
    ),
    "attention whose queries and keys are normalised": attention(
        [*WHOLE, "whole rows: LayerNormalization 'qn' normalises across this axis"],
        weights={"gain": "float[4]", "bias": "float[4]"},
        qt=f"{QUERY} [qn] qt = LayerNormalization<axis=-1>(q1, gain, bias)",
        kt=f"{KEY} [kn] k1 = LayerNormalization<axis=-1>(kh, gain, bias) kt = Transpose<perm=[0,2,3,1]>(k1)",
    ),
    "attention whose queries and keys are normalised step by step": attention(
        [*WHOLE, f"whole rows: {NOT_LINEAR}"],
        weights={"gain": "float[4]", "last = {3}": "int64[1]"},
        qt=f"{QUERY} {root_mean_square('qn', 'q1')}",
        kt=f"{KEY} {root_mean_square('kn', 'kh')} kt = Transpose<perm=[0,2,3,1]>(kn6)",
        s0="[score] s0 = MatMul(qn6, kt)",
    ),
    "attention with rotary positions": attention(
        [*WHOLE, f"whole rows: {NOT_LINEAR}"],
        weights=ROTARY,
        s0=f"""kr = Transpose<perm=[0,1,3,2]>(kt) {rotated("q", "qt")} {rotated("k", "kr")}
            k8 = Transpose<perm=[0,1,3,2]>(k7) [score] s0 = MatMul(q7, k8)""",
    ),
    "attention with a table of places added to its scores": attention(
        weights={"table": "float[1,2,5,5]"}, s="s1 = Mul(s0, scale) s = Add(s1, table)"
    ),
    "attention with places looked up for its scores": attention(
        takes="float[N,5,4] x, int64[5,5] near",
        weights={"table": "float[7,2]"},
        s="t = Gather(table, near) tt = Transpose<perm=[2,0,1]>(t) s1 = Mul(s0, scale) s = Add(s1, tt)",
    ),
    "attention whose heads are gated": attention(
        weights={"wg": "float[4,2]", "three = {3}": "int64[1]"},
        o="""g0 = MatMul(x, wg) g1 = Sigmoid(g0) g2 = Unsqueeze(g1, three) o = MatMul(p, vt)
            o1 = Transpose<perm=[0,2,1,3]>(o) ot = Mul(o1, g2)""",
    ),
    "attention whose heads are gated by what is read elsewhere": attention(
        [PAIRS, "b: g1[2] 2 > y2", "b: h[2] 8 > y1", "- Mul 'ot' joins them with a computed tensor that has no units there"],
        weights={"wg": "float[4,2]", "wz": "float[2,3]", "three = {3}": "int64[1]"},
        o="""g0 = MatMul(x, wg) g1 = Sigmoid(g0) g2 = Unsqueeze(g1, three) o = MatMul(p, vt)
            o1 = Transpose<perm=[0,2,1,3]>(o) ot = Mul(o1, g2)""",
        y="h = Reshape(ot, flat) y1 = MatMul(h, wo) y2 = MatMul(g1, wz) y = Add(y1, y2)",
    ),
    "attention whose queries and keys are scaled by head": attention(
        weights={"hq": "float[2,1,1]", "hk": "float[2,1,1]"},
        s0="qs = Mul(qt, hq) ks = Mul(kt, hk) [score] s0 = MatMul(qs, ks)",
    ),
    "attention whose queries are read elsewhere": attention(
        [f"a: q[2] 8 > hz ! {NOT_LINEAR}", "b: hh[2] 8 > y"],
        weights={"w88": "float[8,8]"},
        y="h = Reshape(ot, flat) hz = MatMul(q, w88) hs2 = Relu(hz) hh = Add(h, hs2) y = MatMul(hh, wo)",
    ),
    "attention whose keys are read elsewhere": attention(
        ["a: k[2] 8 > hz, pairs of score", "b: hh[2] 8 > y"],
        weights={"w88": "float[8,8]"},
        y="h = Reshape(ot, flat) hz = MatMul(k, w88) hs2 = Relu(hz) hh = Add(h, hs2) y = MatMul(hh, wo)",
    ),
    "attention whose keys are its values": attention(
        [PAIRS, "a: h[2] 8 > y"], v="", vt="vh = Reshape(k, heads) vt = Transpose<perm=[0,2,1,3]>(vh)"
    ),
    "attention under a mask": attention(
        takes="float[N,5,4] x, bool[N,1,5,5] c",
        weights={"mask = {-10000.0}": "float"},
        p="sm = Where(c, s, mask) p = Softmax<axis=-1>(sm)",
    ),
    "attention in which some scores are set to what is no mask": attention(
        [*WHOLE, f"whole rows: {NOT_LEVEL}"],
        takes="float[N,5,4] x, bool[N,1,5,5] c",
        p="sm = Where(c, s, scale) p = Softmax<axis=-1>(sm)",
    ),
    "attention whose scores are scaled unevenly": attention(
        [*WHOLE, f"whole rows: {NOT_LEVEL}"],
        weights={"kb": "float[1,1,1,5]"},
        p="sm = Mul(s, kb) p = Softmax<axis=-1>(sm)",
    ),
    "attention normalised over the queries, which are keys then": attention(
        ["a: q[2] 8 > pairs of score", VALUES], p="p = Softmax<axis=-2>(s)"
    ),
    "attention whose heads are swapped": attention(
        [PAIRS, "b: hh[2] 8 > y"],
        weights={"swap = {1, 0}": "int64[2]"},
        y="oo = Gather<axis=2>(ot, swap) hh = Reshape(oo, flat) y = MatMul(hh, wo)",
    ),
    "attention whose heads are summed": attention(
        [PAIRS, "b: oo[2] 4 > y", "- ReduceSum 'oo' reduces over this axis"],
        weights={"two = {2}": "int64[1]", "wo": "float[4,3]"},
        y="oo = ReduceSum<keepdims=0>(ot, two) y = MatMul(oo, wo)",
    ),
    "attention in which all heads share a query": attention(
        [
            *WHOLE,
            "- MatMul 'score' contracts several of them with one channel",
            "whole rows: MatMul 'score' contracts several of them with one channel",
        ],
        weights={"wq": "float[4,4]", "one = {1}": "int64[1]"},
        q="q4 = MatMul(x, wq)",
        qt="qt = Unsqueeze(q4, one)",
    ),
    "attention in which all heads share a key": attention(
        ["a: k4[2] 4 > pairs of score", VALUES],
        weights={"wk": "float[4,4]", "one = {1}": "int64[1]"},
        k="k4 = MatMul(x, wk)",
        kt="ku = Unsqueeze(k4, one) kt = Transpose<perm=[0,1,3,2]>(ku)",
    ),
    "attention whose scores are a model output": attention(
        [*WHOLE, f"whole rows: {NOT_LEVEL}"], gives="float[N,5,3] y, float[N,2,5,5] s"
    ),
    "attention whose heads are scaled": attention(
        [PAIRS, "b: hh[2] 8 > y"],
        weights={"hsc": "float[1,1,2,1]"},
        y="oh = Mul(ot, hsc) hh = Reshape(oh, flat) y = MatMul(hh, wo)",
    ),
    "attention that multiplies keys by queries": attention(
        qt="qh = Reshape(q, heads) qt = Transpose<perm=[0,2,3,1]>(qh)",
        kt="kh = Reshape(k, heads) kt = Transpose<perm=[0,2,1,3]>(kh)",
        s0="[score] s0 = MatMul(kt, qt)",
        p="st = Transpose<perm=[0,1,3,2]>(s) p = Softmax<axis=-1>(st)",
    ),
    "attention in which queries and keys share a weight": attention(
        takes="float[N,5,4] x, float[N,5,4] x2", k="k = MatMul(x2, wq)"
    ),
    "a token in front of the queries": attention(
        [*WHOLE, f"whole rows: {NOT_LINEAR}"],
        takes="float[2,5,4] x",
        gives="float[2,6,3] y",
        weights={"qc": "float[2,1,8]"},
        q="q0 = MatMul(x, wq) q1 = Add(q0, bq) q = Concat<axis=1>(qc, q1)",
    ),
    "a token in front of keys and values": attention(
        takes="float[2,5,4] x",
        gives="float[2,5,3] y",
        weights={"qc": "float[2,1,8]"},
        k="k1 = MatMul(x, wk) k = Concat<axis=1>(qc, k1)",
        v="v1 = MatMul(x, wv) v = Concat<axis=1>(qc, v1)",
    ),
    "queries of which a part is read": attention(
        takes="float[2,5,4] x",
        gives="float[2,4,3] y",
        weights={"nine = {9}": "int64[1]", "one = {1}": "int64[1]"},
        q="q0 = MatMul(x, wq) q1 = Add(q0, bq) q = Slice(q1, one, nine, one)",
    ),
    "attention over units": attention(
        ["a: u[2] 6 > q0, k, v", "b: k[2] 8 > pairs of score", "c: h[2] 8 > y"],
        weights={"wu": "float[4,6]", "wq": "float[6,8]", "wk": "float[6,8]", "wv": "float[6,8]"},
        q="u0 = MatMul(x, wu) u = Tanh(u0) q0 = MatMul(u, wq) q = Identity(q0)",
        k="k = MatMul(u, wk)",
        v="v = MatMul(u, wv)",
    ),
}
