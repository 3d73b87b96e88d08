use super::*;

const SHAPE: Shape =
    Shape { heads: 6, kv_heads: 2, head_dim: 8, scale: 0.35, softcap: None, window: None };

/// Without and with a bound on the scores (small enough to bend them) and a window (shorter than
/// a block of queries, so that later blocks begin behind the first key).
const SHAPES: [Shape; 4] = [
    SHAPE,
    Shape { softcap: Some(0.8), ..SHAPE },
    Shape { window: Some(33), ..SHAPE },
    Shape { softcap: Some(0.8), window: Some(3), ..SHAPE },
];

fn numbers(len: usize, seed: u64) -> Vec<f32> {
    (0..len as u64)
        .map(|i| (crate::dropout::mix(seed ^ (i << 8)) >> 40) as f32 / 8_388_608.0 - 1.0)
        .collect()
}

/// Scaled dot-product attention by its definition, in f64.
fn reference(shape: Shape, q: &[f32], k: &[f32], v: &[f32], cu: &[i32]) -> Vec<f64> {
    let d = SHAPE.head_dim;
    let mut out = vec![0.0f64; q.len()];
    for w in cu.windows(2) {
        for i in w[0] as usize..w[1] as usize {
            for h in 0..SHAPE.heads {
                let kv = h / SHAPE.group();
                let at =
                    |x: &[f32], j: usize, c: usize| f64::from(x[j * SHAPE.kv_width() + kv * d + c]);
                let window = shape.window.unwrap_or(usize::MAX);
                let keys = (w[0] as usize).max((i + 1).saturating_sub(window))..=i;
                let s: Vec<f64> = keys
                    .clone()
                    .map(|j| {
                        let dot: f64 = (0..d)
                            .map(|c| f64::from(q[i * SHAPE.q_width() + h * d + c]) * at(k, j, c))
                            .sum();
                        let score = dot * f64::from(shape.scale);
                        let cap = shape.softcap.map(f64::from);
                        cap.map_or(score, |c| c * (score / c).tanh()).exp()
                    })
                    .collect();
                let sum: f64 = s.iter().sum();
                for c in 0..d {
                    out[i * SHAPE.q_width() + h * d + c] =
                        keys.clone().zip(&s).map(|(j, p)| p / sum * at(v, j, c)).sum();
                }
            }
        }
    }
    out
}

fn run(shape: Shape, q: &[f32], k: &[f32], v: &[f32], cu: &[i32]) -> (Vec<f32>, Vec<f32>) {
    let n = q.len() / SHAPE.q_width();
    let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; SHAPE.heads * n]);
    forward(shape, q, k, v, cu, &mut out, &mut lse);
    (out, lse)
}

#[test]
fn forward_equals_the_definition_across_segments_and_blocks() {
    for shape in SHAPES {
        let n = 300;
        let (q, k, v) = (
            numbers(n * SHAPE.q_width(), 1),
            numbers(n * SHAPE.kv_width(), 2),
            numbers(n * SHAPE.kv_width(), 3),
        );
        let cu = [0, 1, 7, 7, 160, 300];
        let (out, _) = run(shape, &q, &k, &v, &cu);
        for (a, b) in out.iter().zip(reference(shape, &q, &k, &v, &cu)) {
            assert!((f64::from(*a) - b).abs() < 2e-6, "{a} {b}");
        }
    }
}

#[test]
fn decoding_gives_the_bits_of_the_whole_segment() {
    for shape in SHAPES {
        let n = 200;
        let (q, k, v) = (
            numbers(n * SHAPE.q_width(), 4),
            numbers(n * SHAPE.kv_width(), 5),
            numbers(n * SHAPE.kv_width(), 6),
        );
        let (out, _) = run(shape, &q, &k, &v, &[0, n as i32]);
        let mut cache = KvCache::new(shape, n);
        let mut row = vec![0.0; SHAPE.q_width()];
        for i in 0..n {
            let kv = i * SHAPE.kv_width()..(i + 1) * SHAPE.kv_width();
            cache.append(shape, &k[kv.clone()], &v[kv]);
            decode(shape, &q[i * SHAPE.q_width()..][..SHAPE.q_width()], &cache, &mut row);
            assert_eq!(row, &out[i * SHAPE.q_width()..][..SHAPE.q_width()], "row {i}");
        }
    }
}

/// Compares gradients with difference quotients at the elements that `chosen` names of a tensor of
/// that many.
fn check_backward<I: IntoIterator<Item = usize>>(
    shape: Shape,
    cu: &[i32],
    seed: u64,
    chosen: impl Fn(usize) -> I,
) {
    let n = cu[cu.len() - 1] as usize;
    let mut x = [
        numbers(n * SHAPE.q_width(), seed),
        numbers(n * SHAPE.kv_width(), seed + 1),
        numbers(n * SHAPE.kv_width(), seed + 2),
    ];
    let dout = numbers(n * SHAPE.q_width(), seed + 3);
    let (out, lse) = run(shape, &x[0], &x[1], &x[2], cu);
    let mut g = [vec![0.0; x[0].len()], vec![0.0; x[1].len()], vec![0.0; x[2].len()]];
    let [dq, dk, dv] = &mut g;
    let saved = Saved { q: &x[0], k: &x[1], v: &x[2], out: &out, lse: &lse };
    backward(shape, saved, cu, &dout, dq, dk, dv);
    for part in 0..3 {
        for i in chosen(x[part].len()) {
            let kept = x[part][i];
            let mut value = |delta: f32| -> f64 {
                x[part][i] = kept + delta;
                let out = reference(shape, &x[0], &x[1], &x[2], cu);
                out.iter().zip(&dout).map(|(o, d)| o * f64::from(*d)).sum()
            };
            let slope = (value(1e-3) - value(-1e-3)) / 2e-3;
            x[part][i] = kept;
            let got = f64::from(g[part][i]);
            assert!((slope - got).abs() < 2e-4, "part {part} element {i}: {slope} {got}");
        }
    }
}

#[test]
fn backward_equals_the_difference_quotient() {
    for shape in SHAPES {
        check_backward(shape, &[0, 4, 9], 7, |len| (0..len).step_by(5));
    }
}

#[test]
fn backward_equals_the_difference_quotient_where_blocks_begin_behind_the_first_key() {
    let shape = Shape { softcap: Some(0.8), window: Some(20), ..SHAPE };
    // Positions 120 and 130 lie on both sides of a block's end.
    let chosen = |len| [0, 105, 120, 130, 199].map(|position| position * len / 200 + 3);
    check_backward(shape, &[0, 200], 11, chosen);
}
