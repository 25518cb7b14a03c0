"""Graphs of the kinds that networks are made of, and what each is read as; they are compiled in `test_flow`."""

from __future__ import annotations

from attentions import ATTENTIONS

GRAPHS = {
    "a concatenation": (
        """(float[N,4] x) => (float[N,3] y)
        <float[4,5] w1, float[4,3] w2, float[8,3] w3> {
            a = MatMul(x, w1)
            b = MatMul(x, w2)
            h = Concat<axis=1>(a, b)
            y = MatMul(h, w3)
        }""",
        ["a: h[1] 8 > y"],
    ),
    "a concatenation with a model input, which stays": (
        """(float[N,4] x) => (float[N,3] y)
        <float[4,5] w1, float[9,3] w2> {
            a = MatMul(x, w1)
            h = Concat<axis=1>(x, a)
            y = MatMul(h, w2)
        }""",
        ["a: h[1] 9 > y", "- Concat 'h' joins them with others that cannot be cut"],
    ),
    "a concatenation of one tensor with itself": (
        """(float[N,4] x) => (float[N,3] y)
        <float[4,5] w1, float[10,3] w2> {
            a = MatMul(x, w1)
            h = Concat<axis=1>(a, a)
            y = MatMul(h, w2)
        }""",
        ["a: h[1] 10 > y"],
    ),
    "a skip connection over a bottleneck": (
        """(float[N,3,8,8] x) => (float[N,2,8,8] y)
        <float[4,3,3,3] w1, float[6,4,3,3] w2, float[6,4,2,2] w3, float[5,8,3,3] w4, float[2,5,1,1] w5> {
            a = Conv<pads=[1,1,1,1]>(x, w1)
            down = MaxPool<kernel_shape=[2,2],strides=[2,2]>(a)
            b = Conv<pads=[1,1,1,1]>(down, w2)
            up = ConvTranspose<strides=[2,2]>(b, w3)
            h = Concat<axis=1>(a, up)
            c = Conv<pads=[1,1,1,1]>(h, w4)
            y = Conv(c, w5)
        }""",
        ["a: down[1] 4 > b", "b: b[1] 6 > up", "a: h[1] 8 > c", "c: c[1] 5 > y"],
    ),
    "a split": (
        """(float[N,4] x) => (float[N,3] y, float[N,2] z)
        <float[4,8] w1, int64[2] parts = {5, 3}, float[5,3] w2, float[3,2] w3> {
            a = MatMul(x, w1)
            b, c = Split<axis=1>(a, parts)
            y = MatMul(b, w2)
            z = MatMul(c, w3)
        }""",
        ["a: b[1] 5 > y", "a: c[1] 3 > z"],
    ),
    "a gate of two slices": (
        """(float[N,4] x) => (float[N,3] y)
        <float[4,8] w1, float[4,3] w2, int64[1] one = {1}, int64[1] nought = {0}, int64[1] four = {4},
         int64[1] end = {9223372036854775807}> {
            a = MatMul(x, w1)
            b = Slice(a, nought, four, one)
            c = Slice(a, four, end, one)
            s = Sigmoid(b)
            h = Mul(s, c)
            y = MatMul(h, w2)
        }""",
        ["a: h[1] 4 > y"],
    ),
    "a channel shuffle": (
        """(float[N,3,4,4] x) => (float[N,5,4,4] y)
        <float[8,3,1,1] w1, float[8,4,1,1] w2, int64[5] apart = {0, 2, 4, 4, 4}, int64[4] together = {0, 8, 4, 4},
         float[5,8,1,1] w3> {
            a = Conv(x, w1)
            g = Conv<group=2>(a, w2)
            r = Reshape(g, apart)
            t = Transpose<perm=[0,2,1,3,4]>(r)
            h = Reshape(t, together)
            y = Conv(h, w3)
        }""",
        ["a: a[1] 8 > g", "b: g[1] 8 > y"],
    ),
    "a convolution in groups": (
        """(float[N,3,6,6] x) => (float[N,5,4,4] y)
        <float[8,3,1,1] w1, float[6,4,3,3] w2, float[6] b, float[5,6,1,1] w3> {
            h = Conv(x, w1)
            k = Conv<group=2>(h, w2, b)
            y = Conv(k, w3)
        }""",
        ["a: h[1] 8 > k", "b: k[1] 6 > y"],
    ),
    "a convolution in groups that pads": (
        """(float[N,3,6,6] x) => (float[N,5,6,6] y)
        <float[8,3,1,1] w1, float[6,4,3,3] w2, float[6] b, float[5,6,1,1] w3> {
            h = Conv(x, w1)
            k = Conv<group=2,pads=[1,1,1,1]>(h, w2, b)
            y = Conv(k, w3)
        }""",
        ["a: h[1] 8 > k", "b: k[1] 6 > y"],
    ),
    "a depthwise convolution of two filters a channel": (
        """(float[N,3,6,6] x) => (float[N,5,4,4] y)
        <float[4,3,1,1] w1, float[8,1,3,3] d, float[8] b, float[5,8,1,1] w2> {
            a = Conv(x, w1)
            h = Conv<group=4>(a, d, b)
            y = Conv(h, w2)
        }""",
        ["a: h[1] 8 > y"],
    ),
    "a convolution behind positions that are turned": (
        """(float[N,3,6,7] x) => (float[N,5,A,B] y) <float[8,3,1,1] w1, float[5,8,3,3] w2> {
            a = Conv(x, w1)
            h = Relu(a)
            t = Transpose<perm=[0,1,3,2]>(h)
            y = Conv<pads=[1,1,0,0]>(t, w2)
        }""",
        ["a: h[1] 8 > y"],
    ),
    "squeeze and excitation": (
        """(float[N,3,6,6] x) => (float[N,5,6,6] y)
        <float[8,3,1,1] w1, float[2,8,1,1] w2, float[2] b2, float[8,2,1,1] w3, float[8] b3, float[5,8,1,1] w4> {
            h = Conv(x, w1)
            p = GlobalAveragePool(h)
            s = Conv(p, w2, b2)
            r = Relu(s)
            e = Conv(r, w3, b3)
            g = HardSigmoid(e)
            k = Mul(h, g)
            y = Conv(k, w4)
        }""",
        ["a: p[1] 8 > s", "b: r[1] 2 > e", "a: k[1] 8 > y"],
    ),
    "pixels shuffled": (
        """(float[N,3,4,4] x) => (float[N,2,8,8] y)
        <float[12,3,3,3] w1, float[12] b1, float[2,3,3,3] w2> {
            a = Conv<pads=[1,1,1,1]>(x, w1, b1)
            h = DepthToSpace<blocksize=2,mode="CRD">(a)
            y = Conv<pads=[1,1,1,1]>(h, w2)
        }""",
        ["a: h[1] 3 > y"],
    ),
    "pixels shuffled by hand": (
        """(float[N,3,4,4] x) => (float[N,2,8,8] y)
        <float[12,3,3,3] w1, float[12] b1, int64[6] apart = {0, 3, 2, 2, 4, 4}, int64[4] together = {0, 3, 8, 8},
         float[2,3,3,3] w2> {
            a = Conv<pads=[1,1,1,1]>(x, w1, b1)
            r = Reshape(a, apart)
            t = Transpose<perm=[0,1,4,2,5,3]>(r)
            h = Reshape(t, together)
            y = Conv<pads=[1,1,1,1]>(h, w2)
        }""",
        ["a: h[1] 3 > y"],
    ),
    "pixels unshuffled": (
        """(float[N,3,4,4] x) => (float[N,2,2,2] y)
        <float[4,3,1,1] w1, float[2,16,1,1] w2> {
            a = Conv(x, w1)
            h = SpaceToDepth<blocksize=2>(a)
            y = Conv(h, w2)
        }""",
        ["a: h[1] 16 > y"],
    ),
    "an embedding": (
        """(int64[N,5] x) => (float[N,5,3] y)
        <float[7,8] table, float[8,3] w> {
            h = Gather(table, x)
            y = MatMul(h, w)
        }""",
        ["a: h[2] 8 > y"],
    ),
    "an embedding, tied to what it is read by": (
        """(int64[N,5] x) => (float[N,5,7] y)
        <float[7,8] table> {
            h = Gather(table, x)
            t = Transpose(table)
            y = MatMul(h, t)
        }""",
        ["a: h[2] 8 > y"],
    ),
    "normalisation by group": (
        """(float[N,3,4,4] x) => (float[N,2,4,4] y)
        <float[6,3,1,1] w1, float[6] s, float[6] b, float[2,6,1,1] w2> {
            a = Conv(x, w1)
            h = GroupNormalization<num_groups=3>(a, s, b)
            y = Conv(h, w2)
        }""",
        ["a: h[1] 6 > y"],
    ),
    "normalisation by group, as exporters write it": (
        """(float[N,3,4,4] x) => (float[N,2,4,4] y)
        <float[6,3,1,1] w1, int64[3] rows = {0, 3, -1}, float[3] one, float[3] nought, int64[4] back = {0, 6, 4, 4},
         float[6,1,1] s, float[6,1,1] b, float[2,6,1,1] w2> {
            a = Conv(x, w1)
            r = Reshape(a, rows)
            n = InstanceNormalization(r, one, nought)
            i = Reshape(n, back)
            m = Mul(i, s)
            h = Add(m, b)
            y = Conv(h, w2)
        }""",
        ["a: h[1] 6 > y", "whole rows: InstanceNormalization 'n' normalises across this axis"],
    ),
    "attention that packs queries, keys and values": (
        """(float[N,5,4] x) => (float[N,5,3] y)
        <float[4,24] w, float[24] b, int64[3] parts = {8, 8, 8}, int64[4] heads = {0, 0, 2, 4},
         int64[3] flat = {0, 0, 8}, float scale = {0.5}, float[8,3] wo> {
            a0 = MatMul(x, w)
            a = Add(a0, b)
            q, k, v = Split<axis=2>(a, parts)
            qh = Reshape(q, heads)
            qt = Transpose<perm=[0,2,1,3]>(qh)
            kh = Reshape(k, heads)
            kt = Transpose<perm=[0,2,3,1]>(kh)
            [score] s0 = MatMul(qt, kt)
            s = Mul(s0, scale)
            p = Softmax<axis=-1>(s)
            vh = Reshape(v, heads)
            vt = Transpose<perm=[0,2,1,3]>(vh)
            o = MatMul(p, vt)
            ot = Transpose<perm=[0,2,1,3]>(o)
            h = Reshape(ot, flat)
            y = MatMul(h, wo)
        }""",
        ["a: k[2] 8 > pairs of score", "a: h[2] 8 > y"],
    ),
    "attention that packs queries, keys and values on an axis of their own": (
        """(float[N,5,4] x) => (float[N,5,3] y)
        <float[4,24] w, int64[5] heads = {0, 0, 3, 2, 4}, int64[3] flat = {0, 0, 8}, int64 first = {0},
         int64 second = {1}, int64 third = {2}, float[8,3] wo> {
            a = MatMul(x, w)
            r = Reshape(a, heads)
            t = Transpose<perm=[2,0,3,1,4]>(r)
            q = Gather<axis=0>(t, first)
            k = Gather<axis=0>(t, second)
            v = Gather<axis=0>(t, third)
            kt = Transpose<perm=[0,1,3,2]>(k)
            [score] s = MatMul(q, kt)
            p = Softmax<axis=-1>(s)
            o = MatMul(p, v)
            ot = Transpose<perm=[0,2,1,3]>(o)
            h = Reshape(ot, flat)
            y = MatMul(h, wo)
        }""",
        ["a: r.split.0.1[2] 8 > pairs of score", "a: h[2] 8 > y"],
    ),
    "attention in which heads share keys and values": (
        """(float[N,5,4] x) => (float[N,5,3] y)
        <float[4,16] wq, float[4,8] wk, float[4,8] wv, int64[4] four = {0, 0, 4, 4}, int64[4] two = {0, 0, 2, 4},
         int64[1] along = {2}, int64[5] wide = {1, 2, 2, 5, 4}, int64[4] back = {0, 4, 5, 4},
         int64[3] flat = {0, 0, 16}, float[16,3] wo> {
            q = MatMul(x, wq)
            qh = Reshape(q, four)
            qt = Transpose<perm=[0,2,1,3]>(qh)
            k = MatMul(x, wk)
            kh = Reshape(k, two)
            kt = Transpose<perm=[0,2,1,3]>(kh)
            ku = Unsqueeze(kt, along)
            ke = Expand(ku, wide)
            kr = Reshape(ke, back)
            kk = Transpose<perm=[0,1,3,2]>(kr)
            [score] s = MatMul(qt, kk)
            p = Softmax<axis=-1>(s)
            v = MatMul(x, wv)
            vh = Reshape(v, two)
            vt = Transpose<perm=[0,2,1,3]>(vh)
            vu = Unsqueeze(vt, along)
            ve = Expand(vu, wide)
            vr = Reshape(ve, back)
            o = MatMul(p, vr)
            ot = Transpose<perm=[0,2,1,3]>(o)
            h = Reshape(ot, flat)
            y = MatMul(h, wo)
        }""",
        ["a: k[2] 8 > pairs of score", "b: h[2] 16 > y"],
    ),
    "rotary positions": (
        """(float[N,5,4] x) => (float[N,5,5] y)
        <float[4,8] wq, float[4,8] wk, float[5,8] cos, float[5,8] sin, int64[1] nought = {0}, int64[1] half = {4},
         int64[1] end = {8}, int64[1] last = {2}> {
            q = MatMul(x, wq)
            q1 = Slice(q, nought, half, last)
            q2 = Slice(q, half, end, last)
            q3 = Neg(q2)
            q4 = Concat<axis=2>(q3, q1)
            q5 = Mul(q, cos)
            q6 = Mul(q4, sin)
            qr = Add(q5, q6)
            k = MatMul(x, wk)
            k1 = Slice(k, nought, half, last)
            k2 = Slice(k, half, end, last)
            k3 = Neg(k2)
            k4 = Concat<axis=2>(k3, k1)
            k5 = Mul(k, cos)
            k6 = Mul(k4, sin)
            kr = Add(k5, k6)
            kt = Transpose<perm=[0,2,1]>(kr)
            [score] s = MatMul(qr, kt)
            y = Softmax<axis=-1>(s)
        }""",
        ["- MatMul 'score' contracts them with a tensor that no weight makes linearly"],
    ),
    "a gated feed-forward block": (
        """(float[N,5,4] x) => (float[N,5,4] y)
        <float[4,8] w1, float[4,8] w2, float[8,4] w3> {
            a = MatMul(x, w1)
            s = Sigmoid(a)
            g = Mul(a, s)
            b = MatMul(x, w2)
            h = Mul(g, b)
            k = MatMul(h, w3)
            y = Add(x, k)
        }""",
        ["a: h[2] 8 > k", "- Add 'y' joins them with a computed tensor that has no units there"],
    ),
    "weights tied between branches": (
        """(float[N,4] x, float[N,4] x2) => (float[N,3] y, float[N,3] z)
        <float[4,8] w1, float[8] b, float[8,3] w> {
            h0 = MatMul(x, w1)
            h1 = Add(h0, b)
            h = Relu(h1)
            k0 = MatMul(x2, w1)
            k1 = Add(k0, b)
            k = Tanh(k1)
            y = MatMul(h, w)
            z = MatMul(k, w)
        }""",
        ["a: h[1] 8 > y", "b: k[1] 8 > z"],
    ),
    "a table of places added to tokens": (
        """(float[N,5,4] x) => (float[N,5,3] y)
        <float[4,8] w1, float[1,5,8] places, float[8,3] w2> {
            a = MatMul(x, w1)
            h = Add(a, places)
            y = MatMul(h, w2)
        }""",
        ["a: h[2] 8 > y"],
    ),
    "channels taken twice, and all of them": (
        """(float[N,4] x) => (float[N,3] y, float[N,2] z)
        <float[4,8] w1, int64[5] i={0,3,3,1,-1}, float[5,3] w2, float[8,2] w3> {
            a = MatMul(x, w1)
            h = Gather<axis=1>(a, i)
            y = MatMul(h, w2)
            z = MatMul(a, w3)
        }""",
        ["a: a[1] 8 > z", "a: h[1] 5 > y"],
    ),
    "channels of which a part is read": (
        """(float[N,4] x) => (float[N,3] y)
        <float[4,8] w1, int64[1] o={1}, int64[1] s={2}, int64[1] e={-1}, float[5,3] w2> {
            a = MatMul(x, w1)
            h = Slice(a, s, e, o)
            y = MatMul(h, w2)
        }""",
        ["a: h[1] 5 > y"],
    ),
    "a concatenation with a part of itself": (
        """(float[N,4] x) => (float[N,3] y)
        <float[4,8] w1, int64[1] o={1}, int64[1] s={2}, int64[1] e={-1}, float[13,3] w2> {
            a = MatMul(x, w1)
            b = Slice(a, s, e, o)
            h = Concat<axis=1>(a, b)
            y = MatMul(h, w2)
        }""",
        ["a: h[1] 13 > y"],
    ),
    "one weight that is reader and creator": (
        """(float[N,8] x) => (float[N,8] y)
        <float[8,8] w, float[8] b> {
            a = Gemm(x, w, b)
            h = Relu(a)
            c = Gemm(h, w, b)
            k = Relu(c)
            y = Gemm(k, w, b)
        }""",
        ["a: h[1] 8 > c", "b: k[1] 8 > y"],
    ),
    "one weight on both sides of a residual addition": (
        """(float[N,8] x) => (float[N,3] y)
        <float[8,8] w, float[8] b, float[8,3] w2> {
            a = Gemm(x, w, b)
            h = Relu(a)
            c = Gemm(h, w, b)
            k = Add(h, c)
            y = MatMul(k, w2)
        }""",
        ["a: h[1] 8 > c", "a: k[1] 8 > y"],
    ),
    "channels chosen by masks": (
        """(float[N,4] x, bool[N,1] c) => (float[N,3] y)
        <float[4,8] w1, float[4,8] w3, bool[8] m={1,0,1,0,1,1,0,0}, float z={0}, float[8,3] w2> {
            a = MatMul(x, w1)
            b = MatMul(x, w3)
            d = Where(m, a, b)
            h = Where(c, d, z)
            y = MatMul(h, w2)
        }""",
        ["a: h[1] 8 > y"],
    ),
    "a residual addition with channels padded": (
        """(float[N,3,6,6] x) => (float[N,5,A,B] y)
        <float[4,3,1,1] w1, float[8,4,3,3] w2, int64[8] pads={0,2,0,0,0,2,0,0}, float[5,8,3,3] w3> {
            a = Conv(x, w1)
            b = Conv<pads=[1,1,1,1]>(a, w2)
            p = Pad(a, pads)
            h = Add(p, b)
            y = Conv<pads=[1,1,1,1]>(h, w3)
        }""",
        ["a: a[1] 4 > b", "a: h[1] 8 > y", "- Pad 'p' joins them with others that cannot be cut"],
    ),
    "keys padded with zeros": (
        """(float[N,5,4] x) => (float[N,5,7] y)
        <float[4,8] wq, float[4,8] wk, int64[6] pads={0,1,0,0,1,0}> {
            q = MatMul(x, wq)
            k = MatMul(x, wk)
            kp = Pad(k, pads)
            kt = Transpose<perm=[0,2,1]>(kp)
            s = MatMul(q, kt)
            y = Softmax<axis=-1>(s)
        }""",
        ["a: kp[2] 8 > pairs of s"],
    ),
    "normalisation by channel before a padded convolution": (
        """(float[N,3,6,6] x) => (float[N,5,A,B] y)
        <float[8,3,1,1] w1, float[8] s, float[8] b, float[5,8,3,3] w2> {
            a = Conv(x, w1)
            n = InstanceNormalization(a, s, b)
            y = Conv<pads=[1,1,1,1]>(n, w2)
        }""",
        ["a: n[1] 8 > y"],
    ),
    "normalisation by group before a padded convolution": (
        """(float[N,3,6,6] x) => (float[N,5,A,B] y)
        <float[8,3,1,1] w1, float[8] s, float[8] b, float[5,8,3,3] w2> {
            a = Conv(x, w1)
            n = GroupNormalization<num_groups=4>(a, s, b)
            y = Conv<pads=[1,1,1,1]>(n, w2)
        }""",
        ["a: n[1] 8 > y"],
    ),
    "normalisation by group before a channel shuffle": (
        """(float[N,3,6,6] x) => (float[N,5,A,B] y)
        <float[8,3,1,1] w1, float[8] s, float[8] b, int64[5] ap={0,4,2,6,6}, int64[4] to={0,8,6,6},
         float[5,8,3,3] w2> {
            a = Conv(x, w1)
            n = GroupNormalization<num_groups=4>(a, s, b)
            r = Reshape(n, ap)
            t = Transpose<perm=[0,2,1,3,4]>(r)
            u = Reshape(t, to)
            y = Conv<pads=[1,1,1,1]>(u, w2)
        }""",
        ["a: n[1] 8 > y"],
    ),
    "a dense block": (
        """(float[N,3,6,6] x) => (float[N,5,A,B] y)
        <float[4,3,1,1] w1, float[4,4,3,3] w2, float[4,8,3,3] w4, float[5,12,3,3] w3> {
            a = Conv(x, w1)
            r = Relu(a)
            b = Conv<pads=[1,1,1,1]>(r, w2)
            h = Concat<axis=1>(r, b)
            s = Relu(h)
            c = Conv<pads=[1,1,1,1]>(s, w4)
            k = Concat<axis=1>(h, c)
            y = Conv<pads=[1,1,1,1]>(k, w3)
        }""",
        ["a: r[1] 4 > b", "a: s[1] 8 > c", "a: k[1] 12 > y"],
    ),
    "a residual stream read with padding at two sites": (
        """(float[N,3,6,6] x) => (float[N,5,A,B] y)
        <float[8,3,1,1] w1, float[8,8,3,3] w2, float[8,8,3,3] w4, float[5,8,3,3] w3> {
            a = Conv(x, w1)
            r = Relu(a)
            b = Conv<pads=[1,1,1,1]>(r, w2)
            s = Add(r, b)
            c = Conv<pads=[1,1,1,1]>(s, w4)
            t = Add(s, c)
            y = Conv<pads=[1,1,1,1]>(t, w3)
        }""",
        ["a: r[1] 8 > b", "a: s[1] 8 > c", "a: t[1] 8 > y"],
    ),
    "convolutions in two groups, then four": (
        """(float[N,3,6,6] x) => (float[N,5,A,B] y)
        <float[8,3,1,1] w1, float[8,4,3,3] w2, float[8,2,1,1] w4, float[5,8,1,1] w3> {
            a = Conv(x, w1)
            b = Conv<group=2>(a, w2)
            c = Conv<group=4>(b, w4)
            y = Conv(c, w3)
        }""",
        ["a: a[1] 8 > b", "b: b[1] 8 > c", "c: c[1] 8 > y"],
    ),
    "a residual addition between groups": (
        """(float[N,3,6,6] x) => (float[N,5,A,B] y)
        <float[8,3,1,1] w1, float[8,4,1,1] w2, float[8,2,1,1] w4, float[5,8,1,1] w3> {
            a = Conv(x, w1)
            b = Conv<group=2>(a, w2)
            s = Add(a, b)
            c = Conv<group=4>(s, w4)
            y = Conv(c, w3)
        }""",
        ["a: a[1] 8 > b", "a: s[1] 8 > c", "b: c[1] 8 > y"],
    ),
    "a concatenation read in groups": (
        """(float[N,3,6,6] x) => (float[N,5,A,B] y)
        <float[3,3,1,1] w1, float[5,3,1,1] w2, float[8,4,1,1] w4, float[5,8,1,1] w3> {
            a = Conv(x, w1)
            b = Conv(x, w2)
            s = Concat<axis=1>(a, b)
            c = Conv<group=2>(s, w4)
            y = Conv(c, w3)
        }""",
        ["a: s[1] 8 > c", "b: c[1] 8 > y"],
    ),
    "rows read in groups": (
        """(float[N,3,6,6] x) => (float[N,5,A,B] y)
        <float[3,3,1,1] w1, int64[4] sh={0,18,6,1}, float[4,9,1,1] w4, float[5,4,1,1] w3> {
            a = Conv(x, w1)
            r = Reshape(a, sh)
            c = Conv<group=2>(r, w4)
            y = Conv(c, w3)
        }""",
        ["a: r[1] 18 > c", "b: c[1] 4 > y"],
    ),
    "a block of aggregated transformations": (
        """(float[N,3,6,6] x) => (float[N,5,6,6] y)
        <float[6,3,3,3] w0, float[6] b0, float[12,6,1,1] w1, float[12] b1, float[12,3,3,3] w2, float[12] b2,
         float[6,12,1,1] w3, float[6] b3, float[5,6,3,3] w4> {
            a0 = Conv<pads=[1,1,1,1]>(x, w0, b0)
            a = Relu(a0)
            c0 = Conv(a, w1, b1)
            c = Relu(c0)
            d0 = Conv<group=4,pads=[1,1,1,1]>(c, w2, b2)
            d = Relu(d0)
            e = Conv(d, w3, b3)
            s = Add(a, e)
            h = Relu(s)
            y = Conv<pads=[1,1,1,1]>(h, w4)
        }""",
        ["a: a[1] 6 > c0", "b: c[1] 12 > d0", "c: d[1] 12 > e", "a: h[1] 6 > y"],
    ),
    "padded groups, two and four, and none": (
        """(float[N,3,6,6] x) => (float[N,4,6,6] y, float[N,8,6,6] z, float[N,3,6,6] u)
        <float[16,3,1,1] w1, float[16] b1, float[4,8,3,3] w2, float[8,4,3,3] w4, float[3,16,3,3] w> {
            a = Conv(x, w1, b1)
            h = Relu(a)
            s = Sigmoid(a)
            y = Conv<group=2,pads=[1,1,1,1]>(h, w2)
            z = Conv<group=4,pads=[1,1,1,1]>(s, w4)
            u = Conv<pads=[1,1,1,1]>(h, w)
        }""",
        ["a: h[1] 16 > y, u", "a: s[1] 16 > z"],
    ),
    "padded groups behind a shuffle": (
        """(float[N,3,6,6] x) => (float[N,4,6,6] y)
        <float[8,3,1,1] w1, float[8,4,3,3] w2, int64[5] ap={0,2,4,6,6}, int64[4] to={0,8,6,6}, float[4,4,3,3] w3> {
            a = Conv(x, w1)
            h = Tanh(a)
            g = Conv<group=2,pads=[1,1,1,1]>(h, w2)
            r = Reshape(g, ap)
            t = Transpose<perm=[0,2,1,3,4]>(r)
            k = Reshape(t, to)
            y = Conv<group=2,pads=[1,1,1,1]>(k, w3)
        }""",
        ["a: h[1] 8 > g", "b: g[1] 8 > y"],
    ),
    "a shuffled block of parts": (
        """(float[N,3,6,6] x) => (float[N,5,A,B] y)
        <float[8,3,1,1] w1, int64[2] pt={4,4}, float[4,4,1,1] w2, float[4,1,3,3] dw, float[4,4,1,1] w4,
         float[4,4,1,1] w2b, int64[5] ap={0,2,4,6,6}, int64[4] to={0,-1,6,6}, float[5,8,3,3] w3> {
            a = Conv(x, w1)
            p, q = Split<axis=1>(a, pt)
            b = Conv(q, w2)
            d = Conv<group=4,pads=[1,1,1,1]>(b, dw)
            e = Conv(d, w4)
            s = Concat<axis=1>(p, e)
            r = Reshape(s, ap)
            t = Transpose<perm=[0,2,1,3,4]>(r)
            u = Reshape(t, to)
            p2, q2 = Split<axis=1>(u, pt)
            f = Conv(q2, w2b)
            g = Concat<axis=1>(p2, f)
            y = Conv<pads=[1,1,1,1]>(g, w3)
        }""",
        ["a: q[1] 4 > b", "b: d[1] 4 > e", "a: q2[1] 4 > f", "a: g[1] 8 > y"],
    ),
    "an even split": (
        """(float[N,4] x) => (float[N,3] y, float[N,3] z)
        <float[4,8] w1, float[4,3] w2, float[4,3] w3> {
            a = MatMul(x, w1)
            b, c = Split<axis=1,num_outputs=2>(a)
            y = MatMul(b, w2)
            z = MatMul(c, w3)
        }""",
        ["a: b[1] 4 > y", "a: c[1] 4 > z"],
    ),
    "heads by splitting": (
        """(float[N,5,4] x) => (float[N,5,3] y)
        <float[4,8] wq, float[4,8] wk, float[4,8] wv, int64[2] pt={4,4}, float[8,3] wo> {
            q = MatMul(x, wq)
            k = MatMul(x, wk)
            v = MatMul(x, wv)
            q1, q2 = Split<axis=2>(q, pt)
            k1, k2 = Split<axis=2>(k, pt)
            v1, v2 = Split<axis=2>(v, pt)
            t1 = Transpose<perm=[0,2,1]>(k1)
            t2 = Transpose<perm=[0,2,1]>(k2)
            s1 = MatMul(q1, t1)
            s2 = MatMul(q2, t2)
            p1 = Softmax<axis=-1>(s1)
            p2 = Softmax<axis=-1>(s2)
            o1 = MatMul(p1, v1)
            o2 = MatMul(p2, v2)
            h = Concat<axis=2>(o1, o2)
            y = MatMul(h, wo)
        }""",
        ["a: k1[2] 4 > pairs of s1", "a: k2[2] 4 > pairs of s2", "b: h[2] 8 > y"],
    ),
    "normalisation by group, scaled by group": (
        """(float[N,3,6,6] x) => (float[N,5,A,B] y)
        <float[6,3,1,1] w1, int64[3] rows={0,3,-1}, float[3] one, float[3] nought, float[3,1] rs,
         int64[4] back={0,6,6,6}, float[5,6,1,1] w2> {
            a = Conv(x, w1)
            r = Reshape(a, rows)
            n = InstanceNormalization(r, one, nought)
            m = Mul(n, rs)
            i = Reshape(m, back)
            y = Conv(i, w2)
        }""",
        ["a: m[1] 3 > y", "whole rows: InstanceNormalization 'n' normalises across this axis"],
    ),
    "positions made channels by slicing": (
        """(float[N,3,6,6] x) => (float[N,5,A,B] y)
        <float[3,3,1,1] w1, int64[2] z={0,0}, int64[2] o={1,1}, int64[2] e={9223372036854775807,9223372036854775807},
         int64[2] ax={2,3}, int64[2] st={2,2}, float[5,6,3,3] w2> {
            a = Conv(x, w1)
            p = Slice(a, z, e, ax, st)
            q = Slice(a, o, e, ax, st)
            h = Concat<axis=1>(p, q)
            y = Conv<pads=[1,1,1,1]>(h, w2)
        }""",
        ["a: h[1] 6 > y"],
    ),
    "a depthwise convolution of two filters a channel that pads": (
        """(float[N,3,6,6] x) => (float[N,5,A,B] y)
        <float[4,3,1,1] w1, float[8,1,3,3] d, float[5,8,1,1] w2> {
            a = Conv(x, w1)
            h = Conv<group=4,pads=[1,1,1,1]>(a, d)
            b = Relu(h)
            y = Conv(b, w2)
        }""",
        ["a: b[1] 8 > y"],
    ),
    "a map and its flattened form, both read": (
        """(float[N,3,6,6] x) => (float[N,36] y)
        <float[4,3,1,1] w1, int64[4] sh={-1,4,6,6}, float[1,4,1,1] w3, float[144,36] w2> {
            a = Conv(x, w1)
            f = Flatten(a)
            r = Reshape(f, sh)
            b = Relu(r)
            z = Conv(b, w3)
            g = Flatten(z)
            m = MatMul(f, w2)
            y = Add(g, m)
        }""",
        [
            "a: f[1] 144 > m",
            "a: b[1] 4 > z",
            "- Flatten 'g' reshapes this axis",
            "- Add 'y' joins them with a computed tensor that has no units there",
        ],
    ),
    "rows of one": (
        """(float[N,5,4] x) => (float[N,5,3] y)
        <float[4,8] w1, int64[4] sh={0,0,8,1}, float[8,1] p, int64[3] back={0,0,8}, float[8,3] w2> {
            a = MatMul(x, w1)
            r = Reshape(a, sh)
            m = Mul(r, p)
            h = Reshape(m, back)
            y = MatMul(h, w2)
        }""",
        ["a: m[2] 8 > y"],
    ),
    "a maximum over half the channels": (
        """(float[N,4] x) => (float[N,3] y)
        <float[4,8] w1, int64[3] sh={0,4,2}, int64[1] ax={1}, float[2,3] w2> {
            a = MatMul(x, w1)
            r = Reshape(a, sh)
            h = ReduceMax<keepdims=0>(r, ax)
            y = MatMul(h, w2)
        }""",
        ["a: h[1] 2 > y", "- ReduceMax 'h' reduces over this axis"],
    ),
    "a product of a tensor with itself": (
        """(float[N,5,4] x) => (float[N,5,5] y)
        <float[4,8] w1> {
            a = MatMul(x, w1)
            t = Transpose<perm=[0,2,1]>(a)
            s = MatMul(a, t)
            y = Softmax<axis=-1>(s)
        }""",
        ["- MatMul 's' contracts them with a tensor that no weight makes linearly"],
    ),
    "a token in front": (
        """(float[2,5,4] x) => (float[2,6,3] y)
        <float[4,8] w1, float[2,1,8] cls, float[8,3] w2> {
            a = MatMul(x, w1)
            h = Concat<axis=1>(cls, a)
            y = MatMul(h, w2)
        }""",
        ["a: h[2] 8 > y"],
    ),
    "a token in front of each sample": (
        """(float[N,5,4] x) => (float[N,6,3] y)
        <float[4,8] w1, float[1,1,8] cls, float[6,8] places, float[8,3] w2, int64[1] first = {0}, int64[2] sizes = {1, 8}> {
            shape = Shape(x)
            samples = Gather(shape, first)
            target = Concat<axis=0>(samples, sizes)
            c = Expand(cls, target)
            a = MatMul(x, w1)
            b = Concat<axis=1>(c, a)
            h = Add(b, places)
            y = MatMul(h, w2)
        }""",
        ["a: h[2] 8 > y"],
    ),
    "channels taken unevenly often": (
        """(float[N,4] x) => (float[N,3] y)
        <float[4,3] w1, int64[5] i={0,1,1,2,0}, float[5,3] w2> {
            a = MatMul(x, w1)
            h = Gather<axis=1>(a, i)
            y = MatMul(h, w2)
        }""",
        ["a: h[1] 5 > y"],
    ),
    "channels repeated": (
        """(float[N,4] x) => (float[N,3] y)
        <float[4,3] w1, int64[2] i={1,2}, float[6,3] w2> {
            a = MatMul(x, w1)
            h = Tile(a, i)
            y = MatMul(h, w2)
        }""",
        ["a: a[1] 3 > y"],
    ),
    "groups of one channel": (
        """(float[N,3,6,6] x) => (float[N,5,A,B] y)
        <float[8,3,1,1] w1, float[2,4,3,3] w2, float[5,2,1,1] w3> {
            h = Conv(x, w1)
            k = Conv<group=2>(h, w2)
            y = Conv(k, w3)
        }""",
        ["a: h[1] 8 > k", "b: k[1] 2 > y ! Conv 'k' needs a channel in each of its blocks"],
    ),
    "parts that nothing uses": (
        """(float[N,5,4] x) => (float[N,5,3] y)
        <float[4,6] w1, int64[4] sh={0,0,3,2}, float[6,3] w2> {
            h = MatMul(x, w1)
            r = Reshape(h, sh)
            y = MatMul(h, w2)
        }""",
        ["a: h[2] 6 > y"],
    ),
    "a channel shuffle read twice with padding": (
        """(float[N,3,6,6] x) => (float[N,5,A,B] y, float[N,5,C,D] z)
        <float[8,3,1,1] w1, int64[5] ap={0,2,4,6,6}, int64[4] to={0,8,6,6}, float[5,8,3,3] w2, float[5,8,3,3] w3> {
            a = Conv(x, w1)
            r = Reshape(a, ap)
            t = Transpose<perm=[0,2,1,3,4]>(r)
            h = Reshape(t, to)
            y = Conv<pads=[1,1,1,1]>(h, w2)
            z = Conv<auto_pad="SAME_UPPER">(h, w3)
        }""",
        ["a: a[1] 8 > y, z"],
    ),
    **ATTENTIONS,
}
