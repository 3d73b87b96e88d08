//! Sums and comparisons of nine predictions, computed by hand.
#![allow(clippy::unwrap_used, reason = "tests")]

use data::{Paired, Parse, Rate};
use serde_json::json;

use super::*;

/// A prediction of a class: whether it calls, and its strict, lenient and decision marks (`T`, `F`).
fn prediction(id: usize, class: &str, marks: &str) -> Prediction {
    let marks: Vec<bool> = marks.chars().map(|mark| mark == 'T').collect();
    let [attempted, strict_correct, lenient_correct, decision_correct] = marks[..] else {
        panic!("four marks")
    };
    let parse = Parse { attempted, ..Parse::default() };
    Prediction {
        id: format!("row{id}#1"),
        index: id as u64,
        class: class.to_owned(),
        user: String::new(),
        output: String::new(),
        ended: id != 3,
        tokens: 10 + id as u64,
        strict: parse.clone(),
        lenient: parse,
        strict_correct,
        lenient_correct,
        decision_correct,
        expected: String::new(),
    }
}

fn predictions(rows: &[(&str, &str)]) -> Vec<Prediction> {
    rows.iter().enumerate().map(|(id, (class, marks))| prediction(id, class, marks)).collect()
}

/// Five that want a call: right, right leniently twice, wrong, none. Three of four others without.
fn nine() -> Vec<Prediction> {
    predictions(&[
        ("call", "TTTT"),
        ("call", "TFTT"),
        ("call", "TFFT"),
        ("call", "FFFF"),
        ("call", "TFTT"),
        ("no-call", "FTTT"),
        ("no-call", "TFFF"),
        ("no-call", "FTTT"),
        ("no-tools", "FTTT"),
    ])
}

fn decoding(max_new_tokens: u64, limit: Option<u64>) -> Map<String, Value> {
    let json = json!({"method": "greedy", "max_new_tokens": max_new_tokens, "limit": limit});
    json.as_object().unwrap().clone()
}

fn is_near(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-12
}

fn is_rate(rate: Rate, hits: u64, of: u64, low: f64, high: f64) {
    assert_eq!((rate.hits, rate.of), (hits, of), "{rate:?}");
    let value = hits as f64 / of as f64;
    let holds = is_near(rate.value, value) && is_near(rate.low, low) && is_near(rate.high, high);
    assert!(holds, "{rate:?}");
}

#[test]
fn sums_of_nine_predictions_are_those_by_hand() {
    let found = summarise(&nine(), "digest".to_owned(), decoding(96, None));
    assert_eq!(found.prompts, 9);
    // Wilson's intervals, computed apart in Python.
    is_rate(found.strict_accuracy, 4, 9, 0.188_778_521_097_664_58, 0.733_348_706_504_506_9);
    is_rate(found.lenient_accuracy, 6, 9, 0.354_202_135_580_396_3, 0.879_416_181_613_089);
    is_rate(found.decision_accuracy, 7, 9, 0.452_588_969_106_988_9, 0.936_774_892_882_153_3);
    is_rate(found.missed_call_rate, 1, 5, 0.036_224_108_632_430_085, 0.624_465_370_237_474_5);
    is_rate(found.false_call_rate, 1, 4, 0.045_587_260_809_700_55, 0.699_358_157_417_598_1);
    assert!(is_near(found.never_call_baseline, 4.0 / 9.0), "{}", found.never_call_baseline);
    assert!(is_near(found.always_call_baseline, 5.0 / 9.0), "{}", found.always_call_baseline);
    assert_eq!(found.unended, 1);
    assert_eq!((found.prompts_digest.as_str(), &found.decoding), ("digest", &decoding(96, None)));
    assert!(found.against_baseline.is_empty());
}

#[test]
fn classes_are_counted_apart() {
    let found = summarise(&nine(), String::new(), Map::new()).classes;
    let counts = |[prompts, calls, strict_correct, lenient_correct, decision_correct]: [u64; 5]| {
        ClassCounts { prompts, calls, strict_correct, lenient_correct, decision_correct }
    };
    let expected = [
        ("call".to_owned(), counts([5, 4, 1, 3, 4])),
        ("no-call".to_owned(), counts([3, 1, 2, 2, 2])),
        ("no-tools".to_owned(), counts([1, 0, 1, 1, 1])),
    ];
    assert_eq!(found, BTreeMap::from(expected));
}

/// `nine` as an earlier run whose first six are wrong by every measure, and the seventh right.
fn baseline() -> Baseline {
    let mut predictions = nine();
    for (id, prediction) in predictions.iter_mut().enumerate().take(7) {
        let is_right = id == 6;
        prediction.strict_correct = is_right;
        prediction.lenient_correct = is_right;
        prediction.decision_correct = is_right;
    }
    let metrics = summarise(&predictions, "digest".to_owned(), decoding(96, None));
    Baseline { metrics, predictions }
}

#[test]
fn a_comparison_counts_pairs_and_tests_them_exactly() {
    let found = baseline().compare(&nine()).unwrap();
    // Wins and losses by hand; p is 2 Σ C(n, k) / 2ⁿ over k up to the fewer: 2 · 4 / 8 for 2 to 1,
    // 2 · 6 / 32 for 4 to 1, 2 · 7 / 64 for 5 to 1. Wald's intervals are computed apart in Python.
    for (paired, (metric, wins, losses, p)) in found.iter().zip([
        ("strict_accuracy", 2, 1, 1.0),
        ("lenient_accuracy", 4, 1, 0.375),
        ("decision_accuracy", 5, 1, 0.218_75),
    ]) {
        let Paired { metric: name, difference, p_value, .. } = paired;
        assert_eq!((name.as_str(), paired.wins, paired.losses), (metric, wins, losses));
        assert!(is_near(*difference, (wins as f64 - losses as f64) / 9.0), "{paired:?}");
        assert!(is_near(*p_value, p), "{paired:?}");
    }
    assert_eq!(found.len(), 3);
    let lenient = &found[1];
    assert!(is_near(lenient.low, -0.102_214_218_786_678_69), "{lenient:?}");
    assert!(is_near(lenient.high, 0.768_880_885_453_345_3), "{lenient:?}");
}

#[test]
fn a_comparison_with_itself_finds_nothing() {
    let itself = Baseline { predictions: nine(), ..baseline() };
    for paired in itself.compare(&nine()).unwrap() {
        assert_eq!((paired.wins, paired.losses), (0, 0), "{paired:?}");
        assert!(is_near(paired.difference, 0.0) && is_near(paired.p_value, 1.0), "{paired:?}");
    }
}

#[test]
fn predictions_of_other_prompts_are_not_compared() {
    let shorter = Baseline { predictions: nine()[1..].to_vec(), ..baseline() };
    let mut swapped = baseline();
    swapped.predictions.swap(0, 1);
    for other in [shorter, swapped] {
        let fault = other.compare(&nine()).unwrap_err();
        assert!(fault.message.contains("does not belong to `baseline_metrics`"), "{fault}");
    }
}

#[test]
fn a_baseline_of_other_prompts_or_decoding_is_refused_and_says_what_differs() {
    let ours = decoding(96, None);
    baseline().check("digest", &ours).unwrap();
    let fault = baseline().check("other", &ours).unwrap_err();
    assert_eq!(fault.message, "the baseline answered other prompts than this evaluation");
    let fault = baseline().check("digest", &decoding(8, Some(3))).unwrap_err();
    assert_eq!(
        fault.message,
        "the baseline decoded otherwise: `limit` is 3 here and null there, \
         `max_new_tokens` is 8 here and 96 there"
    );
    let fault = baseline().check("digest", &Map::new()).unwrap_err();
    assert!(fault.message.contains("`method` is unset here and \"greedy\" there"), "{fault}");
}
