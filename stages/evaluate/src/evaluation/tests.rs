//! The stage from its inputs to its outputs, on answers by heart.
#![allow(clippy::unwrap_used, reason = "tests")]

use contract::Progress;
use data::{ExpectedCall, Paired, Tool};

use super::*;
use crate::answerer::script::Script;
use crate::trial::Trial;

fn weather() -> Tool {
    let function = json!({"name": "weather", "parameters": {"properties": {"city": {}}}});
    Tool::new(function.as_object().unwrap().clone())
}

/// A prompt whose right answer calls `weather` for these cities.
fn prompt(index: u64, tools: &[Tool], cities: &[&str]) -> Prompt {
    let call = |city: &&str| ExpectedCall {
        name: "weather".to_owned(),
        arguments: map(json!({"city": [city]})),
    };
    Prompt {
        id: format!("row{index}#1"),
        index,
        turn: 1,
        text: format!("question {index}: "),
        end_mark: "<end>".to_owned(),
        user: format!("question {index}"),
        tools: tools.to_vec(),
        expected: Some(Expected {
            calls: cities.iter().map(call).collect(),
            text: format!("reference {index}"),
        }),
    }
}

fn called(city: &str) -> String {
    let call = json!({"name": "weather", "arguments": {"city": city}});
    format!("<tool_call>\n{call}\n</tool_call>")
}

/// Prompts, and the answer to each; what is right of it strictly, leniently and as a decision.
fn rows() -> Vec<(Prompt, String, [bool; 3])> {
    let tools = [weather()];
    let bare = r#"{"name": "weather", "arguments": {"city": "Oslo"}}"#.to_owned();
    let both = called("Rome") + "\n" + &called("Oslo");
    let (yes, no) = (true, false);
    vec![
        (prompt(0, &tools, &["Oslo"]), called("Oslo"), [yes, yes, yes]),
        (prompt(1, &tools, &["Oslo"]), bare, [no, yes, yes]),
        (prompt(2, &tools, &["Oslo"]), called("Rome"), [no, no, yes]),
        (prompt(3, &tools, &["Oslo"]), "Fine, I guess.".to_owned(), [no, no, no]),
        (prompt(4, &tools, &[]), "Hello 😀!".to_owned(), [yes, yes, yes]),
        (prompt(5, &tools, &[]), called("Oslo"), [no, no, no]),
        (prompt(6, &[], &[]), "x".repeat(200), [yes, yes, yes]),
        (prompt(7, &tools, &["Oslo", "Rome"]), both, [yes, yes, yes]),
    ]
}

fn manual() -> Vec<Prompt> {
    let ask = |index, tools: &[Tool]| Prompt { expected: None, ..prompt(index, tools, &[]) };
    vec![ask(8, &[weather()]), ask(9, &[])]
}

/// A folder with `prompts.jsonl` and `manual.jsonl`, and a model that knows the answers.
struct Bench {
    dir: tempfile::TempDir,
    script: Script,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let prompts: Vec<Prompt> = rows().into_iter().map(|(prompt, ..)| prompt).collect();
        data::write_jsonl(&dir.path().join("prompts.jsonl"), &prompts).unwrap();
        data::write_jsonl(&dir.path().join("manual.jsonl"), &manual()).unwrap();
        let answers = rows().into_iter().map(|(prompt, answer, _)| (prompt.text, answer));
        let shown = manual().into_iter().map(|p| (p.text, format!("answer {}", p.index)));
        let answers = answers.chain(shown).collect();
        Self { dir, script: Script { answers, max_positions: 300, ..Script::default() } }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn trial(&self, params: Value, earlier: &[&Trial]) -> Trial {
        let (prompts, manual) = (self.path("prompts.jsonl"), self.path("manual.jsonl"));
        Trial::new(params, &[("prompts", &prompts), ("manual", &manual)], earlier)
    }

    /// The same prompts compared with an earlier evaluation.
    fn compared(&self, params: Value, baseline: &Trial) -> Trial {
        let [metrics, predictions] =
            ["metrics.json", "predictions.jsonl"].map(|name| baseline.path(name));
        let inputs: [(&str, &Path); 3] = [
            ("prompts", &self.path("prompts.jsonl")),
            ("baseline_metrics", &metrics),
            ("baseline_predictions", &predictions),
        ];
        Trial::new(params, &inputs, &[])
    }

    /// A model that has this one answer to all prompts.
    fn that_says(&self, answer: &str) -> Script {
        let answers = self.script.answers.keys().map(|text| (text.clone(), answer.to_owned()));
        Script { answers: answers.collect(), max_positions: 300, ..Script::default() }
    }
}

fn params() -> Value {
    json!({"max_new_tokens": 150, "batch_size": 3})
}

#[test]
fn every_prompt_is_answered_scored_and_written_in_order() {
    let bench = Bench::new();
    let trial = bench.trial(params(), &[]);
    let outcome = trial.run(&bench.script).unwrap();
    let predictions = trial.predictions();
    assert_eq!(predictions.len(), 8);
    for ((prompt, answer, right), found) in rows().into_iter().zip(predictions) {
        let output: String = answer.chars().take(150).collect();
        assert_eq!((&found.id, found.index, &found.user), (&prompt.id, prompt.index, &prompt.user));
        assert_eq!((found.class.as_str(), &found.output), (prompt.class().unwrap(), &output));
        assert_eq!((found.tokens, found.ended), (output.chars().count() as u64, prompt.index != 6));
        assert_eq!(
            [found.strict_correct, found.lenient_correct, found.decision_correct],
            right,
            "{output}"
        );
        assert_eq!(found.strict.fault.is_empty(), right[0], "{:?}", found.strict);
        assert_eq!(found.lenient.fault.is_empty(), right[1], "{:?}", found.lenient);
        assert_eq!(found.expected, format!("reference {}", prompt.index));
    }
    let manual: Vec<ManualAnswer> = read_jsonl(&trial.path("manual.jsonl")).unwrap();
    let said: Vec<_> = manual.iter().map(|m| (m.output.as_str(), m.ended, m.tools.len())).collect();
    assert_eq!(said, [("answer 8", true, 1), ("answer 9", true, 0)]);
    assert_eq!(outcome.telemetry["rows"], 10);
    assert_eq!(outcome.telemetry["prompt_tokens"], 10 * "question 0: ".len());
    assert_eq!(outcome.provenance["backend"], "script");
    assert!(outcome.warnings.is_empty(), "{:?}", outcome.warnings);
}

#[test]
fn metrics_are_the_sums_of_the_predictions() {
    let bench = Bench::new();
    let trial = bench.trial(params(), &[]);
    trial.run(&bench.script).unwrap();
    let found = trial.metrics();
    let part = |rate: data::Rate| (rate.hits, rate.of);
    assert_eq!(part(found.strict_accuracy), (4, 8));
    assert_eq!(part(found.lenient_accuracy), (5, 8));
    assert_eq!(part(found.decision_accuracy), (6, 8));
    assert_eq!(part(found.missed_call_rate), (1, 5));
    assert_eq!(part(found.false_call_rate), (1, 3));
    let baselines = (found.never_call_baseline, found.always_call_baseline);
    assert_eq!(baselines, (0.375, 0.625));
    assert_eq!((found.prompts, found.unended), (8, 1));
    assert_eq!(
        found.decoding,
        map(json!({"method": "greedy", "max_new_tokens": 150, "limit": null}))
    );
    let bytes = std::fs::read(bench.path("prompts.jsonl")).unwrap();
    assert_eq!(found.prompts_digest, blake3::hash(&bytes).to_hex().as_str());
}

#[test]
fn batches_change_no_output() {
    let bench = Bench::new();
    let outputs = [json!(1), json!(3), json!(64), Value::Null].map(|batch_size| {
        let trial = bench.trial(json!({"max_new_tokens": 150, "batch_size": batch_size}), &[]);
        trial.run(&bench.script).unwrap();
        trial.outputs()
    });
    assert_eq!(outputs[0].len(), 3);
    assert!(outputs[0].values().all(Option::is_some));
    assert!(outputs.iter().all(|other| *other == outputs[0]));
}

#[test]
fn an_attempt_killed_after_any_row_is_continued_without_repeating_one() {
    let bench = Bench::new();
    let whole = bench.trial(params(), &[]);
    whole.run(&bench.script).unwrap();
    for done in 0..=10 {
        let killed = bench.trial(params(), &[]);
        let first = Script { dies_after: Some(done), ..Bench::new().script };
        assert_eq!(killed.run(&first).is_err(), done < 10, "{done}");
        let resumed = bench.trial(params(), &[&killed]);
        let second = Bench::new().script;
        let outcome = resumed.run(&second).unwrap();
        assert_eq!(resumed.outputs(), whole.outputs(), "{done}");
        assert_eq!(outcome.telemetry["resumed_rows"], done);
        let (before, after) = (first.answered.take(), second.answered.take());
        assert_eq!((before.len(), after.len()), (done, 10 - done));
        assert!(after.iter().all(|text| !before.contains(text)), "{done}: {after:?}");
        let adopted = format!("{done} rows adopted from an earlier attempt");
        assert_eq!(resumed.text("log").contains(&adopted), done > 0);
    }
}

#[test]
fn a_checkpoint_that_does_not_fit_the_prompts_is_ignored() {
    let bench = Bench::new();
    let whole = bench.trial(params(), &[]);
    whole.run(&bench.script).unwrap();
    let answer = |prompt: usize, tokens: usize| json!({"prompt": prompt, "tokens": vec![65; tokens], "ended": true});
    let maker = json!({"backend": "script", "gpu": null});
    let kept = |answers: Value| json!({"maker": maker, "answers": answers});
    for unfit in [
        json!("not answers"),
        json!([answer(0, 2)]),
        kept(json!([answer(10, 2)])),
        kept(json!([answer(1, 2), answer(1, 2)])),
        kept(json!([answer(0, 151)])),
    ] {
        let earlier = bench.trial(params(), &[]);
        earlier.save_checkpoint(unfit.to_string().as_bytes());
        let trial = bench.trial(params(), &[&earlier]);
        let outcome = trial.run(&bench.script).unwrap();
        assert_eq!(outcome.telemetry["resumed_rows"], 0, "{unfit}");
        assert_eq!(trial.outputs(), whole.outputs(), "{unfit}");
    }
}

#[test]
fn answers_of_another_device_or_with_other_rows_at_once_are_not_adopted() {
    let bench = Bench::new();
    let on = |gpu, dies_after| Script { dies_after, gpu, ..Bench::new().script };
    let with = |batch: u64| json!({"max_new_tokens": 150, "batch_size": batch});
    let (a, b) = (Some("GPU A"), Some("GPU B"));
    for (first, second, warning) in [
        ((None, 3), (None, 5), None),
        ((a, 3), (a, 3), None),
        (
            (a, 3),
            (b, 3),
            Some("answered by GPU A with 3 rows at once, and this one works on GPU B"),
        ),
        ((a, 3), (a, 5), Some("with 3 rows at once, and this one works on GPU A with 5 rows")),
        ((a, 3), (None, 3), Some("and this one works on script: starting anew")),
        ((None, 3), (a, 3), Some("answered by script")),
    ] {
        let killed = bench.trial(with(first.1), &[]);
        killed.run(&on(first.0, Some(7))).unwrap_err();
        let again = bench.trial(with(second.1), &[&killed]);
        again.run(&on(second.0, Some(2))).unwrap_err();
        let log = again.text("log");
        assert_eq!(log.contains("starting anew"), warning.is_some(), "{log}");
        assert!(log.contains(warning.unwrap_or("7 rows adopted")), "{log}");
        // Newer checkpoints count, however few answers they have.
        let third = bench.trial(with(second.1), &[&killed, &again]);
        third.run(&on(second.0, Some(usize::from(warning.is_some())))).unwrap_err();
        let last = bench.trial(with(second.1), &[&killed, &again, &third]);
        let outcome = last.run(&on(second.0, None)).unwrap();
        let adopted = if warning.is_some() { 3 } else { 9 };
        assert_eq!(outcome.telemetry["resumed_rows"], adopted, "{second:?}");
    }
}

#[test]
fn the_difference_to_a_baseline_is_stored_and_said() {
    let bench = Bench::new();
    let silent = bench.trial(params(), &[]);
    silent.run(&bench.that_says("I cannot.")).unwrap();
    let trial = bench.compared(params(), &silent);
    trial.run(&bench.script).unwrap();
    // Never calling is right in rows 4 to 6, of which this loses row 5.
    let found: Vec<_> = trial.metrics().against_baseline;
    let part = |p: &Paired| (p.metric.clone(), p.wins, p.losses, p.difference, p.p_value);
    let expected =
        [("strict", 2, 0.125, 1.0), ("lenient", 3, 0.25, 0.625), ("decision", 4, 0.375, 0.375)];
    let expected = expected.map(|(name, wins, by, p)| (format!("{name}_accuracy"), wins, 1, by, p));
    assert_eq!(found.iter().map(part).collect::<Vec<_>>(), expected);
    let log = trial.text("log");
    for line in [
        "strict_accuracy: 37.5% -> 50.0%, +12.5 points [",
        "McNemar p 1.000 (won 2, lost 1)",
        "lenient_accuracy: 37.5% -> 62.5%, +25.0 points [",
        "McNemar p 0.625 (won 3, lost 1)",
        "decision_accuracy: 37.5% -> 75.0%, +37.5 points [",
        "McNemar p 0.375 (won 4, lost 1)",
    ] {
        assert!(log.contains(line), "{line}: {log}");
    }
    let last = trial.events().pop().unwrap();
    let Progress::Advance { done: 8, total: 8, note, .. } = last else { panic!("{last:?}") };
    assert_eq!(note, "strict +12.5, lenient +25.0, decision +37.5 points against the baseline");
}

#[test]
fn work_and_estimate_come_before_the_first_row_and_the_result_with_the_last() {
    let bench = Bench::new();
    let trial = bench.trial(params(), &[]);
    trial.run(&bench.script).unwrap();
    let events = trial.events();
    let amount = "120 prompt tokens, at most 1500 new ones";
    assert_eq!(events[0], Progress::Log { message: format!("10 rows to answer: {amount}") });
    let Progress::Advance { done: 0, total: 10, note, .. } = &events[1] else {
        panic!("{events:?}")
    };
    assert_eq!(note, amount);
    let Progress::Estimate { seconds: Some(seconds), basis, .. } = &events[2] else {
        panic!("{events:?}")
    };
    assert!(*seconds >= 0.0);
    assert_eq!(basis, "at most, for answers of 150 tokens; measured on 3 short prompts");
    let rows: Vec<u64> = events.iter().filter_map(progressed).collect();
    assert_eq!(rows, (0..=10).collect::<Vec<_>>());
    let Some(Progress::Advance { note, .. }) = events.last() else { panic!("{events:?}") };
    assert_eq!(note, "strict 50.0%, lenient 62.5%, decision 75.0%");
    // Three rows of a token and three short ones, and none of them an answer.
    assert_eq!((bench.script.others.get(), bench.script.answered.borrow().len()), (9, 10));
}

fn progressed(event: &Progress) -> Option<u64> {
    match event {
        Progress::Advance { done, .. } => Some(*done),
        _ => None,
    }
}

#[test]
fn one_batch_is_not_worth_a_probe() {
    let bench = Bench::new();
    let trial = bench.trial(json!({"max_new_tokens": 150, "batch_size": 10}), &[]);
    trial.run(&bench.script).unwrap();
    assert_eq!(bench.script.others.get(), 0);
    assert!(!trial.events().iter().any(|e| matches!(e, Progress::Estimate { .. })));
}

#[test]
fn a_baseline_of_another_kind_is_refused_before_the_model_is_loaded() {
    let bench = Bench::new();
    let baseline = bench.trial(params(), &[]);
    baseline.run(&bench.script).unwrap();
    let fault = bench.compared(json!({"max_new_tokens": 96}), &baseline).refusal();
    let message = "the baseline decoded otherwise: `max_new_tokens` is 96 here and 150 there";
    assert_eq!(fault.message, message);

    let others: Vec<Prompt> = rows().into_iter().skip(1).map(|(prompt, ..)| prompt).collect();
    data::write_jsonl(&bench.path("prompts.jsonl"), &others).unwrap();
    let fault = bench.compared(params(), &baseline).refusal();
    assert_eq!(fault.message, "the baseline answered other prompts than this evaluation");

    let prompts = bench.path("prompts.jsonl");
    let metrics = baseline.path("metrics.json");
    let half: [(&str, &Path); 2] = [("prompts", &prompts), ("baseline_metrics", &metrics)];
    let fault = Trial::new(params(), &half, &[]).refusal();
    assert!(fault.message.contains("both metrics and predictions"), "{fault}");

    std::fs::write(&metrics, "{\n  \"prompts\": none}").unwrap();
    let fault = bench.compared(params(), &baseline).refusal();
    assert!(fault.message.contains("metrics.json:2:"), "{fault}");
}

#[test]
fn prompts_that_cannot_be_scored_are_refused_before_the_model_is_loaded() {
    let bench = Bench::new();
    let refusal = |prompts: &[Prompt]| {
        data::write_jsonl(&bench.path("prompts.jsonl"), prompts).unwrap();
        bench.trial(params(), &[]).refusal().message
    };
    let one = prompt(0, &[], &[]);
    assert_eq!(refusal(&[]), "there are no prompts to evaluate");
    assert_eq!(refusal(&[one.clone(), one]), "prompt `row0#1` is there twice");
    assert_eq!(refusal(&manual()), "prompt `row8#1` has no right answer");
}

#[test]
fn prompts_that_the_model_cannot_answer_are_named() {
    let bench = Bench::new();
    let fault = |change: fn(&mut Prompt)| {
        let mut prompts = vec![prompt(0, &[], &[]), prompt(1, &[], &[])];
        change(&mut prompts[1]);
        data::write_jsonl(&bench.path("prompts.jsonl"), &prompts).unwrap();
        bench.trial(params(), &[]).run(&bench.script).unwrap_err().message
    };
    assert_eq!(fault(|p| p.text.clear()), "prompt `row1#1` is empty");
    let long = fault(|p| p.text = "x".repeat(151));
    assert!(
        long.starts_with("prompt `row1#1` has 151 tokens and the model's context of 300"),
        "{long}"
    );
    let mark = fault(|p| p.end_mark = "<stop>".to_owned());
    assert_eq!(mark, "end mark `<stop>` of prompt `row1#1` is no token of this model");
}

#[test]
fn a_limit_scores_the_first_prompts_and_keeps_the_manual_ones() {
    let bench = Bench::new();
    let trial = bench.trial(json!({"max_new_tokens": 150, "limit": 3}), &[]);
    trial.run(&bench.script).unwrap();
    let ids: Vec<String> = trial.predictions().into_iter().map(|p| p.id).collect();
    assert_eq!(ids, ["row0#1", "row1#1", "row2#1"]);
    assert_eq!(trial.metrics().decoding["limit"], 3);
    assert_eq!(trial.text("manual.jsonl").lines().count(), 2);
}

#[test]
fn answers_that_mostly_hit_the_limit_are_warned_of() {
    let bench = Bench::new();
    let trial = bench.trial(json!({"max_new_tokens": 9}), &[]);
    let outcome = trial.run(&bench.that_says("I cannot say.")).unwrap();
    assert_eq!(trial.metrics().unended, 8);
    assert_eq!(outcome.warnings, ["8 of 8 answers ran into `max_new_tokens`"]);
}
