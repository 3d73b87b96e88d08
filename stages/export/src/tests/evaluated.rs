//! Exports evaluated on the prompts of the adapter that went into them, and compared with it.

use data::{Expected, ExpectedCall, Metrics, Paired, Prediction, Prompt, Rate};

use super::*;

const PROMPTS: u64 = 24;

/// A tiny Qwen2 whose tokenizer has a text for each of its 512 tokens. Every fourth of those that
/// no text has is the beginning of a call, so that answers decide one way or the other.
fn that_calls() -> tempfile::TempDir {
    let model = with_tokenizer("qwen2", "f32");
    let path = model.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    // Three marks are beside the vocabulary.
    for id in vocab.len() + 3..512 {
        let text = if id % 4 == 0 { format!("<tool_call>{id}") } else { format!("w{id}") };
        vocab.insert(text, json!(id));
    }
    std::fs::write(path, tokenizer.to_string()).unwrap();
    model
}

/// Every other prompt wants a call.
fn write_prompts(path: &Path) {
    let lines: Vec<Prompt> = (0..PROMPTS)
        .map(|i| {
            let call = ExpectedCall { name: "times".to_owned(), arguments: Map::new() };
            Prompt {
                id: format!("{i}#1"),
                index: i,
                turn: 1,
                text: format!("<|im_start|>user\nWhat's {i}*7?<|im_end|>\n<|im_start|>assistant\n"),
                end_mark: "<|im_end|>".to_owned(),
                user: format!("What's {i}*7?"),
                tools: Vec::new(),
                expected: Some(Expected {
                    calls: if i % 2 == 0 { vec![call] } else { Vec::new() },
                    text: (7 * i).to_string(),
                }),
            }
        })
        .collect();
    data::write_jsonl(path, &lines).unwrap();
}

/// What one evaluation wrote and said.
struct Evaluated {
    dir: tempfile::TempDir,
    metrics: Metrics,
    predictions: Vec<Prediction>,
    log: String,
}

fn evaluate(inputs: &[(&str, &Path)], baseline: Option<&Evaluated>) -> Evaluated {
    let files =
        baseline.map(|b| ["metrics.json", "predictions.jsonl"].map(|name| b.dir.path().join(name)));
    let mut inputs = inputs.to_vec();
    if let Some([metrics, predictions]) = &files {
        inputs.push(("baseline_metrics", metrics));
        inputs.push(("baseline_predictions", predictions));
    }
    let dir = run_kind(&stage_evaluate::Evaluate, json!({"max_new_tokens": 8}), &inputs).unwrap();
    let text = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    let metrics = serde_json::from_str(&text("metrics.json")).unwrap();
    let predictions = data::read_jsonl(&dir.path().join("predictions.jsonl")).unwrap();
    let log = text("log");
    Evaluated { dir, metrics, predictions, log }
}

/// Two-sided exact McNemar test in whole numbers: of `n` discordant pairs at most `fewer` one way.
fn mcnemar(wins: u64, losses: u64) -> f64 {
    let (n, fewer) = (wins + losses, wins.min(losses));
    let (mut ways, mut tail) = (1_u64, 0_u64);
    for k in 0..=fewer {
        tail += ways;
        ways = ways * (n - k) / (k + 1);
    }
    (2.0 * tail as f64 / 2_f64.powi(n as i32)).min(1.0)
}

/// Holds a comparison against the predictions of both, and returns its discordant pairs.
fn check_comparison(before: &Evaluated, after: &Evaluated, what: &str) -> u64 {
    type Told = (&'static str, fn(&Prediction) -> bool, fn(&Metrics) -> Rate);
    let told: [Told; 3] = [
        ("strict_accuracy", |p| p.strict_correct, |m| m.strict_accuracy),
        ("lenient_accuracy", |p| p.lenient_correct, |m| m.lenient_accuracy),
        ("decision_accuracy", |p| p.decision_correct, |m| m.decision_accuracy),
    ];
    let found = &after.metrics.against_baseline;
    assert_eq!(found.len(), told.len(), "{what}");
    let mut discordant = 0;
    for (paired, (name, is_right, rate)) in found.iter().zip(told) {
        let pairs = || before.predictions.iter().zip(&after.predictions);
        let wins = pairs().filter(|(a, b)| !is_right(a) && is_right(b)).count() as u64;
        let losses = pairs().filter(|(a, b)| is_right(a) && !is_right(b)).count() as u64;
        let Paired { metric, difference, p_value, .. } = paired;
        assert_eq!((metric.as_str(), paired.wins, paired.losses), (name, wins, losses), "{what}");
        let [was, is] = [&before.metrics, &after.metrics].map(rate);
        let by = (is.hits as f64 - was.hits as f64) / PROMPTS as f64;
        assert!((difference - by).abs() < 1e-12, "{what}: {paired:?}");
        assert!((p_value - mcnemar(wins, losses)).abs() < 1e-12, "{what}: {paired:?}");
        let line = format!("{name}: {:.1}% -> {:.1}%, ", was.value * 100.0, is.value * 100.0);
        let log = &after.log;
        assert!(log.contains(&line), "{what}: {line}: {log}");
        assert!(log.contains(&format!("(won {wins}, lost {losses})")), "{what}: {log}");
        discordant += wins + losses;
    }
    discordant
}

#[test]
fn fixture_every_format_is_evaluated_like_the_adapter_and_compared_with_it() {
    let (model, adapter) = (that_calls(), tiny("qwen2", "adapter"));
    let prompts = model.path().join("prompts.jsonl");
    write_prompts(&prompts);
    let alone: [(&str, &Path); 2] = [("model", model.path()), ("prompts", &prompts)];
    let adapted = [alone[0], alone[1], ("adapter", &*adapter)];
    let tuned = evaluate(&adapted, None);
    assert!((1..PROMPTS).contains(&tuned.metrics.decision_accuracy.hits), "{:?}", tuned.metrics);

    let again = evaluate(&adapted, Some(&tuned));
    assert_eq!(check_comparison(&tuned, &again, "the adapter itself"), 0);
    let plain = evaluate(&alone, Some(&tuned));
    assert!(check_comparison(&tuned, &plain, "the model alone") > 0);
    let mut discordant = 0;
    for format in ["safetensors", "gguf-f16", "gguf-q8_0", "gguf-q4_0"] {
        let inputs = [("model", model.path()), ("adapter", &*adapter)];
        let out = run(json!({"format": format}), &inputs).unwrap();
        let folder = out.path().join("model");
        let exported = evaluate(&[("model", &folder), ("prompts", &prompts)], Some(&tuned));
        discordant += check_comparison(&tuned, &exported, format);
    }
    assert!(discordant > 0, "no format loses anything, so that nothing was compared");
}
