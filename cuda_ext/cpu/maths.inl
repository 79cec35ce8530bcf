// Functions of vectors.

// e^x to about one unit in the last place, x clamped to -87 .. 88 so that the result is a normal
// number: 2^n * p(r), n = round(x / ln 2), r = x - n ln 2 in two pieces (Cody & Waite), p its Taylor
// polynomial. Exactly 1 at 0. A NaN comes through.
inline V exp(V x) {
  x = min(set1(88.0f), max(set1(-87.0f), x));
  const V n = round(mul(x, set1(1.44269504f)));
  V r = fnma(n, set1(0.693145752f), x);
  r = fnma(n, set1(1.42860677e-6f), r);
  V p = set1(1.0f / 720);
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return scale2(p, n);
}

inline V sigmoid(V x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }

// 1 - 2 / (1 + e^2x) loses a small x to cancellation; there Lambert's continued fraction, cut after 9:
// x (945 + 105 x^2 + x^4) / (945 + 420 x^2 + 15 x^4), which is odd and exact to float32 below 0.6.
inline V tanh(V x) {
  const V far = sub(set1(1.0f), div(set1(2.0f), add(set1(1.0f), exp(add(x, x)))));
  const V square = mul(x, x);
  const V over = mul(x, fma(square, add(square, set1(105.0f)), set1(945.0f)));
  const V under = fma(square, fma(square, set1(15.0f), set1(420.0f)), set1(945.0f));
  return select(below(square, set1(0.36f)), div(over, under), far);
}
