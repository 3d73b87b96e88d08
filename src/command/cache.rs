//! `pipe cache`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use serde_json::{Value, json};

use super::{CommandError, Context, Project};
use crate::cache::{Cache, Collected, DEFAULT_CAP, GcOptions, Verified};
use crate::digest::{Digest, Fingerprint};
use crate::display::{self, duration, size, table};
use crate::exit_code;
use crate::plan::{Decision, PlanOptions};
use crate::record::Record;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Args {
    /// Read every record and object and say what is damaged
    Verify,
    /// The same, and move what is damaged to the quarantine, so that the next run makes it anew
    Repair,
    /// List the records
    Ls,
    /// Say what takes how much room
    Du,
    /// Keep what a stage would reuse from gc
    Pin {
        /// Stage
        stage: String,
    },
    /// Let go of it again
    Unpin {
        /// Stage
        stage: String,
    },
    /// Remove what no pipeline that uses this cache last ran or reused, and nobody pinned
    Gc {
        /// Remove records that were not used for so long, such as `30d` or `12h`
        #[arg(long, value_name = "AGE", value_parser = parse_age)]
        older_than: Option<Duration>,
        /// Remove the longest unused records until the cache is no larger, such as `50GiB`
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        max_size: Option<u64>,
        /// Say what would go and remove nothing
        #[arg(long)]
        dry_run: bool,
    },
}

pub(super) fn run(context: &Context<'_>, args: &Args) -> Result<u8, CommandError> {
    let say = |text: &str, value: Value| {
        display::out(&if context.shared.json {
            serde_json::to_string_pretty(&value).unwrap_or_default()
        } else {
            text.to_owned()
        });
    };
    // A pipeline is needed only to find its cache, and to know its stages.
    let cache = || match &context.shared.cache {
        Some(root) => Ok(Cache::open(root)?),
        None => context.project().map(|project| project.cache),
    };
    match args {
        Args::Verify => verify(&cache()?, false, &say),
        Args::Repair => verify(&cache()?, true, &say),
        Args::Ls => list(&cache()?, &say),
        Args::Du => usage(&cache()?, &say),
        Args::Pin { stage } => pin(&context.project()?, stage, true, &say),
        Args::Unpin { stage } => pin(&context.project()?, stage, false, &say),
        Args::Gc { older_than, max_size, dry_run } => {
            let (older_than, dry_run) = (*older_than, *dry_run);
            // Without a word about either the cap of automatic collections holds.
            let cap = if older_than.is_none() { cap_of_environment()? } else { None };
            let options = GcOptions { older_than, max_bytes: max_size.or(cap), dry_run };
            let collected = cache()?.collect(options)?;
            say(&described(&collected, dry_run), json!(collected));
            Ok(exit_code::OK)
        }
    }
}

/// What prints a result: text, and the same for programs.
type Say<'a> = dyn Fn(&str, Value) + 'a;

fn verify(cache: &Cache, repair: bool, say: &Say<'_>) -> Result<u8, CommandError> {
    let mut shown = 0;
    let found = cache.verify_all(repair, &mut |done, total| {
        let tenth = done * 10 / total.max(1);
        if tenth > shown && total > 1 << 30 {
            shown = tenth;
            display::note(&format!("{} of {} read", size(done), size(total)));
        }
    })?;
    let Verified { records, objects, bytes, damage, unreadable } = &found;
    let mut lines: Vec<String> = damage
        .iter()
        .map(|d| {
            let moved = if d.quarantined { " (quarantined)" } else { "" };
            format!("{}: {}{moved}", d.file, d.what)
        })
        .collect();
    lines.extend(unreadable.iter().map(|u| format!("{}: {}", u.file, u.what)));
    if !unreadable.is_empty() {
        lines.push(format!(
            "{} cannot be read by this user and may be sound: their owners can let others read \
             them (`chmod a+r`), and `pipe doctor` says how that need not be done again",
            unreadable.len()
        ));
    }
    lines.push(format!(
        "{records} records, {objects} objects, {} read: {}",
        size(*bytes),
        match (damage.len(), repair) {
            (0, _) if unreadable.is_empty() => "all sound".to_owned(),
            (0, _) => "all that may be read is sound".to_owned(),
            (n, false) => format!("{n} damaged; `pipe cache repair` moves them out of the way"),
            (n, true) => format!("{n} damaged; the next run makes them anew"),
        }
    ));
    say(&lines.join("\n"), json!(found));
    let repaired = damage.iter().all(|d| d.quarantined);
    Ok(if repaired && unreadable.is_empty() { exit_code::OK } else { exit_code::CACHE })
}

/// A record, for people.
#[derive(Serialize)]
struct Line {
    stage: String,
    kind: String,
    fingerprint: Fingerprint,
    bytes: u64,
    unused_seconds: u64,
    pinned: bool,
    pipelines: BTreeSet<String>,
}

fn list(cache: &Cache, say: &Say<'_>) -> Result<u8, CommandError> {
    let (roots, pins) = (cache.roots()?, cache.pins()?);
    let mut lines = Vec::new();
    for kept in cache.kept()? {
        let Ok(Record { stage, identity, fingerprint, outputs, .. }) = kept.record else {
            continue;
        };
        lines.push(Line {
            stage,
            kind: identity.kind,
            fingerprint,
            bytes: outputs.values().map(|o| o.bytes).sum(),
            unused_seconds: seconds_since(kept.used),
            pinned: pins.contains(&fingerprint),
            pipelines: roots.get(&fingerprint).cloned().unwrap_or_default(),
        });
    }
    lines.sort_by(|a, b| (a.unused_seconds, &a.stage).cmp(&(b.unused_seconds, &b.stage)));
    let mut rows: Vec<Vec<String>> = vec![
        ["stage", "kind", "fingerprint", "size", "last used", "kept by"].map(str::to_owned).into(),
    ];
    rows.extend(lines.iter().map(|line| {
        let mut keepers: Vec<String> = line.pipelines.iter().cloned().collect();
        keepers.extend(line.pinned.then(|| "a pin".to_owned()));
        vec![
            line.stage.clone(),
            line.kind.clone(),
            line.fingerprint.short(),
            size(line.bytes),
            format!("{} ago", duration(line.unused_seconds as f64)),
            keepers.join(", "),
        ]
    }));
    say(&table(&rows), json!(lines));
    Ok(exit_code::OK)
}

fn seconds_since(time: SystemTime) -> u64 {
    SystemTime::now().duration_since(time).unwrap_or_default().as_secs()
}

/// Records of one stage, or of one pipeline's stages.
#[derive(Default, Serialize)]
struct Share {
    records: usize,
    /// Of all the objects that they need.
    bytes: u64,
    /// Of those that nothing else needs.
    own_bytes: u64,
}

fn usage(cache: &Cache, say: &Say<'_>) -> Result<u8, CommandError> {
    let held: BTreeMap<Digest, u64> =
        cache.held()?.iter().filter_map(|o| Some((o.digest?, o.bytes))).collect();
    let roots = cache.roots()?;
    let mut users: BTreeMap<Digest, BTreeSet<String>> = BTreeMap::new();
    let mut records: BTreeMap<String, usize> = BTreeMap::new();
    for record in cache.kept()?.into_iter().filter_map(|k| k.record.ok()) {
        let mut groups = vec![format!("{} ({})", record.stage, record.identity.kind)];
        let pipelines = roots.get(&record.fingerprint).into_iter().flatten();
        groups.extend(pipelines.map(|name| format!("pipeline {name}")));
        for group in &groups {
            *records.entry(group.clone()).or_default() += 1;
        }
        for digest in cache.needed(&record).into_keys() {
            users.entry(digest).or_default().extend(groups.iter().cloned());
        }
    }
    let mut shares: BTreeMap<String, Share> = BTreeMap::new();
    for (group, records) in records {
        shares.insert(group, Share { records, ..Share::default() });
    }
    let mut unneeded = 0;
    for (digest, bytes) in &held {
        let Some(groups) = users.get(digest) else {
            unneeded += bytes;
            continue;
        };
        for kind in [true, false] {
            let of_kind = || groups.iter().filter(|g| g.starts_with("pipeline ") == kind);
            for group in of_kind() {
                let share = shares.entry(group.clone()).or_default();
                share.bytes += bytes;
                share.own_bytes += if of_kind().count() == 1 { *bytes } else { 0 };
            }
        }
    }
    let total: u64 = held.values().sum();
    let folders = cache.folders();
    let missed = cache.missed_count()?;
    let mut rows: Vec<Vec<String>> =
        vec![["of", "records", "size", "needed by nothing else"].map(str::to_owned).into()];
    rows.extend(shares.iter().map(|(name, s)| {
        vec![name.clone(), s.records.to_string(), size(s.bytes), size(s.own_bytes)]
    }));
    let mut text = table(&rows);
    text.push_str(&format!("\nobjects      {} in {} files", size(total), held.len()));
    text.push_str(&format!("\nunneeded     {}", size(unneeded)));
    for (folder, bytes) in &folders {
        text.push_str(&format!("\n{folder:12} {}", size(*bytes)));
    }
    if missed > 0 {
        text.push_str(&format!("\n{missed} removed by gc and needed again: raise the cap"));
    }
    let value = json!({
        "shares": shares, "objects": held.len(), "bytes": total, "unneeded_bytes": unneeded,
        "folders": folders, "evicted_and_needed": missed,
    });
    say(&text, value);
    Ok(exit_code::OK)
}

fn pin(project: &Project, stage: &str, pinned: bool, say: &Say<'_>) -> Result<u8, CommandError> {
    let stage = project.stage(stage)?;
    let options = PlanOptions::default();
    let plan = project.planner(&options).plan(std::slice::from_ref(&stage.name), &project.lock)?;
    let planned = plan.stages.into_iter().find(|s| s.stage == stage.name).map(|s| s.decision);
    let Some(Decision::Reuse { record }) = planned else {
        return Err(CommandError::usage(
            format!("stage `{}` has nothing in the cache that it would reuse", stage.name),
            "run it first",
        ));
    };
    let changed = project.cache.set_pinned(record.fingerprint, pinned)?;
    let (name, short) = (&stage.name, record.fingerprint.short());
    let text = match (pinned, changed) {
        (true, true) => format!("{name} {short} is kept from gc"),
        (true, false) => format!("{name} {short} was pinned already"),
        (false, true) => format!("{name} {short} is no longer pinned"),
        (false, false) => format!("{name} {short} was not pinned"),
    };
    let fingerprint = record.fingerprint;
    say(&text, json!({"stage": name, "fingerprint": fingerprint, "pinned": pinned}));
    Ok(exit_code::OK)
}

/// What a collection did, for people.
pub(super) fn described(collected: &Collected, dry_run: bool) -> String {
    let Collected { records, objects, leftovers, bytes, bytes_left, closed, hidden } = collected;
    let mut lines: Vec<String> = records
        .iter()
        .map(|(stage, fingerprint)| format!("{stage} {}", &fingerprint[..8]))
        .collect();
    if *closed > 0 {
        lines.push(format!(
            "{closed} records may not be read, so that no object can go: `pipe doctor` says what \
             to do"
        ));
    }
    if *hidden > 0 {
        lines.push(format!(
            "{hidden} files that say what is in use may not be read, so that no record can go: \
             `pipe doctor` says what to do"
        ));
    }
    lines.push(format!(
        "{} {} records, {objects} objects and {leftovers} leftovers: {} freed, {} left",
        if dry_run { "would remove" } else { "removed" },
        records.len(),
        size(*bytes),
        size(*bytes_left),
    ));
    lines.join("\n")
}

/// Collects after a run where that is due, and says so where anything went.
pub(super) fn collect_after_run(cache: &Cache, cap: Option<u64>) {
    let Some(cap) = cap else { return };
    match cache.collect_if_due(cap) {
        Ok(Some(collected)) if collected.bytes > 0 => {
            display::note(&format!(
                "the cache was looked through: {}",
                described(&Collected { records: Vec::new(), ..collected.clone() }, false)
            ));
        }
        Ok(_) => {}
        Err(error) => {
            let help = error.help().map(|help| format!(" ({help})")).unwrap_or_default();
            display::note(&format!(
                "the cache could not be looked through: {error}{help}; it is tried again in an hour"
            ));
        }
    }
}

/// The cap of automatic collections: `PIPE_CACHE_CAP`, `off` for none.
pub(super) fn cap_of_environment() -> Result<Option<u64>, CommandError> {
    let Some(text) = std::env::var_os("PIPE_CACHE_CAP").filter(|t| !t.is_empty()) else {
        return Ok(Some(DEFAULT_CAP));
    };
    parse_cap(&text.to_string_lossy()).map(|cap| cap.0).map_err(|message| {
        CommandError::usage(format!("PIPE_CACHE_CAP: {message}"), "for example `200GiB`, or `off`")
    })
}

/// A cap on the command line; `None` inside is `off`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cap(pub(super) Option<u64>);

pub(super) fn parse_cap(text: &str) -> Result<Cap, String> {
    if text == "off" {
        return Ok(Cap(None));
    }
    parse_size(text).map(|bytes| Cap(Some(bytes)))
}

/// Splits `12.5GiB` into number and unit.
fn parse_number(text: &str) -> Result<(f64, &str), String> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number: f64 =
        number.parse().map_err(|_| format!("`{text}` does not begin with a number"))?;
    Ok((number, unit.trim()))
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (number, unit) = parse_number(text)?;
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1_048_576.0,
        "gib" => 1_073_741_824.0,
        "tib" => 1_099_511_627_776.0,
        _ => return Err(format!("unknown unit `{unit}`, for example `MB` or `GiB`")),
    };
    Ok((number * factor) as u64)
}

fn parse_age(text: &str) -> Result<Duration, String> {
    let (number, unit) = parse_number(text)?;
    let seconds = match unit {
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        "w" => 604_800.0,
        _ => return Err(format!("unknown unit `{unit}`, one of s, min, h, d, w")),
    };
    Duration::try_from_secs_f64(number * seconds).map_err(|e| e.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_ages_have_units() {
        assert_eq!(parse_size("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_size("20 kB"), Ok(20_000));
        assert_eq!(parse_size("7"), Ok(7));
        assert!(parse_size("7 parsec").is_err() && parse_size("GiB").is_err());
        assert_eq!(parse_age("36h"), Ok(Duration::from_secs(129_600)));
        assert!(parse_age("3").is_err());
        assert!(parse_cap("off").unwrap().0.is_none());
    }
}
