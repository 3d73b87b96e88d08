//! One side of a comparison: stages of the pipeline as it is written now, of an earlier run, or of
//! a git revision.
//!
//! Written `[WHERE:][STAGE]`. WHERE is a run (`last`, or the beginning of its id) or a revision;
//! without it the pipeline file as it is. STAGE may be a point, or `STAGE@*` for all points;
//! without it all stages. Where there is no colon, a stage is looked for first.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use super::{CommandError, Context, Project};
use crate::pipeline::{PointParams, plain_stage, suggest};
use crate::plan::{Decision, PlanOptions};
use crate::record::Record;
use crate::runs::RunRecord;

/// Name of the newest run.
const LAST: &str = "last";

/// Stages that are compared.
#[derive(Debug)]
pub(super) struct Side {
    /// As it was asked for.
    pub(super) name: String,
    /// The run or revision; empty for the pipeline as it is written now.
    pub(super) place: String,
    /// A stage was asked for, not all of them.
    named: bool,
    pub(super) entries: Vec<Entry>,
}

/// One stage of a side.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) stage: String,
    /// Params with defaults filled in.
    pub(super) params: Value,
    /// Swept params, the unchanged ones included.
    pub(super) point: PointParams,
    /// The execution, where the cache has it.
    pub(super) record: Option<Arc<Record>>,
}

/// A stage on both sides.
pub(super) type Pair<'a> = (String, Option<&'a Entry>, Option<&'a Entry>);

impl Side {
    /// The pipeline as it is written now: the named stages or points, or all stages.
    pub(super) fn now(project: &Project, stage: Option<&str>) -> Result<Self, CommandError> {
        let all: Vec<String> = project.pipeline.stages.iter().map(|s| s.name.clone()).collect();
        let chosen = match stage {
            Some(stage) => chosen(project, stage, &all)?,
            None => all,
        };
        let options = PlanOptions::default();
        let plan = project.planner(&options).plan(&chosen, &project.lock)?;
        let mut records: BTreeMap<String, Arc<Record>> = BTreeMap::new();
        for planned in plan.stages {
            if let Decision::Reuse { record } = planned.decision {
                records.insert(planned.stage, record);
            }
        }
        let entry = |name: String| {
            let stage = project.pipeline.stage(&name)?;
            Some(Entry {
                params: stage.signature.params.clone(),
                point: project.pipeline.points.params(&name).cloned().unwrap_or_default(),
                record: records.get(&name).cloned(),
                stage: name,
            })
        };
        let entries = chosen.into_iter().filter_map(entry).collect();
        let name = stage.unwrap_or("now").to_owned();
        Ok(Self { name, place: String::new(), named: stage.is_some(), entries })
    }

    /// What a run ran or reused.
    pub(super) fn of_run(
        project: &Project,
        run: &RunRecord,
        stage: Option<&str>,
    ) -> Result<Self, CommandError> {
        let all: Vec<String> = run.stages.iter().map(|s| s.stage.clone()).collect();
        let chosen = match stage {
            Some(stage) => chosen(project, stage, &all)?,
            None => all,
        };
        let mut entries = Vec::new();
        for ran in run.stages.iter().filter(|s| chosen.contains(&s.stage)) {
            let record = match ran.fingerprint {
                Some(fingerprint) => project.cache.record(&ran.kind, fingerprint)?,
                None => None,
            };
            entries.push(Entry {
                stage: ran.stage.clone(),
                params: record.as_ref().map(|r| r.params.clone()).unwrap_or_default(),
                point: project.pipeline.points.params(&ran.stage).cloned().unwrap_or_default(),
                record: record.map(Arc::new),
            });
        }
        let name = run.id.clone();
        Ok(Self { name, place: String::new(), named: stage.is_some(), entries })
    }

    /// Both sides stage by stage: one named stage with each named on the other side, else by name.
    pub(super) fn pairs<'a>(from: &'a Self, to: &'a Self) -> Vec<Pair<'a>> {
        if let ([a], true, true) = (from.entries.as_slice(), from.named, to.named) {
            let pair = |b: &'a Entry| {
                let name = if a.stage == b.stage {
                    a.stage.clone()
                } else {
                    format!("{} -> {}", a.stage, b.stage)
                };
                (name, Some(a), Some(b))
            };
            return to.entries.iter().map(pair).collect();
        }
        fn find<'s>(side: &'s Side, name: &str) -> Option<&'s Entry> {
            side.entries.iter().find(|e| e.stage == name)
        }
        let left = from.entries.iter().map(|a| (a.stage.clone(), Some(a), find(to, &a.stage)));
        let right = to.entries.iter().filter(|b| find(from, &b.stage).is_none());
        left.chain(right.map(|b| (b.stage.clone(), None, Some(b)))).collect()
    }
}

impl Context<'_> {
    /// One side as it was asked for.
    pub(super) fn side(&self, project: &Project, text: &str) -> Result<Side, CommandError> {
        let (place, stage) = match text.split_once(':') {
            Some((place, stage)) => (place, Some(stage).filter(|s| !s.is_empty())),
            None if is_stage(project, text) => ("", Some(text)),
            None => (text, None),
        };
        let mut side = if place.is_empty() {
            Side::now(project, stage)?
        } else if let Some(run) = find_run(project, place)? {
            Side::of_run(project, &run, stage)?
        } else {
            match self.revision(place)? {
                Some(revision) => Side::now(revision.project(), stage)?,
                None if stage.is_some() => {
                    let message = format!("`{place}` is no run or git revision");
                    return Err(CommandError::usage(message, "`pipe runs ls` lists the runs"));
                }
                None => return Err(unknown(project, text)),
            }
        };
        text.clone_into(&mut side.name);
        place.clone_into(&mut side.place);
        Ok(side)
    }

    /// Both sides of a comparison. One alone is compared with the pipeline as it is; a point
    /// alone with the plain stage.
    pub(super) fn sides(
        &self,
        project: &Project,
        from: &str,
        to: Option<&str>,
    ) -> Result<(Side, Side), CommandError> {
        if let Some(to) = to {
            return Ok((self.side(project, from)?, self.side(project, to)?));
        }
        if !from.contains(':') && is_stage(project, from) {
            let plain = plain_stage(from);
            if plain == from || from.ends_with("@*") {
                return Err(CommandError::usage(
                    format!("`{from}` is compared with nothing"),
                    format!(
                        "name two: `{from} {plain}@PARAM=VALUE`, `last:{from} {from}`, `HEAD:{from} {from}`"
                    ),
                ));
            }
            return Ok((self.side(project, plain)?, self.side(project, from)?));
        }
        let stage = from.split_once(':').map_or("", |(_, stage)| stage);
        Ok((self.side(project, from)?, self.side(project, &format!(":{stage}"))?))
    }
}

/// A record that must be there.
pub(super) fn cached<'e>(side: &Side, entry: &'e Entry) -> Result<&'e Arc<Record>, CommandError> {
    entry.record.as_ref().ok_or_else(|| {
        CommandError::usage(
            format!("`{}` of `{}` is not in the cache", entry.stage, side.name),
            format!("`pipe run '{}'` makes it, where the pipeline still says so", entry.stage),
        )
    })
}

fn is_stage(project: &Project, name: &str) -> bool {
    let stages = project.pipeline.points.resolve(name);
    !stages.is_empty() && stages.iter().all(|s| project.pipeline.stage(s).is_some())
}

/// Those of `all` that a name stands for.
fn chosen(project: &Project, name: &str, all: &[String]) -> Result<Vec<String>, CommandError> {
    let wanted = project.pipeline.points.resolve(name);
    let all_points = name.strip_suffix("@*");
    let fits = |s: &&String| wanted.contains(s) || all_points == Some(plain_stage(s));
    let found: Vec<String> = all.iter().filter(fits).cloned().collect();
    if found.is_empty() {
        let points =
            all.iter().map(String::as_str).filter(|s| s.contains('@') == name.contains('@'));
        let help = suggest(name, points);
        return Err(CommandError::Usage { message: format!("no stage `{name}` there"), help });
    }
    Ok(found)
}

/// The run whose id begins so.
pub(super) fn find_run(project: &Project, id: &str) -> Result<Option<RunRecord>, CommandError> {
    let runs = project.cache.runs()?;
    if id == LAST {
        let newest = runs.into_iter().find(|r| r.pipeline == project.pipeline.name);
        return newest.map(Some).ok_or_else(|| {
            let message = format!("no run of pipeline `{}` in this cache", project.pipeline.name);
            CommandError::usage(message, "`pipe runs ls` lists them")
        });
    }
    // Shorter beginnings are more likely a word than a run.
    if id.len() < 4 {
        return Ok(None);
    }
    let mut found = runs.into_iter().filter(|r| r.id.starts_with(id));
    match (found.next(), found.next()) {
        (Some(one), Some(_)) if one.id != id => Err(CommandError::usage(
            format!("more than one run begins with `{id}`"),
            "`pipe runs ls` lists them",
        )),
        (one, _) => Ok(one),
    }
}

/// Nothing is called that.
pub(super) fn unknown(project: &Project, text: &str) -> CommandError {
    let stages = project.pipeline.stages.iter().map(|s| s.name.as_str());
    let help = suggest(text, stages.filter(|s| !s.contains('@'))).unwrap_or_default();
    CommandError::usage(
        format!("`{text}` is no stage, run or git revision"),
        format!("{help} (`pipe runs ls` lists the runs)").trim().to_owned(),
    )
}
