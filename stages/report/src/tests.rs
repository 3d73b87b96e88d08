#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::fs;

use contract::UpstreamRecord;
use serde_json::{Map, json};

use super::*;

fn rate(hits: u64, of: u64) -> Value {
    let value = hits as f64 / of as f64;
    json!({"value": value, "low": value - 0.05, "high": value + 0.05, "hits": hits, "of": of})
}

fn metrics(strict: u64, paired: bool) -> Value {
    let counts = json!({"prompts": 5, "calls": 3, "strict_correct": 2, "lenient_correct": 3, "decision_correct": 3});
    let against = if paired {
        json!([{"metric": "strict_accuracy", "difference": 0.3, "low": 0.1, "high": 0.5, "wins": 4, "losses": 1, "p_value": 0.0004}])
    } else {
        json!([])
    };
    json!({"prompts": 10, "strict_accuracy": rate(strict, 10), "lenient_accuracy": rate(strict, 10),
        "decision_accuracy": rate(strict, 10), "false_call_rate": rate(1, 5), "missed_call_rate": rate(2, 5),
        "never_call_baseline": 0.5, "always_call_baseline": 0.5, "classes": {"call": counts, "no-call": counts},
        "unended": 1, "prompts_digest": "d", "decoding": {}, "against_baseline": against})
}

fn prediction(index: u64, right: bool) -> Value {
    let parse =
        json!({"attempted": true, "calls": [], "fault": if right { "" } else { "no call" }});
    json!({"id": format!("row_{index}"), "index": index, "class": "call", "user": "<b>how</b>?",
        "output": "out", "ended": true, "tokens": 3, "strict": parse, "lenient": parse,
        "strict_correct": right, "lenient_correct": right, "decision_correct": right, "expected": "call"})
}

fn request(dir: &Path, with_baseline: bool) -> Request {
    let mut inputs = BTreeMap::new();
    let mut put = |name: &str, text: String| {
        let path = dir.join(name);
        fs::write(&path, text).unwrap();
        inputs.insert(name.to_owned(), path);
    };
    let lines = |rows: Vec<Value>| rows.iter().map(|r| format!("{r}\n")).collect::<String>();
    put("tuned_metrics", metrics(7, with_baseline).to_string());
    if with_baseline {
        put("baseline_metrics", metrics(4, false).to_string());
        put(
            "tuned_predictions",
            lines(vec![prediction(9, true), prediction(2, true), prediction(5, false)]),
        );
        put(
            "baseline_predictions",
            lines(vec![prediction(9, false), prediction(2, false), prediction(5, true)]),
        );
        put(
            "train_log",
            lines(vec![
                json!({"step": 1, "loss": 2.0}),
                json!({"step": 2, "loss": 1.0, "eval_loss": 1.2}),
            ]),
        );
    }
    let upstream = UpstreamRecord {
        stage: "train".into(),
        kind: "train".into(),
        fingerprint: "ab".repeat(32),
        params: json!({"lora": {"r": 16}}),
        needs: vec![],
        seconds: 372.0,
        finished_at: 1_795_425_300,
        telemetry: Map::new(),
        provenance: json!({"device": "cpu"}).as_object().unwrap().clone(),
        output_bytes: BTreeMap::new(),
    };
    let request = fixtures::request(&Report, &json!({"examples": 1}), &[], dir);
    Request { inputs, upstream: vec![upstream], ..request }
}

fn report(with_baseline: bool) -> (String, String) {
    let dir = tempfile::tempdir().unwrap();
    let request = request(dir.path(), with_baseline);
    written(dir.path(), &request)
}

fn written(dir: &Path, request: &Request) -> (String, String) {
    Report.run(request, &mut Reporter::silent()).unwrap();
    let read = |name| fs::read_to_string(dir.join(name)).unwrap();
    (read("report.html"), read("report.md"))
}

#[test]
fn both_pages_hold_the_same_numbers() {
    let (html, markdown) = report(true);
    for page in [&html, &markdown] {
        for number in [
            "40.0%",
            "70.0%",
            "+30.0",
            "4 / 1",
            "4.0e-4",
            "6 min 12 s",
            "2026-11-23 09:15 UTC",
            "2.000 at step 1",
        ] {
            assert!(page.contains(number), "{number} is missing in\n{page}");
        }
    }
    assert!(html.contains("<svg") && !html.contains("http"), "self-contained");
    assert!(html.contains("&lt;b&gt;how&lt;/b&gt;?") && !html.contains("<b>"));
}

#[test]
fn examples_are_those_with_the_lowest_row_numbers() {
    let (_, markdown) = report(true);
    assert!(markdown.contains("Won: row_2 (row 2)") && !markdown.contains("row_9 (row 9)"));
    assert!(markdown.contains("Lost: row_5 (row 5)"));
}

#[test]
fn absent_inputs_are_named() {
    let (_, markdown) = report(false);
    for text in ["No baseline was wired", "No training log was wired", "No predictions were wired"]
    {
        assert!(markdown.contains(text), "{text}");
    }
}

/// A sweep of three points; the log of each has its own loss.
fn with_ranking(dir: &Path) -> Request {
    let mut request = request(dir, true);
    let ranked = |point: &str, steps: u64, score: f64| {
        let beside = json!({"value": score, "low": score - 0.07, "high": score + 0.06, "hits": 1, "of": 200});
        json!({"point": point, "params": {"max_steps": steps}, "score": score,
            "scores": {point: score}, "beside": {point: beside}})
    };
    let ranking = [
        ranked("max_steps=300", 300, 0.75),
        ranked("default", 120, 0.7),
        ranked("max_steps=10", 10, 0.4),
    ];
    let choice = json!({"metric": "strict_accuracy.value", "goal": "max", "best": ranking[0], "ranking": ranking});
    fs::write(dir.join("choice.json"), choice.to_string()).unwrap();
    let logs = dir.join("logs");
    let mut index = Vec::new();
    for (point, loss) in [("default", 2.5), ("max_steps=300", 1.5), ("max_steps=10", 3.5)] {
        let path = format!("{point}/log.jsonl");
        fs::create_dir_all(logs.join(point)).unwrap();
        fs::write(logs.join(&path), format!("{}\n", json!({"step": 1, "loss": loss}))).unwrap();
        index.push(json!({"point": point, "path": path, "params": {}}));
    }
    fs::write(logs.join("index.json"), json!(index).to_string()).unwrap();
    request.inputs.insert("ranking".to_owned(), dir.join("choice.json"));
    request.inputs.insert("train_log".to_owned(), logs);
    request
}

#[test]
fn ranking_marks_the_chosen_point_and_its_log_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let (html, markdown) = written(dir.path(), &with_ranking(dir.path()));
    let rows: Vec<&str> = markdown.lines().filter(|l| l.starts_with("| ")).collect();
    let of = |start: &str| *rows.iter().find(|r| r.starts_with(start)).unwrap();
    assert_eq!(
        of("| **1** |"),
        "| **1** | **→ 300** | **75.0% [68.0, 81.0]** | **+5.0** | **chosen** |"
    );
    assert_eq!(of("| 2 |"), "| 2 | 120 | 70.0% [63.0, 76.0] | default |  |");
    for page in [&html, &markdown] {
        assert!(page.contains("200 prompts set aside for choosing"));
        // Of two others one is too far away.
        assert!(page.contains("The intervals of 1 of the other 2 overlap"), "{page}");
        assert!(page.contains("answered the 10 test prompts, once: strict accuracy 70.0%"));
        assert!(page.contains("1.500 at step 1") && !page.contains("2.500 at step 1"));
    }
    assert!(html.contains("<tr class=\"marked\"><td>1</td>"));
}

#[test]
fn gathered_logs_without_a_choice_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut request = with_ranking(dir.path());
    request.inputs.remove("ranking");
    let error = Report.run(&request, &mut Reporter::silent()).unwrap_err();
    assert!(error.message.contains("train_log"), "{}", error.message);
}
