//! The loss curve as a small SVG.

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 280.0;
const LEFT: f64 = 48.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 16.0;
const BOTTOM: f64 = 36.0;

/// Draws training loss as a line and evaluation loss as dots, both `(step, loss)`; `None` without
/// points.
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
    let mut out =
        format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"loss by step\">");
    let ticks = (top / tick).round() as usize;
    for i in 0..=ticks {
        let value = tick * i as f64;
        let (at, right) = (y(value), WIDTH - RIGHT);
        out.push_str(&format!(
            "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text class=\"label\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            at + 4.0,
            short(value)
        ));
    }
    for i in 0..=4 {
        let step = (steps * f64::from(i) / 4.0).round();
        out.push_str(&format!(
            "<text class=\"label\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{step}</text>",
            x(step),
            HEIGHT - 14.0
        ));
    }
    let path = |points: &[(f64, f64)]| -> String {
        let at = |(i, (s, l)): (usize, &(f64, f64))| {
            format!("{}{:.1} {:.1}", if i == 0 { "M" } else { "L" }, x(*s), y(*l))
        };
        points.iter().enumerate().map(at).collect()
    };
    out.push_str(&format!("<path class=\"train\" d=\"{}\"/>", path(train)));
    if !eval.is_empty() {
        out.push_str(&format!("<path class=\"eval\" d=\"{}\"/>", path(eval)));
        for (step, loss) in eval {
            out.push_str(&format!(
                "<circle class=\"dot\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\"/>",
                x(*step),
                y(*loss)
            ));
        }
    }
    out.push_str("</svg>");
    Some(out)
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

fn short(value: f64) -> String {
    let text = format!("{value:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text.is_empty() { "0".to_owned() } else { text.to_owned() }
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
        assert!(svg.contains("class=\"dot\"") && !svg.contains("NaN") && !svg.contains("-1."));
        assert!(loss_curve(&[], &[]).is_none());
    }
}
