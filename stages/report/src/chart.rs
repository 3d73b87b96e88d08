//! Drawings as small SVGs, coloured by the style of the page.

use crate::words::short;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 48.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 44.0;

/// A fraction and its interval, all between 0 and 1.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bar {
    pub(crate) value: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

/// Draws fractions as bars with their intervals: one group a measure, before and after in it.
pub(crate) fn bars(groups: &[(&str, Option<Bar>, Bar)]) -> String {
    const LABELS: f64 = 96.0;
    const BAR: f64 = 20.0;
    let per_group = if groups.iter().any(|(_, before, _)| before.is_some()) { 2.0 } else { 1.0 };
    let group = per_group * BAR + 18.0;
    let height = 8.0 + group * groups.len() as f64 + 22.0;
    let x = |fraction: f64| LABELS + fraction.clamp(0.0, 1.0) * (WIDTH - LABELS - 60.0);
    let mut out = open(height, "accuracies before and after training");
    for tick in 0..=4 {
        let (fraction, bottom) = (f64::from(tick) / 4.0, height - 22.0);
        let at = x(fraction);
        out.push_str(&line("axis", (at, 4.0), (at, bottom)));
        let percent = format!("{:.0}%", fraction * 100.0);
        out.push_str(&label((at, height - 6.0), "middle", &percent));
    }
    for (i, (name, before, after)) in groups.iter().enumerate() {
        let mut top = 10.0 + group * i as f64;
        out.push_str(&label((LABELS - 10.0, top + per_group * BAR / 2.0 + 4.0), "end", name));
        for (class, bar) in [("base-bar", *before), ("tuned-bar", Some(*after))] {
            let Some(bar) = bar else { continue };
            let (from, to, middle) = (x(0.0), x(bar.value), top + BAR / 2.0 - 1.0);
            out.push_str(&format!(
                "<rect class=\"{class}\" x=\"{from:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>",
                to - from,
                BAR - 2.0
            ));
            out.push_str(&line("whisker", (x(bar.low), middle), (x(bar.high), middle)));
            let percent = format!("{:.1}%", bar.value * 100.0);
            out.push_str(&label(
                (x(bar.high.max(bar.value)) + 8.0, middle + 4.0),
                "start",
                &percent,
            ));
            top += BAR;
        }
    }
    out.push_str("</svg>");
    out
}

/// Draws training loss and evaluation loss, both `(step, loss)`; `None` without points.
pub(crate) fn loss_curve(train: &[(f64, f64)], eval: &[(f64, f64)]) -> Option<String> {
    let all = || train.iter().chain(eval);
    let steps = all().map(|p| p.0).fold(1.0, f64::max);
    let highest = all().map(|p| p.1).fold(0.0, f64::max);
    if train.is_empty() || !highest.is_finite() || highest <= 0.0 {
        return None;
    }
    let (tick, top) = scale(highest);
    let x = |step: f64| LEFT + step / steps * (WIDTH - LEFT - RIGHT);
    let y = |loss: f64| TOP + (1.0 - loss / top) * (HEIGHT - TOP - BOTTOM);
    let mut out = open(HEIGHT, "loss by step");
    for i in 0..=(top / tick).round() as usize {
        let value = tick * i as f64;
        out.push_str(&line("axis", (LEFT, y(value)), (WIDTH - RIGHT, y(value))));
        out.push_str(&label((LEFT - 8.0, y(value) + 4.0), "end", &short(value)));
    }
    let between = scale(steps).0.max(1.0).round();
    let mut step = 0.0;
    while step <= steps {
        out.push_str(&label((x(step), HEIGHT - 24.0), "middle", &short(step)));
        step += between;
    }
    out.push_str(&label(((LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 6.0), "middle", "step"));
    // The line of every step is noise where there are many; their mean is what falls.
    let smooth = smoothed(train);
    let faint = if smooth.is_empty() { "train" } else { "train faint" };
    out.push_str(&format!("<path class=\"{faint}\" d=\"{}\"/>", path(train, &x, &y)));
    if !smooth.is_empty() {
        out.push_str(&format!("<path class=\"train\" d=\"{}\"/>", path(&smooth, &x, &y)));
    }
    if !eval.is_empty() {
        out.push_str(&format!("<path class=\"eval\" d=\"{}\"/>", path(eval, &x, &y)));
        for (step, loss) in eval {
            let (x, y) = (x(*step), y(*loss));
            out.push_str(&format!("<circle class=\"dot\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\"/>"));
        }
    }
    legend(!smooth.is_empty(), !eval.is_empty(), &mut out);
    out.push_str("</svg>");
    Some(out)
}

fn legend(smooth: bool, eval: bool, out: &mut String) {
    let train = if smooth { "training loss and its running mean" } else { "training loss" };
    let mut at = LEFT;
    for (class, name) in [("train", train), ("eval", "evaluation loss")] {
        if class == "train" || eval {
            out.push_str(&line(class, (at, 14.0), (at + 22.0, 14.0)));
            out.push_str(&label((at + 30.0, 18.0), "start", name));
            at += 60.0 + 7.0 * name.len() as f64;
        }
    }
}

/// The running mean over a twentieth of the steps; empty where there are few.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let half = points.len() / 40;
    if half == 0 {
        return Vec::new();
    }
    let mean = |i: usize| {
        // As many on both sides, so that the ends are not drawn towards the middle.
        let reach = half.min(i).min(points.len() - 1 - i);
        let near = &points[i - reach..=i + reach];
        (points[i].0, near.iter().map(|p| p.1).sum::<f64>() / near.len() as f64)
    };
    (0..points.len()).map(mean).collect()
}

fn open(height: f64, what: &str) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{what}\">")
}

fn line(class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) -> String {
    format!("<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>")
}

fn label((x, y): (f64, f64), anchor: &str, text: &str) -> String {
    format!(
        "<text class=\"label\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
    )
}

fn path(points: &[(f64, f64)], x: &dyn Fn(f64) -> f64, y: &dyn Fn(f64) -> f64) -> String {
    let at = |(i, (s, l)): (usize, &(f64, f64))| {
        format!("{}{:.1} {:.1}", if i == 0 { "M" } else { "L" }, x(*s), y(*l))
    };
    points.iter().enumerate().map(at).collect()
}

/// A round tick and the lowest multiple of it that holds `highest`, with three to six ticks.
fn scale(highest: f64) -> (f64, f64) {
    let mut tick = 10_f64.powf(highest.log10().floor());
    for divisor in [2.0, 2.5, 2.0] {
        if highest / tick >= 3.0 {
            break;
        }
        tick /= divisor;
    }
    (tick, (highest / tick).ceil() * tick)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_is_round_and_holds_the_highest() {
        for highest in [0.04, 0.7, 1.0, 2.9, 11.0, 365.0] {
            let (tick, top) = scale(highest);
            assert!(
                top >= highest && (3..=10).contains(&((top / tick).round() as i32)),
                "{highest}"
            );
        }
    }

    #[test]
    fn points_stay_inside_the_drawing() {
        let svg = loss_curve(&[(1.0, 2.0), (60.0, 0.1)], &[(30.0, 0.5)]).expect("points");
        assert!(svg.contains("class=\"dot\"") && !svg.contains("NaN") && !svg.contains("\"-"));
        assert!(loss_curve(&[], &[]).is_none());
    }

    #[test]
    fn running_mean_keeps_the_ends_and_evens_out_between() {
        let points: Vec<_> = (0..80).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        let mean = smoothed(&points);
        assert_eq!((mean[0].1, mean[79].1), (0.0, 1.0));
        assert!((mean[40].1 - 0.5).abs() < 0.2);
        assert!(smoothed(&points[..20]).is_empty());
    }

    #[test]
    fn bars_hold_both_values() {
        let bar = |value| Bar { value, low: value - 0.1, high: value + 0.05 };
        let svg = bars(&[("strict", Some(bar(0.4)), bar(0.95))]);
        assert!(svg.contains("40.0%") && svg.contains("95.0%") && svg.contains("whisker"));
    }
}
