//! The sections of the report.

use contract::UpstreamRecord;
use data::{Metrics, Prediction, Rate};
use serde_json::Value;

use crate::Content;
use crate::chart::{Bar, bars, loss_curve};
use crate::document::Block;
use crate::ranking;
use crate::words::{date, duration, leaves, p_value, percent, points, rate, size};

/// Longest text of an example, in characters.
const SHOWN: usize = 900;

pub(crate) fn all(content: &Content, upstream: &[UpstreamRecord]) -> Vec<Block> {
    let mut blocks = vec![Block::Headline(headline(content))];
    if !content.params.notes.is_empty() {
        blocks.push(Block::Text(content.params.notes.clone()));
    }
    accuracies(content, &mut blocks);
    classes(content, &mut blocks);
    ranking::section(content, &mut blocks);
    loss(content, &mut blocks);
    model_and_data(content, upstream, &mut blocks);
    examples(content, &mut blocks);
    manual(content, &mut blocks);
    times(upstream, &mut blocks);
    params(upstream, &mut blocks);
    reproduce(&mut blocks);
    blocks
}

fn headline(content: &Content) -> String {
    let tuned = content.tuned.strict_accuracy.value;
    let n = content.tuned.prompts;
    let Some(baseline) = &content.baseline else {
        return format!("Strict accuracy {} on {n} held-out prompts.", percent(tuned));
    };
    let mut text = format!(
        "Strict accuracy rose from {} to {} on {n} held-out prompts",
        percent(baseline.strict_accuracy.value),
        percent(tuned)
    );
    if tuned < baseline.strict_accuracy.value {
        text = text.replacen("rose", "fell", 1);
    }
    if let Some(paired) =
        content.tuned.against_baseline.iter().find(|p| p.metric == "strict_accuracy")
    {
        text.push_str(&format!(
            " ({} points, 95% interval {} to {}; McNemar p = {})",
            points(paired.difference),
            points(paired.low),
            points(paired.high),
            p_value(paired.p_value)
        ));
    }
    let decisions = &content.tuned.decision_accuracy;
    text.push_str(&format!(
        "; call or no call is decided rightly in {} of the cases, {} before.",
        percent(decisions.value),
        percent(baseline.decision_accuracy.value)
    ));
    text
}

fn accuracies(content: &Content, blocks: &mut Vec<Block>) {
    blocks.push(Block::Heading("Accuracy".to_owned()));
    let tuned = &content.tuned;
    type Measure = (&'static str, &'static str, fn(&Metrics) -> &Rate);
    let measures: [Measure; 3] = [
        ("strict_accuracy", "Strict: right call in the trained format, or rightly none", |m| {
            &m.strict_accuracy
        }),
        ("lenient_accuracy", "Lenient: right call in any common format, or rightly none", |m| {
            &m.lenient_accuracy
        }),
        ("decision_accuracy", "Decision: call or no call", |m| &m.decision_accuracy),
    ];
    let mut rows = Vec::new();
    for (name, label, of) in measures {
        let mut row = vec![label.to_owned()];
        if let Some(baseline) = &content.baseline {
            row.push(rate(of(baseline)));
        }
        row.push(rate(of(tuned)));
        if content.baseline.is_some() {
            let paired = tuned.against_baseline.iter().find(|p| p.metric == name);
            row.extend(match paired {
                Some(p) => [
                    format!("{} [{}, {}]", points(p.difference), points(p.low), points(p.high)),
                    format!("{} / {}", p.wins, p.losses),
                    p_value(p.p_value),
                ],
                None => [String::new(), String::new(), String::new()],
            });
        }
        rows.push(row);
    }
    let head: &[&str] = if content.baseline.is_some() {
        &["", "base", "tuned", "difference, points", "won / lost", "p"]
    } else {
        &["", "tuned"]
    };
    blocks.push(drawn(content));
    blocks.push(Block::table(head, rows, true));
    blocks.push(Block::Text(format!(
        "In brackets 95% intervals: Wilson for a fraction, Wald for paired fractions; p is McNemar's exact \
         two-sided test. Never calling would decide {} of these prompts rightly, always calling {}.",
        percent(tuned.never_call_baseline),
        percent(tuned.always_call_baseline)
    )));
    if content.baseline.is_none() {
        blocks.push(Block::Text(
            "No baseline was wired, so there is nothing to compare with.".to_owned(),
        ));
    }
}

/// The accuracies as bars.
fn drawn(content: &Content) -> Block {
    let bar = |rate: &Rate| Bar { value: rate.value, low: rate.low, high: rate.high };
    let group = |name: &'static str, of: fn(&Metrics) -> &Rate| {
        (name, content.baseline.as_ref().map(|b| bar(of(b))), bar(of(&content.tuned)))
    };
    let groups = [
        group("strict", |m| &m.strict_accuracy),
        group("lenient", |m| &m.lenient_accuracy),
        group("decision", |m| &m.decision_accuracy),
    ];
    let caption = if content.baseline.is_some() {
        "Grey before training, blue after it; the lines are 95% intervals."
    } else {
        "The lines are 95% intervals."
    };
    Block::Figure { svg: bars(&groups), caption: caption.to_owned() }
}

fn classes(content: &Content, blocks: &mut Vec<Block>) {
    blocks.push(Block::Heading("By class".to_owned()));
    let mut rows = Vec::new();
    let runs = [("base", content.baseline.as_ref()), ("tuned", Some(&content.tuned))];
    for class in content.tuned.classes.keys() {
        for (run, metrics) in runs {
            let Some(counts) = metrics.and_then(|m| m.classes.get(class)) else { continue };
            let of = |n: u64| percent(n as f64 / counts.prompts.max(1) as f64);
            rows.push(vec![
                format!("{class}, {run}"),
                counts.prompts.to_string(),
                of(counts.calls),
                of(counts.decision_correct),
                of(counts.lenient_correct),
                of(counts.strict_correct),
            ]);
        }
    }
    let head = ["", "prompts", "called", "decided rightly", "lenient", "strict"];
    blocks.push(Block::table(&head, rows, true));
    let mut rows = Vec::new();
    for (run, metrics) in runs {
        let Some(m) = metrics else { continue };
        rows.push(vec![
            run.to_owned(),
            rate(&m.false_call_rate),
            rate(&m.missed_call_rate),
            format!("{} of {}", m.unended, m.prompts),
        ]);
    }
    let head = ["", "false calls", "missed calls", "answers cut at the token limit"];
    blocks.push(Block::table(&head, rows, true));
}

fn loss(content: &Content, blocks: &mut Vec<Block>) {
    blocks.push(Block::Heading("Training".to_owned()));
    let curve = |key: &str| -> Vec<(f64, f64)> {
        let point = |v: &Value| Some((v.get("step")?.as_f64()?, v.get(key)?.as_f64()?));
        content.train_log.iter().filter_map(point).collect()
    };
    let (train, eval) = (curve("loss"), curve("eval_loss"));
    let Some(svg) = loss_curve(&train, &eval) else {
        blocks.push(Block::Text("No training log was wired.".to_owned()));
        return;
    };
    let (first, last) = (train[0], train[train.len() - 1]);
    let mut caption = format!(
        "Training loss by step: {:.3} at step {}, {:.3} at step {}",
        first.1, first.0, last.1, last.0
    );
    if let Some((step, loss)) = eval.last() {
        caption.push_str(&format!("; evaluation loss (dots) {loss:.3} at step {step}"));
    }
    caption.push('.');
    blocks.push(Block::Figure { svg, caption });
    let every = (train.len() / 10).max(1);
    let rows = train.iter().enumerate().filter(|(i, _)| i % every == 0 || *i + 1 == train.len());
    let rows = rows.map(|(_, (step, loss))| {
        let eval = eval
            .iter()
            .find(|(s, _)| (s - step).abs() < 0.5)
            .map_or(String::new(), |(_, l)| format!("{l:.4}"));
        vec![step.to_string(), format!("{loss:.4}"), eval]
    });
    let columns = if eval.is_empty() { 2 } else { 3 };
    let rows = rows.map(|mut row| {
        row.truncate(columns);
        row
    });
    let header = &["step", "loss", "evaluation loss"][..columns];
    let numbers = Block::table(header, rows.collect(), true);
    blocks.push(Block::Folded("The numbers".to_owned(), Box::new(numbers)));
}

fn model_and_data(content: &Content, upstream: &[UpstreamRecord], blocks: &mut Vec<Block>) {
    blocks.push(Block::Heading("Model and data".to_owned()));
    let mut rows = Vec::new();
    for record in upstream.iter().filter(|r| r.kind == "download") {
        let mut source = Vec::new();
        leaves("", &record.params["source"], &mut source);
        let kept = source.into_iter().filter(|(_, v)| v != "null");
        let text: Vec<String> = kept.map(|(k, v)| format!("{k} {v}")).collect();
        let bytes = size(record.output_bytes.values().sum());
        rows.push(vec![record.stage.clone(), text.join(", "), bytes]);
    }
    if !rows.is_empty() {
        blocks.push(Block::table(&["source", "where from", "size"], rows, false));
    }
    let number = |v: &Value| v.as_f64().map_or_else(|| v.to_string(), |n| format!("{n}"));
    if let Some(stats) = &content.split_stats {
        let splits = stats["splits"].as_object().into_iter().flatten();
        let splits: Vec<String> =
            splits.map(|(name, s)| format!("{} {name}", number(&s["rows"]))).collect();
        blocks.push(Block::Text(format!(
            "{} rows in the source, shuffled with seed {}: {}; {} malformed rows dropped.",
            number(&stats["source_rows"]),
            number(&stats["seed"]),
            splits.join(", "),
            number(&stats["dropped"])
        )));
    }
    for (split, stats) in content.token_stats.iter().filter_map(Value::as_object).flatten() {
        blocks.push(Block::Text(format!(
            "{split}: {} tokens in {} rows packed into {} ({} of them targets of the loss; fill rate {}; {} rows cut).",
            number(&stats["tokens"]),
            number(&stats["rows"]),
            number(&stats["packed_rows"]),
            number(&stats["targets"]),
            percent(stats["fill_rate"].as_f64().unwrap_or_default()),
            number(&stats["truncated"]["count"])
        )));
    }
}

fn examples(content: &Content, blocks: &mut Vec<Block>) {
    blocks.push(Block::Heading("Examples".to_owned()));
    if content.tuned_predictions.is_empty() {
        blocks.push(Block::Text("No predictions were wired.".to_owned()));
        return;
    }
    let count = content.params.examples;
    blocks.push(Block::Text(format!(
        "Chosen by rule, not by hand: of each kind the {count} prompts with the lowest row numbers. Right \
         and wrong are by the strict parser."
    )));
    let before = |p: &Prediction| content.baseline_predictions.iter().find(|b| b.id == p.id);
    type Kind = fn(bool, bool) -> bool;
    let kinds: [(&str, Kind); 3] = [
        ("Won", |before, after| !before && after),
        ("Lost", |before, after| before && !after),
        ("Wrong before and after", |before, after| !before && !after),
    ];
    let mut tuned: Vec<&Prediction> = content.tuned_predictions.iter().collect();
    tuned.sort_by(|a, b| (a.index, &a.id).cmp(&(b.index, &b.id)));
    for (name, test) in kinds {
        let of_kind: Vec<_> = tuned
            .iter()
            .filter_map(|after| Some((before(after)?, *after)))
            .filter(|(b, a)| test(b.strict_correct, a.strict_correct))
            .collect();
        blocks.push(Block::Text(format!("{name}: {} of {}.", of_kind.len(), tuned.len())));
        for (before, after) in of_kind.into_iter().take(count) {
            let fault = |p: &Prediction| {
                if p.strict_correct { "right".to_owned() } else { p.strict.fault.clone() }
            };
            blocks.push(Block::Example {
                title: format!("{name}: {} (row {})", after.id, after.index),
                parts: vec![
                    ("User".to_owned(), cut(&after.user)),
                    ("Expected".to_owned(), cut(&after.expected)),
                    (format!("Base: {}", fault(before)), cut(&before.output)),
                    (format!("Tuned: {}", fault(after)), cut(&after.output)),
                ],
            });
        }
    }
}

fn manual(content: &Content, blocks: &mut Vec<Block>) {
    if content.tuned_manual.is_empty() {
        return;
    }
    blocks.push(Block::Heading("Questions of our own".to_owned()));
    for after in &content.tuned_manual {
        let before = content.baseline_manual.iter().find(|b| b.id == after.id);
        let tools = if after.tools.is_empty() { "none".to_owned() } else { after.tools.join(", ") };
        let mut parts = vec![];
        parts.extend(before.map(|b| ("Base".to_owned(), cut(&b.output))));
        parts.push(("Tuned".to_owned(), cut(&after.output)));
        blocks.push(Block::Example {
            title: format!("{} (tools on offer: {tools})", after.user),
            parts,
        });
    }
}

fn times(upstream: &[UpstreamRecord], blocks: &mut Vec<Block>) {
    blocks.push(Block::Heading("How long each artifact took to make".to_owned()));
    blocks.push(Block::Text(
        "From the record of the run that made it, which may be an earlier one, by somebody else."
            .to_owned(),
    ));
    let text = |v: Option<&Value>| v.and_then(Value::as_str).unwrap_or_default().to_owned();
    let row = |r: &UpstreamRecord| {
        let rate = r.telemetry.get("tokens_per_second").and_then(Value::as_f64);
        let memory = r.telemetry.get("peak_memory_bytes").and_then(Value::as_u64);
        vec![
            r.stage.clone(),
            duration(r.seconds),
            date(r.finished_at),
            text(r.provenance.get("device")),
            rate.map_or(String::new(), |t| format!("{t:.0} tok/s")),
            memory.map_or(String::new(), size),
            r.fingerprint.chars().take(8).collect(),
        ]
    };
    let mut rows: Vec<Vec<String>> = upstream.iter().map(row).collect();
    let total: f64 = upstream.iter().map(|r| r.seconds).sum();
    rows.push(vec![
        "together".to_owned(),
        duration(total),
        String::new(),
        String::new(),
        String::new(),
        String::new(),
        String::new(),
    ]);
    let head = ["stage", "took", "finished", "device", "rate", "peak memory", "fingerprint"];
    blocks.push(Block::table(&head, rows, false));
}

fn params(upstream: &[UpstreamRecord], blocks: &mut Vec<Block>) {
    blocks.push(Block::Heading("Parameters".to_owned()));
    let flat = |record: &UpstreamRecord| {
        let mut flat = Vec::new();
        leaves("", &record.params, &mut flat);
        flat
    };
    let mut rows = Vec::new();
    for record in upstream.iter().filter(|r| r.kind != "download") {
        let mut flat_of = flat(record);
        // Of a point of a sweep, what differs from the plain stage.
        let plain = record.stage.split_once('@').map(|(plain, _)| plain);
        if let Some(plain) = upstream.iter().find(|r| Some(r.stage.as_str()) == plain) {
            let usual = flat(plain);
            flat_of.retain(|entry| !usual.contains(entry));
        }
        let flat = flat_of;
        for (i, (path, value)) in flat.into_iter().enumerate() {
            let stage = if i == 0 { record.stage.clone() } else { String::new() };
            rows.push(vec![stage, path, cut(&value)]);
        }
    }
    let table = Block::table(&["stage", "param", "value"], rows, false);
    blocks.push(Block::Folded("Of every stage, defaults included".to_owned(), Box::new(table)));
}

fn reproduce(blocks: &mut Vec<Block>) {
    blocks.push(Block::Heading("Reproduce".to_owned()));
    blocks.push(Block::Code("pipe run".to_owned()));
    blocks.push(Block::Text(
        "in the folder of the pipeline file, with its lock file; what is in the cache is not run again.".to_owned(),
    ));
}

fn cut(text: &str) -> String {
    if text.chars().count() <= SHOWN {
        return text.to_owned();
    }
    let start: String = text.chars().take(SHOWN).collect();
    format!("{start}…")
}
