//! The greatest singular values and vectors of a matrix, by Lanczos' method (1950) on the smaller of
//! its two Gram matrices, in f64 with full reorthogonalisation.
//!
//! Everything is added in an order of its own, so the same matrix gives the same bits everywhere.

use kernels::dropout::mix;

/// A Ritz vector has converged when its residual is at most this part of the greatest eigenvalue.
const TOLERANCE: f64 = 1e-12;

/// The `k` greatest singular values of a matrix `[rows, columns]`, with their vectors. A value of
/// zero may have zeros for one of its vectors.
pub(crate) struct Singular {
    /// In falling order `[k]`.
    pub(crate) values: Vec<f64>,
    /// Left vectors, one a row `[k, rows]`.
    pub(crate) left: Vec<Vec<f64>>,
    /// Right vectors, one a row `[k, columns]`.
    pub(crate) right: Vec<Vec<f64>>,
}

impl Singular {
    /// Of a row-major matrix; `k` is cut to its smaller side.
    pub(crate) fn top(matrix: &[f32], columns: usize, k: usize) -> Self {
        let rows = matrix.len() / columns;
        let k = k.min(rows).min(columns);
        let is_wide = rows <= columns;
        let gram = |x: &[f64]| {
            if is_wide {
                times(matrix, columns, &transposed_times(matrix, columns, x))
            } else {
                transposed_times(matrix, columns, &times(matrix, columns, x))
            }
        };
        let mut top = Self { values: Vec::new(), left: Vec::new(), right: Vec::new() };
        for vector in eigenvectors(rows.min(columns), k, gram) {
            let mut other = if is_wide {
                transposed_times(matrix, columns, &vector)
            } else {
                times(matrix, columns, &vector)
            };
            let value = dot(&other, &other).sqrt();
            if value > 0.0 {
                divide(&mut other, value);
            }
            let (left, right) = if is_wide { (vector, other) } else { (other, vector) };
            top.values.push(value);
            top.left.push(left);
            top.right.push(right);
        }
        top
    }

    /// `[A [r, columns], B [rows, r]]`, row-major, with `B·A` being `part` times the sum of these
    /// values' parts of the matrix; each of the two has the same share of a value. What is missing to
    /// `r` values is zero.
    pub(crate) fn factors(&self, r: usize, part: f64) -> [Vec<f32>; 2] {
        let len = |vectors: &[Vec<f64>]| r * vectors.first().map_or(0, Vec::len);
        let (mut a, mut b) = (vec![0.0; len(&self.right)], vec![0.0; len(&self.left)]);
        for (i, value) in self.values.iter().enumerate() {
            let root = (value * part).sqrt();
            let row = a.iter_mut().skip(i * self.right[i].len());
            row.zip(&self.right[i]).for_each(|(a, v)| *a = (root * v) as f32);
            let column = b.iter_mut().skip(i).step_by(r);
            column.zip(&self.left[i]).for_each(|(b, u)| *b = (root * u) as f32);
        }
        [a, b]
    }
}

/// Eigenvectors of the `k` greatest eigenvalues of a symmetric matrix `[n, n]` given as a product.
fn eigenvectors(n: usize, k: usize, product: impl Fn(&[f64]) -> Vec<f64>) -> Vec<Vec<f64>> {
    let mut basis: Vec<Vec<f64>> = vec![fresh_direction(n, &[])];
    let (mut diagonal, mut beside) = (Vec::new(), Vec::new());
    let (mut check, mut largest) = (2 * k + 16, 0.0f64);
    loop {
        let size = basis.len();
        let mut next = product(&basis[size - 1]);
        diagonal.push(dot(&next, &basis[size - 1]));
        // Twice: once leaves what rounding put back.
        orthogonalise(&mut next, &basis);
        orthogonalise(&mut next, &basis);
        let coupling = dot(&next, &next).sqrt();
        largest = largest.max(diagonal[size - 1]).max(coupling);
        if size >= check.min(n) {
            check = size + size / 2;
            let (values, vectors) = tridiagonal_eigenvectors(&diagonal, &beside);
            let mut order: Vec<usize> = (0..size).collect();
            order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
            order.truncate(k);
            let limit = TOLERANCE * values[order[0]].abs();
            let off = |i: usize| coupling * vectors[i][size - 1].abs();
            if size == n || order.iter().all(|i| off(*i) <= limit) {
                return order.into_iter().map(|i| combine(&basis, &vectors[i])).collect();
            }
        }
        if coupling > largest * f64::EPSILON * n as f64 {
            divide(&mut next, coupling);
            beside.push(coupling);
        } else {
            // What was seen so far is closed under the product: go on elsewhere.
            next = fresh_direction(n, &basis);
            beside.push(0.0);
        }
        basis.push(next);
    }
}

/// A unit vector at right angles to `basis`, a function of the basis' size.
fn fresh_direction(n: usize, basis: &[Vec<f64>]) -> Vec<f64> {
    let mut attempt = mix(basis.len() as u64 + 1);
    loop {
        let number = |i: usize| (mix(attempt ^ mix(i as u64)) >> 11) as f64 / 2f64.powi(52) - 1.0;
        let mut vector: Vec<f64> = (0..n).map(number).collect();
        let before = dot(&vector, &vector).sqrt();
        orthogonalise(&mut vector, basis);
        orthogonalise(&mut vector, basis);
        let length = dot(&vector, &vector).sqrt();
        if length > before * 1e-8 {
            divide(&mut vector, length);
            return vector;
        }
        attempt = mix(attempt);
    }
}

/// Takes out of `vector` what lies along `basis`.
fn orthogonalise(vector: &mut [f64], basis: &[Vec<f64>]) {
    for direction in basis {
        let along = dot(vector, direction);
        vector.iter_mut().zip(direction).for_each(|(x, d)| *x -= along * d);
    }
}

/// `Σ weights[i] · basis[i]`, of length one.
fn combine(basis: &[Vec<f64>], weights: &[f64]) -> Vec<f64> {
    let mut sum = vec![0.0; basis[0].len()];
    for (vector, weight) in basis.iter().zip(weights) {
        sum.iter_mut().zip(vector).for_each(|(s, v)| *s += weight * v);
    }
    let length = dot(&sum, &sum).sqrt();
    divide(&mut sum, length);
    sum
}

/// Eigenvalues, and eigenvectors one a row, of the symmetric tridiagonal matrix with `beside` next to
/// its diagonal: implicit QL (Bowdler, Martin, Reinsch and Wilkinson, 1968).
fn tridiagonal_eigenvectors(diagonal: &[f64], beside: &[f64]) -> (Vec<f64>, Vec<Vec<f64>>) {
    let n = diagonal.len();
    let mut d = diagonal.to_vec();
    let mut e = beside[..n - 1].to_vec();
    e.push(0.0);
    let mut z: Vec<Vec<f64>> =
        (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    for l in 0..n {
        // A few sweeps an eigenvalue; the bound only keeps a NaN from going on for ever.
        for _ in 0..64 {
            let is_small =
                |m: &usize| e[*m].abs() <= f64::EPSILON * (d[*m].abs() + d[*m + 1].abs());
            let m = (l..n - 1).find(is_small).unwrap_or(n - 1);
            if m == l {
                break;
            }
            sweep(&mut d, &mut e, &mut z, l, m);
        }
    }
    (d, z)
}

/// One implicit QL sweep over rows `l` to `m`.
fn sweep(d: &mut [f64], e: &mut [f64], z: &mut [Vec<f64>], l: usize, m: usize) {
    let mut g = (d[l + 1] - d[l]) / (2.0 * e[l]);
    g = d[m] - d[l] + e[l] / (g + g.hypot(1.0).copysign(g));
    let (mut sine, mut cosine, mut p) = (1.0, 1.0, 0.0);
    for i in (l..m).rev() {
        let (f, b) = (sine * e[i], cosine * e[i]);
        let r = f.hypot(g);
        e[i + 1] = r;
        if r == 0.0 {
            d[i + 1] -= p;
            e[m] = 0.0;
            return;
        }
        (sine, cosine) = (f / r, g / r);
        g = d[i + 1] - p;
        let r = (d[i] - g) * sine + 2.0 * cosine * b;
        p = sine * r;
        d[i + 1] = g + p;
        g = cosine * r - b;
        let (low, high) = z.split_at_mut(i + 1);
        for (low, high) in low[i].iter_mut().zip(&mut high[0]) {
            (*low, *high) = (cosine * *low - sine * *high, sine * *low + cosine * *high);
        }
    }
    d[l] -= p;
    e[l] = g;
    e[m] = 0.0;
}

/// `M·x`.
fn times(matrix: &[f32], columns: usize, x: &[f64]) -> Vec<f64> {
    matrix
        .chunks_exact(columns)
        .map(|row| {
            let mut lanes = [0.0; 8];
            let (whole, rest) = row.as_chunks::<8>();
            let (x_whole, x_rest) = x.as_chunks::<8>();
            for (row, x) in whole.iter().zip(x_whole) {
                for ((lane, a), b) in lanes.iter_mut().zip(row).zip(x) {
                    *lane += f64::from(*a) * b;
                }
            }
            let tail: f64 = rest.iter().zip(x_rest).map(|(a, b)| f64::from(*a) * b).sum();
            lanes.iter().sum::<f64>() + tail
        })
        .collect()
}

/// `Mᵀ·y`.
fn transposed_times(matrix: &[f32], columns: usize, y: &[f64]) -> Vec<f64> {
    let mut sum = vec![0.0; columns];
    for (row, y) in matrix.chunks_exact(columns).zip(y) {
        sum.iter_mut().zip(row).for_each(|(s, a)| *s += y * f64::from(*a));
    }
    sum
}

fn divide(vector: &mut [f64], by: f64) {
    for x in vector {
        *x /= by;
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0.0; 8];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.iter().zip(b) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    lanes.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Numbers in ±1 that are a function of the index.
    fn numbers(len: usize, seed: u64) -> Vec<f32> {
        (0..len as u64).map(|i| (mix(i ^ mix(seed)) >> 40) as f32 / 8_388_608.0 - 1.0).collect()
    }

    /// Asserts that the vectors are orthonormal and that `M·v = σ·u`, `Mᵀ·u = σ·v`.
    fn assert_singular(matrix: &[f32], columns: usize, top: &Singular) {
        let limit = 1e-6 * top.values[0].max(1.0);
        assert!(top.values.is_sorted_by(|a, b| *a >= b - limit), "{:?}", top.values);
        for (i, value) in top.values.iter().enumerate() {
            let (left, right) = (&top.left[i], &top.right[i]);
            let forward = times(matrix, columns, right);
            assert!(forward.iter().zip(left).all(|(f, l)| (f - value * l).abs() < limit));
            let backward = transposed_times(matrix, columns, left);
            assert!(backward.iter().zip(right).all(|(b, r)| (b - value * r).abs() < limit));
            if *value > limit {
                for j in 0..=i {
                    let expected = f64::from(u8::from(i == j));
                    assert!((dot(left, &top.left[j]) - expected).abs() < 1e-6, "{i} {j}");
                    assert!((dot(right, &top.right[j]) - expected).abs() < 1e-6, "{i} {j}");
                }
            }
        }
    }

    /// Sum of squares of `M` less its part of rank `k`.
    fn rest(matrix: &[f32], columns: usize, top: &Singular) -> f64 {
        let at = |index: usize| -> f64 {
            let (row, column) = (index / columns, index % columns);
            (0..top.values.len())
                .map(|i| top.values[i] * top.left[i][row] * top.right[i][column])
                .sum()
        };
        matrix.iter().enumerate().map(|(i, m)| (f64::from(*m) - at(i)).powi(2)).sum()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn all_singular_values_together_give_the_matrix(
            rows in 1_usize..40, columns in 1_usize..40, seed in 0_u64..1000,
        ) {
            let matrix = numbers(rows * columns, seed);
            let top = Singular::top(&matrix, columns, 40);
            prop_assert_eq!(top.values.len(), rows.min(columns));
            assert_singular(&matrix, columns, &top);
            prop_assert!(rest(&matrix, columns, &top) < 1e-10);
        }
    }

    #[test]
    fn the_greatest_values_of_a_flat_spectrum_converge_before_the_basis_is_whole() {
        let (rows, columns) = (300, 420);
        let matrix = numbers(rows * columns, 7);
        let top = Singular::top(&matrix, columns, 4);
        assert_singular(&matrix, columns, &top);
        let all = Singular::top(&matrix, columns, rows);
        for (few, all) in top.values.iter().zip(&all.values) {
            assert!((few - all).abs() < 1e-9 * all, "{few} {all}");
        }
        // Tall: the other Gram matrix.
        let turned: Vec<f32> =
            (0..rows * columns).map(|i| matrix[(i % rows) * columns + i / rows]).collect();
        let tall = Singular::top(&turned, rows, 4);
        for (a, b) in tall.values.iter().zip(&top.values) {
            assert!((a - b).abs() < 1e-9 * b, "{a} {b}");
        }
    }

    #[test]
    fn matrices_of_low_rank_and_of_zeros_end_with_values_of_zero() {
        let (left, right) = (numbers(30, 1), numbers(20, 2));
        let product = |i: usize| left[i / 20] * right[i % 20];
        let matrix: Vec<f32> = (0..600).map(product).collect();
        let top = Singular::top(&matrix, 20, 3);
        assert_singular(&matrix, 20, &top);
        assert!(rest(&matrix, 20, &top) < 1e-10 && top.values[1] < 1e-5, "{:?}", top.values);
        assert!(Singular::top(&[0.0; 12], 4, 2).values.iter().all(|v| *v == 0.0));
    }
}
