//! Stage kind `report`: one HTML and one Markdown page about an experiment.
//!
//! Every number comes from an artifact or from the record of the run that made it; a section whose
//! input is not wired says so.

mod chart;
mod document;
mod ranking;
mod sections;
mod words;

use std::path::Path;

use contract::{
    InputSpec, Outcome, OutputSpec, ParamError, Reporter, Request, Signature, StageError,
    StageKind, parse_params,
};
use data::{ManualAnswer, Metrics, Prediction, read_jsonl};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ranking::Choice;

/// Changes when the same inputs would be reported differently.
const VERSION: &str = "2";

/// The stage kind `report`.
pub struct Report;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Params {
    /// Heading of the page.
    title: String,
    /// A paragraph of the author's own.
    notes: String,
    /// Examples of each kind.
    examples: usize,
}

impl Default for Params {
    fn default() -> Self {
        Self { title: "Fine-tuning report".to_owned(), notes: String::new(), examples: 4 }
    }
}

/// Everything that the inputs hold.
struct Content {
    params: Params,
    tuned: Metrics,
    baseline: Option<Metrics>,
    tuned_predictions: Vec<Prediction>,
    baseline_predictions: Vec<Prediction>,
    tuned_manual: Vec<ManualAnswer>,
    baseline_manual: Vec<ManualAnswer>,
    train_log: Vec<Value>,
    choice: Option<Choice>,
    split_stats: Option<Value>,
    token_stats: Option<Value>,
}

impl StageKind for Report {
    fn name(&self) -> &'static str {
        "report"
    }

    fn summary(&self) -> &'static str {
        "writes an HTML and a Markdown page about an experiment"
    }

    fn version(&self) -> String {
        VERSION.to_owned()
    }

    fn resolve(&self, params: &Value) -> Result<Signature, ParamError> {
        let params: Params = parse_params(params)?;
        Ok(Signature {
            inputs: vec![
                InputSpec::required("tuned_metrics", "metrics of the tuned model"),
                InputSpec::optional("tuned_predictions", "its predictions"),
                InputSpec::optional("tuned_manual", "its answers to the manual prompts"),
                InputSpec::optional("baseline_metrics", "metrics of the model before training"),
                InputSpec::optional("baseline_predictions", "its predictions"),
                InputSpec::optional("baseline_manual", "its answers to the manual prompts"),
                InputSpec::optional(
                    "train_log",
                    "log of the training; with `ranking`, gathered ones",
                ),
                InputSpec::optional("ranking", "choice among the points of a sweep"),
                InputSpec::optional("split_stats", "statistics of the splits"),
                InputSpec::optional("token_stats", "statistics of the tokens"),
            ],
            outputs: vec![
                OutputSpec::file("html", "report.html").telemetry(),
                OutputSpec::file("markdown", "report.md").telemetry(),
            ],
            reads_records: true,
            ..Signature::of(&params)?
        })
    }

    fn params_schema(&self) -> Value {
        contract::schema_of::<Params>()
    }

    fn run(&self, request: &Request, _reporter: &mut Reporter) -> Result<Outcome, StageError> {
        let content = Content::read(request)?;
        let blocks = sections::all(&content, &request.upstream);
        let title = &content.params.title;
        for (name, text) in [
            ("html", document::html(title, &blocks)),
            ("markdown", document::markdown(title, &blocks)),
        ] {
            let path = request.output(name)?;
            std::fs::write(path, text).map_err(|e| StageError::io("write", path, &e))?;
        }
        Ok(Outcome::default())
    }
}

impl Content {
    fn read(request: &Request) -> Result<Self, StageError> {
        let json =
            |name: &str| request.optional_input(name).map(|p| read_json::<Value>(p)).transpose();
        let choice: Option<Choice> =
            request.optional_input("ranking").map(|p| read_json(p)).transpose()?;
        Ok(Self {
            params: request.params()?,
            tuned: read_json(request.input("tuned_metrics")?)?,
            baseline: request
                .optional_input("baseline_metrics")
                .map(|p| read_json(p))
                .transpose()?,
            tuned_predictions: lines(request, "tuned_predictions")?,
            baseline_predictions: lines(request, "baseline_predictions")?,
            tuned_manual: lines(request, "tuned_manual")?,
            baseline_manual: lines(request, "baseline_manual")?,
            train_log: train_log(request, choice.as_ref())?,
            choice,
            split_stats: json("split_stats")?,
            token_stats: json("token_stats")?,
        })
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, StageError> {
    let text = std::fs::read(path).map_err(|e| StageError::io("read", path, &e))?;
    serde_json::from_slice(&text).map_err(|e| {
        StageError::input(format!("{}:{}:{}: {e}", path.display(), e.line(), e.column()))
    })
}

/// The log of the training; of gathered ones, the log of the chosen point.
fn train_log(request: &Request, choice: Option<&Choice>) -> Result<Vec<Value>, StageError> {
    match (request.optional_input("train_log"), choice) {
        (Some(folder), Some(choice)) if folder.is_dir() => Ok(choice
            .chosen_in(folder)?
            .map(|log| read_jsonl(&log))
            .transpose()?
            .unwrap_or_default()),
        (Some(folder), None) if folder.is_dir() => {
            Err(StageError::input("`train_log` is a folder, and nothing says which log in it")
                .help("wire `ranking` to the choice of a stage of kind `select`"))
        }
        _ => lines(request, "train_log"),
    }
}

fn lines<T: DeserializeOwned>(request: &Request, name: &str) -> Result<Vec<T>, StageError> {
    match request.optional_input(name) {
        Some(path) => Ok(read_jsonl(path)?),
        None => Ok(Vec::new()),
    }
}

#[cfg(test)]
mod tests;
