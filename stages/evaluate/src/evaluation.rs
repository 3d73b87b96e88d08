//! One evaluation: reads inputs, answers, scores, writes.
//!
//! Everything that can be refused without the model is refused before it is loaded.

use std::collections::BTreeSet;
use std::path::Path;

use contract::{Checkpoints, Outcome, Reporter, Request, StageError};
use data::{Expected, ManualAnswer, Metrics, Prediction, Prompt, read_jsonl};
use model::GenerateOptions;
use serde_json::{Map, Value, json};

use crate::answerer::Answerer;
use crate::generation::{Answer, Answers, answer, prepare};
use crate::metrics::{Baseline, summarise};
use crate::params::Params;
use crate::{parse, score, summary};

/// Loads a model folder with an adapter folder.
pub(crate) type Load<'a> =
    dyn Fn(&Path, Option<&Path>) -> Result<Box<dyn Answerer>, StageError> + 'a;

/// What is asked.
struct Questions {
    /// Prompts to score, then prompts to answer only.
    prompts: Vec<Prompt>,
    scored: usize,
    digest: String,
}

/// Runs one evaluation.
pub(crate) fn run(
    params: &Params,
    request: &Request,
    reporter: &mut Reporter,
    load: &Load<'_>,
) -> Result<Outcome, StageError> {
    let questions = read_questions(params, request)?;
    let decoding = params.decoding();
    let baseline = read_baseline(request)?;
    if let Some(baseline) = &baseline {
        baseline.check(&questions.digest, &decoding)?;
    }
    let adapter = request.optional_input("adapter").map(AsRef::as_ref);
    let answerer = load(request.input("model")?, adapter)?;
    let (tokens, end_tokens) = prepare(&*answerer, &questions.prompts, params.max_new_tokens)?;
    let options = GenerateOptions {
        max_new_tokens: params.max_new_tokens,
        end_tokens,
        batch_size: params.batch_size.unwrap_or(answerer.rows_at_once()),
    };
    let checkpoints = Checkpoints::of(request);
    let usual = baseline.as_ref().and_then(Baseline::mean_tokens);
    let answered = answer(&*answerer, &tokens, &options, usual, &checkpoints, reporter)?;
    let (scored, manual) = questions.prompts.split_at(questions.scored);
    let (to_score, to_show) = answered.answers.split_at(questions.scored);
    let predictions = predict(&*answerer, scored, to_score)?;
    let mut metrics = summarise(&predictions, questions.digest, decoding);
    if let Some(baseline) = &baseline {
        metrics.against_baseline = baseline.compare(&predictions)?;
    }
    data::write_jsonl(request.output("predictions")?, &predictions)?;
    data::write_json(request.output("metrics")?, &metrics)?;
    if request.optional_input("manual").is_some() {
        let shown = show(&*answerer, manual, to_show)?;
        data::write_jsonl(request.output("manual")?, &shown)?;
    }
    let compared = baseline.as_ref().map(|b| &b.metrics);
    summary::report(&metrics, compared, questions.prompts.len(), reporter);
    Ok(outcome(&*answerer, &answered, &metrics))
}

fn read_questions(params: &Params, request: &Request) -> Result<Questions, StageError> {
    let path = request.input("prompts")?;
    let bytes = std::fs::read(path).map_err(|e| StageError::io("read", path, &e))?;
    let digest = blake3::hash(&bytes).to_hex().to_string();
    let mut prompts: Vec<Prompt> = read_jsonl(path)?;
    if prompts.is_empty() {
        return Err(StageError::input("there are no prompts to evaluate")
            .help("the test split is empty, or no row has an assistant turn after a user's"));
    }
    prompts.truncate(params.limit.unwrap_or(usize::MAX));
    let mut ids = BTreeSet::new();
    for Prompt { id, expected, .. } in &prompts {
        if expected.is_none() {
            return Err(StageError::input(format!("prompt `{id}` has no right answer"))
                .help("prompts that are not scored belong to the input `manual`"));
        }
        if !ids.insert(id.as_str()) {
            return Err(StageError::input(format!("prompt `{id}` is there twice")));
        }
    }
    let scored = prompts.len();
    if let Some(path) = request.optional_input("manual") {
        prompts.extend(read_jsonl::<Prompt>(path)?);
    }
    Ok(Questions { prompts, scored, digest })
}

fn read_baseline(request: &Request) -> Result<Option<Baseline>, StageError> {
    let [metrics, predictions] =
        ["baseline_metrics", "baseline_predictions"].map(|name| request.optional_input(name));
    match (metrics, predictions) {
        (None, None) => Ok(None),
        (Some(metrics), Some(predictions)) => Ok(Some(Baseline {
            metrics: read_metrics(metrics)?,
            predictions: read_jsonl(predictions)?,
        })),
        _ => Err(StageError::input(
            "a comparison needs both metrics and predictions of the baseline",
        )
        .help("wire `baseline_metrics` and `baseline_predictions`, or neither")),
    }
}

fn read_metrics(path: &Path) -> Result<Metrics, StageError> {
    let bytes = std::fs::read(path).map_err(|e| StageError::io("read", path, &e))?;
    serde_json::from_slice(&bytes).map_err(|e| {
        let (path, line, column) = (path.display(), e.line(), e.column());
        StageError::input(format!("{path}:{line}:{column}: {e}"))
    })
}

fn predict(
    answerer: &dyn Answerer,
    prompts: &[Prompt],
    answers: &[Answer],
) -> Result<Vec<Prediction>, StageError> {
    let mut predictions = Vec::with_capacity(prompts.len());
    for (prompt, answer) in prompts.iter().zip(answers) {
        let (Some(expected), Some(class)) = (&prompt.expected, prompt.class()) else {
            return Err(StageError::internal("a prompt without a right answer was scored"));
        };
        let output = answerer.codec().decode(&answer.tokens)?;
        predictions.push(Prediction {
            class: class.to_owned(),
            ended: answer.ended,
            tokens: answer.tokens.len() as u64,
            ..scored(prompt, expected, output)
        });
    }
    Ok(predictions)
}

/// Parses and judges one output.
fn scored(prompt: &Prompt, expected: &Expected, output: String) -> Prediction {
    let mut strict = parse::strict(&output, &prompt.tools);
    let mut lenient = parse::lenient(&output, &prompt.tools);
    Prediction {
        id: prompt.id.clone(),
        index: prompt.index,
        class: String::new(),
        user: prompt.user.clone(),
        output,
        ended: false,
        tokens: 0,
        strict_correct: score::judge(&mut strict, expected),
        lenient_correct: score::judge(&mut lenient, expected),
        decision_correct: lenient.attempted != expected.calls.is_empty(),
        strict,
        lenient,
        expected: expected.text.clone(),
    }
}

fn show(
    answerer: &dyn Answerer,
    prompts: &[Prompt],
    answers: &[Answer],
) -> Result<Vec<ManualAnswer>, StageError> {
    let pairs = prompts.iter().zip(answers);
    pairs
        .map(|(prompt, answer)| {
            Ok(ManualAnswer {
                id: prompt.id.clone(),
                user: prompt.user.clone(),
                tools: prompt.tools.iter().map(|t| t.name().to_owned()).collect(),
                output: answerer.codec().decode(&answer.tokens)?,
                ended: answer.ended,
            })
        })
        .collect()
}

fn outcome(answerer: &dyn Answerer, answered: &Answers, metrics: &Metrics) -> Outcome {
    let tokens = answered.prompt_tokens + answered.generated_tokens;
    let seconds = answered.seconds.max(1e-9);
    let telemetry = json!({
        "rows": answered.answers.len(),
        "resumed_rows": answered.resumed,
        "prompt_tokens": answered.prompt_tokens,
        "generated_tokens": answered.generated_tokens,
        "generation_seconds": answered.seconds,
        "tokens_per_second": tokens as f64 / seconds,
        "generated_tokens_per_second": answered.generated_tokens as f64 / seconds,
        "peak_memory_bytes": crate::peak_memory(),
    });
    let mut telemetry = map(telemetry);
    if let Some(bytes) = answerer.peak_device_bytes() {
        telemetry.insert("peak_device_bytes".to_owned(), bytes.into());
    }
    let (backend, device) = answerer.backend();
    let provenance = json!({ "backend": backend, "device": device });
    let mut warnings = answerer.warnings();
    if metrics.unended * 2 > metrics.prompts {
        warnings.push(format!(
            "{} of {} answers ran into `max_new_tokens`",
            metrics.unended, metrics.prompts
        ));
    }
    Outcome { telemetry, provenance: map(provenance), lock: None, warnings }
}

fn map(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

#[cfg(test)]
#[path = "evaluation/tests.rs"]
mod tests;
