//! Stage kind `select`: ranks the points of a sweep by one metric and hands the best on.
//!
//! The inputs are gathered: folders with an `index.json` that lists the points,
//! `[{"point", "path", "params"}]`, in the order of the matrix.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use contract::{
    InputSpec, Outcome, OutputSpec, ParamError, Reporter, Request, Signature, StageError,
    StageKind, parse_params,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// Changes when the same metrics would be ranked or described otherwise.
const VERSION: &str = "2";
/// A file of metrics larger than this is something else.
const LARGEST_METRICS: u64 = 16 << 20;

/// The stage kind `select`.
pub struct Select;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// Dotted path of a number in every file of metrics.
    metric: String,
    /// Whether more or less is better.
    #[serde(default)]
    goal: Goal,
    /// Params whose points are repeats of each other, such as `seed`: the metric is averaged.
    #[serde(default)]
    average_over: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Goal {
    /// The most.
    #[default]
    Max,
    /// The least.
    Min,
}

/// One line of `index.json`.
#[derive(Debug, Deserialize)]
struct Point {
    point: String,
    path: String,
    params: Map<String, Value>,
}

/// Points that are repeats of each other.
#[derive(Debug, Serialize)]
struct Ranked {
    /// The first of them, in the order of the matrix.
    point: String,
    /// Params without those averaged over.
    params: Map<String, Value>,
    /// Mean of the metric.
    score: f64,
    /// The metric of every repeat by point.
    scores: BTreeMap<String, f64>,
    /// What stands beside the metric of every repeat, such as its interval, by point.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    beside: BTreeMap<String, Map<String, Value>>,
}

impl StageKind for Select {
    fn name(&self) -> &'static str {
        "select"
    }

    fn summary(&self) -> &'static str {
        "ranks the points of a sweep by a metric and hands the best on"
    }

    fn version(&self) -> String {
        VERSION.to_owned()
    }

    fn resolve(&self, params: &Value) -> Result<Signature, ParamError> {
        let params: Params = parse_params(params)?;
        if params.metric.split('.').any(str::is_empty) {
            return Err(ParamError::at("metric", "a dotted path such as `strict_accuracy.value`"));
        }
        Ok(Signature {
            inputs: vec![
                InputSpec::required("metrics", "gathered metrics to choose by").gathered(),
                InputSpec::optional("candidates", "gathered artifacts, of which one is handed on")
                    .gathered(),
            ],
            outputs: vec![
                OutputSpec::file("choice", "choice.json"),
                OutputSpec::tree("chosen", "chosen").optional(),
            ],
            ..Signature::of(&params)?
        })
    }

    fn params_schema(&self) -> Value {
        contract::schema_of::<Params>()
    }

    fn run(&self, request: &Request, reporter: &mut Reporter) -> Result<Outcome, StageError> {
        let params: Params = request.params()?;
        let ranked = ranking(&params, request.input("metrics")?)?;
        let best = &ranked[0];
        reporter.log(format!("{}: {} = {}", best.point, params.metric, best.score));
        let choice = json!({
            "metric": params.metric, "goal": params.goal, "best": best, "ranking": ranked,
        });
        let path = request.output("choice")?;
        let mut text = serde_json::to_vec_pretty(&choice).map_err(StageError::internal)?;
        text.push(b'\n');
        fs::write(path, text).map_err(|e| StageError::io("write", path, &e))?;
        if let Some(candidates) = request.optional_input("candidates") {
            let index = index(candidates)?;
            let Some(chosen) = index.iter().find(|c| c.point == best.point) else {
                let message = format!("`candidates` has no point `{}`", best.point);
                return Err(StageError::input(message)
                    .help("gather `metrics` and `candidates` from stages with the same points"));
            };
            let (from, to) = (candidates.join(&chosen.path), request.output("chosen")?);
            copy(&from, to).map_err(|e| StageError::io("copy", &from, &e))?;
        }
        Ok(Outcome::default())
    }
}

fn index(folder: &Path) -> Result<Vec<Point>, StageError> {
    let path = folder.join("index.json");
    let text = fs::read(&path).map_err(|e| {
        StageError::io("read", &path, &e).help("wire the input as `{gather: STAGE.OUTPUT}`")
    })?;
    serde_json::from_slice(&text)
        .map_err(|e| StageError::input(format!("{} is no list of points: {e}", path.display())))
}

/// Best first; equal ones in the order of the matrix. Never empty.
fn ranking(params: &Params, folder: &Path) -> Result<Vec<Ranked>, StageError> {
    let mut groups: Vec<Ranked> = Vec::new();
    for Point { point, path, params: mut at } in index(folder)? {
        let (score, beside) = score(&folder.join(path), &point, &params.metric)?;
        for repeated in &params.average_over {
            if at.remove(repeated).is_none() {
                let message = format!("`average_over`: no matrix varies `{repeated}`");
                return Err(StageError::input(message));
            }
        }
        let known = groups.iter().position(|g| g.params == at);
        let group = known.unwrap_or_else(|| {
            let (scores, beside) = (BTreeMap::new(), BTreeMap::new());
            groups.push(Ranked { point: point.clone(), params: at, score, scores, beside });
            groups.len() - 1
        });
        let group = &mut groups[group];
        group.beside.extend(beside.map(|beside| (point.clone(), beside)));
        group.scores.insert(point, score);
    }
    if groups.is_empty() {
        return Err(StageError::input("`metrics` has no points"));
    }
    for group in &mut groups {
        group.score = group.scores.values().sum::<f64>() / group.scores.len() as f64;
    }
    // A stable sort: equal points keep their order.
    groups.sort_by(|a, b| match params.goal {
        Goal::Max => b.score.total_cmp(&a.score),
        Goal::Min => a.score.total_cmp(&b.score),
    });
    Ok(groups)
}

/// The metric, and the numbers in whose midst it stands.
type Score = (f64, Option<Map<String, Value>>);

fn score(path: &Path, point: &str, metric: &str) -> Result<Score, StageError> {
    let io = |e| StageError::io("read", path, &e);
    if fs::metadata(path).map_err(io)?.len() > LARGEST_METRICS {
        return Err(StageError::input(format!("{} is too large for metrics", path.display())));
    }
    let text = fs::read(path).map_err(io)?;
    let metrics: Value = serde_json::from_slice(&text)
        .map_err(|e| StageError::input(format!("metrics of `{point}` are no JSON: {e}")))?;
    let at = |path: &str| path.split('.').try_fold(&metrics, |value, step| value.get(step));
    let beside = metric.rsplit_once('.').and_then(|(around, _)| at(around)?.as_object());
    let beside = beside.filter(|numbers| numbers.values().all(Value::is_number)).cloned();
    let found = at(metric).and_then(Value::as_f64);
    found.map(|score| (score, beside)).ok_or_else(|| {
        let known: Vec<String> = match &metrics {
            Value::Object(entries) => entries.keys().cloned().collect(),
            _ => Vec::new(),
        };
        StageError::input(format!("metrics of `{point}` have no number `{metric}`"))
            .help(format!("top keys: {}", known.join(", ")))
    })
}

/// Files are linked where possible, since an adapter may be large and is never changed.
fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    if !from.is_dir() {
        fs::create_dir_all(to)?;
        return link(from, &to.join(from.file_name().unwrap_or_default()));
    }
    let mut open: Vec<(PathBuf, PathBuf)> = vec![(from.to_owned(), to.to_owned())];
    while let Some((from, to)) = open.pop() {
        fs::create_dir_all(&to)?;
        for entry in fs::read_dir(&from)? {
            let entry = entry?;
            let (path, target) = (entry.path(), to.join(entry.file_name()));
            if path.is_dir() {
                open.push((path, target));
            } else {
                link(&path, &target)?;
            }
        }
    }
    Ok(())
}

fn link(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::hard_link(from, to).or_else(|_| fs::copy(from, to).map(drop))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// A gathered folder with one file a point.
    fn gathered(dir: &Path, file: &str, points: &[(&str, Value, &str)]) -> PathBuf {
        let mut index = Vec::new();
        for (point, params, text) in points {
            fs::create_dir_all(dir.join(point)).unwrap();
            let path = format!("{point}/{file}");
            fs::write(dir.join(&path), text).unwrap();
            index.push(json!({"point": point, "path": path, "params": params}));
        }
        fs::write(dir.join("index.json"), json!(index).to_string()).unwrap();
        dir.to_owned()
    }

    fn select(dir: &Path, params: Value) -> Result<Value, StageError> {
        let metrics = gathered(
            &dir.join("metrics"),
            "metrics.json",
            &[
                ("default", json!({"lr": 1, "seed": 1}), r#"{"rate": {"value": 0.5}}"#),
                ("seed=2", json!({"lr": 1, "seed": 2}), r#"{"rate": {"value": 0.6}}"#),
                ("lr=2", json!({"lr": 2, "seed": 1}), r#"{"rate": {"value": 0.7, "low": 0.6}}"#),
                ("lr=2,seed=2", json!({"lr": 2, "seed": 2}), r#"{"rate": {"value": 0.1}}"#),
            ],
        );
        let points = ["default", "seed=2", "lr=2", "lr=2,seed=2"];
        let points: Vec<_> = points.iter().map(|p| (*p, json!({}), *p)).collect();
        let candidates = gathered(&dir.join("candidates"), "adapter", &points);
        let _ = fs::remove_dir_all(dir.join("chosen"));
        let inputs = [("metrics", &*metrics), ("candidates", &*candidates)];
        let request = fixtures::request(&Select, &params, &inputs, dir);
        Select.run(&request, &mut Reporter::silent())?;
        Ok(serde_json::from_slice(&fs::read(dir.join("choice.json")).unwrap()).unwrap())
    }

    #[test]
    fn best_point_is_named_and_its_artifact_handed_on() {
        let dir = tempfile::tempdir().unwrap();
        let choice = select(dir.path(), json!({"metric": "rate.value"})).unwrap();
        assert_eq!(choice["best"]["point"], "lr=2");
        assert_eq!(choice["best"]["params"], json!({"lr": 2, "seed": 1}));
        assert_eq!(choice["best"]["beside"]["lr=2"], json!({"value": 0.7, "low": 0.6}));
        assert_eq!(fs::read_to_string(dir.path().join("chosen/adapter")).unwrap(), "lr=2");
        let choice = select(dir.path(), json!({"metric": "rate.value", "goal": "min"})).unwrap();
        assert_eq!(choice["best"]["point"], "lr=2,seed=2");
    }

    #[test]
    fn repeats_are_averaged_and_the_first_stands_for_them() {
        let dir = tempfile::tempdir().unwrap();
        let params = json!({"metric": "rate.value", "average_over": ["seed"]});
        let choice = select(dir.path(), params).unwrap();
        assert_eq!(choice["best"]["point"], "default");
        assert_eq!(choice["best"]["params"], json!({"lr": 1}));
        assert_eq!(choice["ranking"].as_array().unwrap().len(), 2);
        assert!((choice["best"]["score"].as_f64().unwrap() - 0.55).abs() < 1e-12);
    }

    #[test]
    fn missing_metric_and_unknown_param_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = select(dir.path(), json!({"metric": "rate.low"})).unwrap_err();
        assert!(error.message.contains("rate.low"), "{}", error.message);
        let params = json!({"metric": "rate.value", "average_over": ["sede"]});
        assert!(select(dir.path(), params).unwrap_err().message.contains("sede"));
    }
}
