//! How the settings were chosen: the points of a sweep in the order of their dev metric, and what
//! the chosen one reached on the test rows.

use std::collections::BTreeMap;
use std::path::Path;

use contract::StageError;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::Content;
use crate::document::Block;
use crate::words::{percent, plain, points, rate, short};

/// What the kind `select` writes.
#[derive(Debug, Deserialize)]
pub(crate) struct Choice {
    metric: String,
    ranking: Vec<Ranked>,
}

/// Points that are repeats of each other.
#[derive(Debug, Deserialize)]
struct Ranked {
    point: String,
    params: Map<String, Value>,
    score: f64,
    scores: BTreeMap<String, f64>,
    #[serde(default)]
    beside: BTreeMap<String, Beside>,
}

/// The interval of a metric, where it has one.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Beside {
    low: Option<f64>,
    high: Option<f64>,
    of: Option<f64>,
}

/// One line of the index of a gathered folder.
#[derive(Deserialize)]
struct Listed {
    point: String,
    path: String,
}

impl Choice {
    /// The file of the chosen point in a gathered folder; `None` where it is not among them.
    pub(crate) fn chosen_in(
        &self,
        folder: &Path,
    ) -> Result<Option<std::path::PathBuf>, StageError> {
        let listed: Vec<Listed> = crate::read_json(&folder.join("index.json"))?;
        let best = self.ranking.first().map(|best| best.point.as_str());
        let found = listed.into_iter().find(|l| Some(l.point.as_str()) == best);
        Ok(found.map(|found| folder.join(found.path)))
    }
}

impl Ranked {
    /// The one interval, where the metric was not averaged.
    fn interval(&self) -> Option<(f64, f64)> {
        let only = self.beside.values().next().filter(|_| self.scores.len() == 1)?;
        Some((only.low?, only.high?))
    }

    /// The metric, with its interval or its range over the repeats.
    fn shown(&self, fraction: bool) -> String {
        let number = |n: f64| if fraction { format!("{:.1}", n * 100.0) } else { short(n) };
        let score = if fraction { percent(self.score) } else { short(self.score) };
        let least = self.scores.values().copied().fold(f64::INFINITY, f64::min);
        let most = self.scores.values().copied().fold(f64::NEG_INFINITY, f64::max);
        match self.interval() {
            Some((low, high)) => format!("{score} [{}, {}]", number(low), number(high)),
            None if self.scores.len() > 1 => {
                let (least, most) = (number(least), number(most));
                format!("{score} (mean of {}, {least} to {most})", self.scores.len())
            }
            None => score,
        }
    }
}

/// The section, where a choice is wired.
pub(crate) fn section(content: &Content, blocks: &mut Vec<Block>) {
    let Some(choice) = &content.choice else { return };
    let Some(best) = choice.ranking.first() else { return };
    blocks.push(Block::Heading("How the settings were chosen".to_owned()));
    let rate_of = choice.metric.strip_suffix(".value");
    let (metric, fraction) = (plain(rate_of.unwrap_or(&choice.metric)), rate_of.is_some());
    let rows = best.beside.values().find_map(|b| b.of);
    let on = rows.map_or("rows set aside for choosing".to_owned(), |n| {
        format!("{} prompts set aside for choosing", short(n))
    });
    blocks.push(Block::Text(format!(
        "{} settings were ranked by {metric} on {on}; the test prompts had no part in it.",
        choice.ranking.len()
    )));
    blocks.push(table(choice, best, &metric, fraction));
    blocks.push(Block::Text(reading(content, choice, best)));
}

fn table(choice: &Choice, best: &Ranked, metric: &str, fraction: bool) -> Block {
    let default = choice.ranking.iter().find(|r| r.point == "default");
    let keys: Vec<&String> = best.params.keys().collect();
    let mut head = vec!["rank".to_owned()];
    head.extend(keys.iter().map(|k| (*k).clone()));
    head.extend([format!("{metric}, dev"), "beside the default".to_owned(), String::new()]);
    let row = |(rank, ranked): (usize, &Ranked)| {
        let mut row = vec![(rank + 1).to_string()];
        row.extend(keys.iter().map(|key| {
            let value = setting(ranked.params.get(*key));
            let usual = default.map(|d| setting(d.params.get(*key)));
            if usual.is_some_and(|usual| usual != value) { format!("→ {value}") } else { value }
        }));
        let difference = default.map(|d| ranked.score - d.score);
        row.push(ranked.shown(fraction));
        row.push(match difference {
            _ if ranked.point == "default" => "default".to_owned(),
            Some(by) if fraction => points(by),
            Some(by) => format!("{}{}", if by < 0.0 { "" } else { "+" }, short(by)),
            None => String::new(),
        });
        row.push(if rank == 0 { "chosen".to_owned() } else { String::new() });
        row
    };
    let rows: Vec<Vec<String>> = choice.ranking.iter().enumerate().map(row).collect();
    Block::Table { head, rows, numeric: true, marked: Some(0) }
}

/// A value of a swept param.
fn setting(value: Option<&Value>) -> String {
    match value {
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
        None => String::new(),
    }
}

/// How far the ranking can be trusted, and the one reading on the test prompts.
fn reading(content: &Content, choice: &Choice, best: &Ranked) -> String {
    let rivals = choice.ranking[1..].iter().filter(|other| {
        let (Some((low, high)), Some((from, to))) = (best.interval(), other.interval()) else {
            return false;
        };
        from <= high && low <= to
    });
    let mut text = match rivals.count() {
        0 => String::new(),
        n => format!(
            "The intervals of {n} of the other {} overlap with that of the chosen one: on so few \
             prompts the order among them may be chance. ",
            choice.ranking.len() - 1
        ),
    };
    text.push_str(&format!(
        "Only the chosen one then answered the {} test prompts, once: strict accuracy {}.",
        content.tuned.prompts,
        rate(&content.tuned.strict_accuracy)
    ));
    text
}
