//! What an evaluation found, in words: lines for the log, a few words beside the bar.

use contract::Reporter;
use data::{Metrics, Rate};

/// Logs a line a metric, with what changed since the baseline where there is one, and reports the
/// last row with the same in short.
pub(crate) fn report(
    metrics: &Metrics,
    baseline: Option<&Metrics>,
    rows: usize,
    reporter: &mut Reporter,
) {
    for line in lines(metrics, baseline) {
        reporter.log(line);
    }
    reporter.advance(rows as u64, rows as u64, "rows", words(metrics));
}

/// The metrics that are told, by the names that [`data::Paired`] gives them.
fn told(metrics: &Metrics) -> [(&'static str, &Rate); 3] {
    [
        ("strict_accuracy", &metrics.strict_accuracy),
        ("lenient_accuracy", &metrics.lenient_accuracy),
        ("decision_accuracy", &metrics.decision_accuracy),
    ]
}

fn lines(metrics: &Metrics, baseline: Option<&Metrics>) -> Vec<String> {
    let Some(baseline) = baseline else {
        let line = |(name, rate): (&str, &Rate)| {
            let [value, low, high] = [rate.value, rate.low, rate.high].map(percent);
            format!("{name}: {value} [{low}, {high}], {} of {}", rate.hits, rate.of)
        };
        return told(metrics).map(line).into();
    };
    let before_and_after = told(baseline).into_iter().zip(told(metrics));
    let compared = before_and_after.filter_map(|((name, before), (_, after))| {
        let paired = metrics.against_baseline.iter().find(|p| p.metric == name)?;
        let [before, after] = [before.value, after.value].map(percent);
        let [by, low, high] = [paired.difference, paired.low, paired.high].map(points);
        let (wins, losses, p) = (paired.wins, paired.losses, p_value(paired.p_value));
        Some(format!(
            "{name}: {before} -> {after}, {by} points [{low}, {high}] against the baseline, \
             McNemar p {p} (won {wins}, lost {losses})"
        ))
    });
    compared.collect()
}

fn words(metrics: &Metrics) -> String {
    let short = |name: &str| name.trim_end_matches("_accuracy").to_owned();
    if metrics.against_baseline.is_empty() {
        let parts =
            told(metrics).map(|(name, rate)| format!("{} {}", short(name), percent(rate.value)));
        return parts.join(", ");
    }
    let paired = metrics.against_baseline.iter();
    let parts: Vec<String> =
        paired.map(|p| format!("{} {}", short(&p.metric), points(p.difference))).collect();
    format!("{} points against the baseline", parts.join(", "))
}

/// `38.3%`.
fn percent(fraction: f64) -> String {
    format!("{:.1}%", fraction * 100.0)
}

/// `+21.7`, in percentage points; a difference that rounds to none has no sign.
fn points(fraction: f64) -> String {
    let text = format!("{:+.1}", fraction * 100.0);
    if text.trim_start_matches(['+', '-']) == "0.0" { "0.0".to_owned() } else { text }
}

/// `0.375`, `0.0015`, `1.6e-7`: digits that say something.
fn p_value(p: f64) -> String {
    match p {
        0.01.. => format!("{p:.3}"),
        0.001..0.01 => format!("{p:.4}"),
        _ => format!("{p:.1e}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use data::Paired;
    use serde_json::{Map, json};

    use super::*;
    use crate::metrics::summarise;
    use crate::statistics::rate;

    /// 46 strictly right of 120, 48 leniently, 55 decisions.
    fn base() -> Metrics {
        let mut metrics = summarise(&[], String::new(), Map::new());
        metrics.strict_accuracy = rate(46, 120);
        metrics.lenient_accuracy = rate(48, 120);
        metrics.decision_accuracy = rate(55, 120);
        metrics
    }

    fn tuned() -> Metrics {
        let mut metrics = base();
        metrics.strict_accuracy = rate(74, 120);
        let paired = |name: &str, difference: f64, wins: u64, losses: u64, p: f64| -> Paired {
            serde_json::from_value(json!({"metric": name, "difference": difference, "low": -0.002,
                "high": 0.3184, "wins": wins, "losses": losses, "p_value": p}))
            .unwrap()
        };
        metrics.against_baseline = vec![
            paired("strict_accuracy", 28.0 / 120.0, 31, 3, 7.6e-7),
            paired("lenient_accuracy", -0.0001, 4, 4, 1.0),
            paired("decision_accuracy", -4.0 / 120.0, 1, 5, 0.0049),
        ];
        metrics
    }

    #[test]
    fn a_run_alone_is_told_with_its_intervals() {
        assert_eq!(lines(&base(), None)[0], "strict_accuracy: 38.3% [30.1%, 47.3%], 46 of 120");
        assert_eq!(words(&base()), "strict 38.3%, lenient 40.0%, decision 45.8%");
    }

    #[test]
    fn a_compared_run_is_told_as_before_after_and_difference() {
        assert_eq!(
            lines(&tuned(), Some(&base())),
            [
                "strict_accuracy: 38.3% -> 61.7%, +23.3 points [-0.2, +31.8] against the baseline, \
                 McNemar p 7.6e-7 (won 31, lost 3)",
                "lenient_accuracy: 40.0% -> 40.0%, 0.0 points [-0.2, +31.8] against the baseline, \
                 McNemar p 1.000 (won 4, lost 4)",
                "decision_accuracy: 45.8% -> 45.8%, -3.3 points [-0.2, +31.8] against the \
                 baseline, McNemar p 0.0049 (won 1, lost 5)",
            ]
        );
        assert_eq!(
            words(&tuned()),
            "strict +23.3, lenient 0.0, decision -3.3 points against the baseline"
        );
    }
}
