//! `pipe predictions`.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::side::{Side, cached};
use super::{CommandError, Context, Project};
use crate::display;
use crate::exit_code;

/// Larger files are not read into memory.
const LARGEST: u64 = 256 << 20;
/// Characters of an answer that are shown to people.
const SHOWN: usize = 100;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Args {
    /// Show which rows are right now and were wrong before (wins), and the reverse (regressions)
    Diff {
        /// `[RUN|REVISION:]STAGE`, such as `baseline-eval` or `HEAD~1:tuned-eval`
        from: String,
        /// The same [default: the pipeline as it is; for a point: the point, against the default]
        to: Option<String>,
        /// Field that says whether a row is right
        #[arg(long, value_name = "FIELD", default_value = "strict_correct")]
        by: String,
        /// Output that holds the predictions, JSON Lines with an `id` a row
        #[arg(long, value_name = "NAME", default_value = "predictions")]
        output: String,
    },
}

/// Rows by id, in file order.
struct Rows {
    order: Vec<String>,
    by_id: BTreeMap<String, Map<String, Value>>,
}

/// A row on both sides: id, before, after.
type Changed<'a> = (&'a String, &'a Map<String, Value>, &'a Map<String, Value>);

#[derive(Default)]
struct Comparison<'a> {
    wins: Vec<Changed<'a>>,
    regressions: Vec<Changed<'a>>,
    both_right: usize,
    both_wrong: usize,
    /// Same id, but another question or another right answer: not comparable.
    mismatched: usize,
    only_before: usize,
    only_after: usize,
}

pub(super) fn run(context: &Context<'_>, args: &Args) -> Result<u8, CommandError> {
    let project = context.project()?;
    let Args::Diff { from, to, by, output } = args;
    let (from, to) = context.sides(&project, from, to.as_deref())?;
    let before = rows(&project, &from, output, by)?;
    let after = rows(&project, &to, output, by)?;
    let found = compared(&before, &after, by);
    display::out(&if context.shared.json {
        let one = |(id, a, b): &Changed<'_>| json!({"id": id, "before": a, "after": b});
        let listed = |rows: &[Changed<'_>]| rows.iter().map(one).collect::<Vec<_>>();
        let value = json!({"from": from.name, "to": to.name, "by": by,
            "wins": listed(&found.wins), "regressions": listed(&found.regressions),
            "both_right": found.both_right, "both_wrong": found.both_wrong,
            "mismatched": found.mismatched,
            "only_before": found.only_before, "only_after": found.only_after});
        serde_json::to_string_pretty(&value).unwrap_or_default()
    } else {
        described(&found, by)
    });
    Ok(exit_code::OK)
}

fn compared<'a>(before: &'a Rows, after: &'a Rows, by: &str) -> Comparison<'a> {
    let right = |row: &Map<String, Value>| row.get(by) == Some(&Value::Bool(true));
    let mut found = Comparison::default();
    for id in &after.order {
        let new = &after.by_id[id];
        let Some(old) = before.by_id.get(id) else {
            found.only_after += 1;
            continue;
        };
        if ["user", "expected", "class"].iter().any(|field| old.get(*field) != new.get(*field)) {
            found.mismatched += 1;
            continue;
        }
        match (right(old), right(new)) {
            (false, true) => found.wins.push((id, old, new)),
            (true, false) => found.regressions.push((id, old, new)),
            (true, true) => found.both_right += 1,
            (false, false) => found.both_wrong += 1,
        }
    }
    let gone = before.order.iter().filter(|id| !after.by_id.contains_key(*id));
    found.only_before = gone.count();
    found
}

fn described(found: &Comparison<'_>, by: &str) -> String {
    let mut text = format!(
        "{} wins, {} regressions, {} right in both, {} wrong in both ({by})\n",
        found.wins.len(),
        found.regressions.len(),
        found.both_right,
        found.both_wrong
    );
    for (count, what) in [
        (found.mismatched, "rows ask something else under the same id and are not compared"),
        (found.only_before, "rows only before"),
        (found.only_after, "rows only after"),
    ] {
        if count > 0 {
            text.push_str(&format!("{count} {what}\n"));
        }
    }
    for (what, rows) in [("win", &found.wins), ("regression", &found.regressions)] {
        rows.iter().map(|row| described_row(what, row)).for_each(|row| text.push_str(&row));
    }
    text
}

fn described_row(what: &str, (id, before, after): &Changed<'_>) -> String {
    let field = |row: &Map<String, Value>, name: &str| {
        let text = row.get(name)?.as_str()?.split_whitespace().collect::<Vec<_>>().join(" ");
        let short: String = text.chars().take(SHOWN).collect();
        Some(if short == text { text } else { format!("{short}…") })
    };
    let mut lines = format!("{what} {id}\n");
    let shown = [
        ("user", field(after, "user")),
        ("expected", field(after, "expected")),
        ("before", field(before, "output")),
        ("after", field(after, "output")),
    ];
    for (name, text) in shown {
        lines.extend(text.map(|text| format!("  {name:8}  {text}\n")));
    }
    lines
}

fn rows(project: &Project, side: &Side, output: &str, by: &str) -> Result<Rows, CommandError> {
    let [entry] = side.entries.as_slice() else {
        return Err(CommandError::usage(
            format!(
                "`{}` is {} stages; predictions are those of one",
                side.name,
                side.entries.len()
            ),
            "name the stage: `STAGE`, or `WHERE:STAGE` for a run or a revision",
        ));
    };
    let record = cached(side, entry)?;
    let Some(found) = record.outputs.get(output) else {
        let known = record.outputs.keys().map(String::as_str);
        let help = crate::pipeline::suggest(output, known);
        let message = format!("stage `{}` has no output `{output}`", entry.stage);
        return Err(CommandError::Usage { message, help });
    };
    let text = project.cache.read_output(found, LARGEST)?;
    let mut rows = Rows { order: Vec::new(), by_id: BTreeMap::new() };
    for (i, line) in text.split(|b| *b == b'\n').enumerate() {
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let wrong = |what: &str| {
            let at = format!("`{}.{output}`, line {}: {what}", entry.stage, i + 1);
            CommandError::usage(at, "`--output NAME` and `--by FIELD` say what to read")
        };
        let row: Map<String, Value> =
            serde_json::from_slice(line).map_err(|e| wrong(&e.to_string()))?;
        let id = match row.get("id") {
            Some(Value::String(id)) => id.clone(),
            Some(id @ Value::Number(_)) => id.to_string(),
            _ => return Err(wrong("no `id`")),
        };
        if !row.get(by).is_some_and(Value::is_boolean) {
            return Err(wrong(&format!("no `{by}` that is true or false")));
        }
        if rows.by_id.insert(id.clone(), row).is_some() {
            return Err(wrong(&format!("the id `{id}` a second time")));
        }
        rows.order.push(id);
    }
    Ok(rows)
}
