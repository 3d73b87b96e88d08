//! Intervals and tests for fractions.

use data::Rate;

/// 97.5% quantile of the normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// `hits` of `of` with the Wilson score interval (Wilson, 1927) at 95%; 0 to 1 where `of` is 0.
pub(crate) fn rate(hits: u64, of: u64) -> Rate {
    if of == 0 {
        return Rate { value: 0.0, low: 0.0, high: 1.0, hits, of };
    }
    let (n, p) = (of as f64, hits as f64 / of as f64);
    let denominator = 1.0 + Z * Z / n;
    let centre = (p + Z * Z / (2.0 * n)) / denominator;
    let half = Z / denominator * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    // The bound is exact at the ends, where rounding would leave a hair beside it.
    let low = if hits == 0 { 0.0 } else { centre - half };
    let high = if hits == of { 1.0 } else { centre + half };
    Rate { value: p, low, high, hits, of }
}

/// Two-sided exact McNemar test (McNemar, 1947): `wins` of the discordant pairs under a fair coin.
pub(crate) fn mcnemar(wins: u64, losses: u64) -> f64 {
    let (n, fewer) = (wins + losses, wins.min(losses));
    // Summed in logarithms: 2^-n leaves the range of f64 beyond a thousand pairs.
    let mut log_term = -(n as f64) * std::f64::consts::LN_2;
    let mut tail = log_term.exp();
    for k in 0..fewer {
        log_term += ((n - k) as f64 / (k + 1) as f64).ln();
        tail += log_term.exp();
    }
    (2.0 * tail).min(1.0)
}

/// Difference of two paired fractions with its Wald interval at 95%, clipped to what is possible.
pub(crate) fn paired_difference(wins: u64, losses: u64, of: u64) -> (f64, f64, f64) {
    if of == 0 {
        return (0.0, -1.0, 1.0);
    }
    let (b, c, n) = (wins as f64, losses as f64, of as f64);
    let difference = (b - c) / n;
    let half = Z * (b + c - (b - c) * (b - c) / n).max(0.0).sqrt() / n;
    (difference, (difference - half).max(-1.0), (difference + half).min(1.0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn wilson_intervals_of_200_rows_are_the_published_ones() {
        for (hits, low, high) in
            [(80, 0.335, 0.469), (120, 0.531, 0.665), (140, 0.633, 0.759), (160, 0.739, 0.850)]
        {
            let rate = rate(hits, 200);
            assert!((rate.low - low).abs() < 5e-4 && (rate.high - high).abs() < 5e-4, "{rate:?}");
        }
    }

    #[test]
    fn mcnemar_is_the_exact_binomial() {
        // scipy.stats.binomtest(10, 60).pvalue and (18, 48).
        assert!((mcnemar(50, 10) / 1.6e-7 - 1.0).abs() < 0.05, "{}", mcnemar(50, 10));
        assert!((mcnemar(30, 18) - 0.11).abs() < 0.005, "{}", mcnemar(30, 18));
        assert!((mcnemar(5, 0) - 0.0625).abs() < 1e-12);
        assert!((mcnemar(0, 0) - 1.0).abs() < 1e-12);
        assert!((mcnemar(3, 3) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn mcnemar_holds_beyond_the_range_of_powers_of_two() {
        let p = mcnemar(1300, 1200);
        // Normal approximation with continuity correction: z = 99 / 50.
        assert!((p - 0.0477).abs() < 5e-4, "{p}");
    }

    #[test]
    fn no_rows_say_nothing() {
        assert_eq!((rate(0, 0).low, rate(0, 0).high), (0.0, 1.0));
        assert_eq!(paired_difference(0, 0, 0), (0.0, -1.0, 1.0));
    }

    #[test]
    fn difference_interval_is_the_wald_one() {
        let (difference, low, high) = paired_difference(50, 10, 200);
        assert!((difference - 0.2).abs() < 1e-12);
        // 1.95996 * sqrt(60 - 1600/200) / 200
        assert!((low - (0.2 - 0.070_667)).abs() < 1e-5 && (high - 0.270_667).abs() < 1e-5);
    }

    proptest! {
        #[test]
        fn interval_holds_its_value_and_stays_in_range(of in 1u64..5000, part in 0.0..=1.0f64) {
            let rate = rate((part * of as f64) as u64, of);
            prop_assert!(0.0 <= rate.low && rate.low <= rate.value + 1e-12);
            prop_assert!(rate.value <= rate.high + 1e-12 && rate.high <= 1.0);
        }

        #[test]
        fn p_value_is_symmetric_and_a_probability(wins in 0u64..400, losses in 0u64..400) {
            let p = mcnemar(wins, losses);
            prop_assert!((0.0..=1.0).contains(&p));
            prop_assert!((p - mcnemar(losses, wins)).abs() < 1e-12);
        }
    }
}
