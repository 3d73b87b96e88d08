//! A run as plain lines: for logs, CI and terminals that can do no more.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use contract::Progress;

use super::{amount, duration, failure, size};
use crate::event::Event;

/// Progress of one stage is shown at most this often, or at every tenth of the work.
const EVERY: Duration = Duration::from_secs(10);

pub(super) struct Plain {
    verbose: bool,
    shown: BTreeMap<String, (Instant, u64)>,
}

impl Plain {
    pub(super) fn new(verbose: bool) -> Self {
        Self { verbose, shown: BTreeMap::new() }
    }

    /// The line that an event is worth, if any.
    pub(super) fn line(&mut self, event: &Event) -> Option<String> {
        match event {
            Event::StageProgress { stage, progress } => self.progress(stage, progress),
            Event::StageStarted { stage, .. }
            | Event::StageFetching { stage, .. }
            | Event::StagePushing { stage, .. } => {
                self.shown.insert(stage.clone(), (Instant::now(), 0));
                lasting(event)
            }
            _ => lasting(event),
        }
    }

    fn progress(&mut self, stage: &str, progress: &Progress) -> Option<String> {
        let Progress::Advance { done, total, unit, note } = progress else {
            return said(stage, progress, self.verbose);
        };
        let (at, tenth) = self.shown.get(stage).copied()?;
        let now = if *total > 0 { done * 10 / total } else { 0 };
        if at.elapsed() < EVERY && now <= tenth {
            return None;
        }
        self.shown.insert(stage.to_owned(), (Instant::now(), now));
        let note = if note.is_empty() { String::new() } else { format!(" · {note}") };
        let of = if *total > 0 { format!("/{}", amount(*total, unit)) } else { String::new() };
        let shown = if unit == "bytes" { "" } else { unit.as_str() };
        Some(format!("{stage}: {}{of} {shown}{note}", amount(*done, unit)))
    }
}

/// What a stage said beside its progress.
pub(super) fn said(stage: &str, progress: &Progress, verbose: bool) -> Option<String> {
    match progress {
        Progress::Log { message } => verbose.then(|| format!("{stage}: {message}")),
        Progress::Warning { message } => Some(format!("{stage}: warning: {message}")),
        Progress::Estimate { seconds, bytes, basis } => {
            let time = seconds.map(|s| format!("about {}", duration(s)));
            let memory = bytes.map(|b| format!("{} of memory", size(b)));
            let parts: Vec<String> = time.into_iter().chain(memory).collect();
            Some(format!("{stage}: estimate: {} ({basis})", parts.join(", ")))
        }
        Progress::Advance { .. } | Progress::Metrics { .. } => None,
    }
}

/// The line that stays on the screen for an event.
pub(super) fn lasting(event: &Event) -> Option<String> {
    Some(match event {
        Event::RunStarted { .. } | Event::StageProgress { .. } => return None,
        Event::StageReused { stage, fingerprint, saved_seconds, cut_off_by } => {
            let took = duration(*saved_seconds);
            let mut line = format!("{stage}: reused {} (took {took})", fingerprint.short());
            if !cut_off_by.is_empty() {
                line.push_str(&format!(", early cutoff after {}", cut_off_by.join(", ")));
            }
            line
        }
        Event::StageWaiting { stage, holder } => {
            format!("{stage}: waiting for {holder}")
        }
        Event::StageStarted { stage, reasons, .. } => {
            format!("{stage}: running ({})", reasons.join("; "))
        }
        Event::StageFinished { stage, fingerprint, seconds, unchanged, warnings } => {
            let same = if *unchanged { ", made the same as last time" } else { "" };
            let mut line =
                format!("{stage}: done {} in {}{same}", fingerprint.short(), duration(*seconds));
            for warning in warnings {
                line.push_str(&format!("\n{stage}: warning: {warning}"));
            }
            line
        }
        Event::StageFailed { stage, message, help, log, log_tail } => {
            let log = log.as_ref().map(|l| l.display().to_string());
            failure(stage, message, help.as_deref(), log.as_deref(), log_tail)
        }
        Event::StageSkipped { stage, because_of } => {
            format!("{stage}: skipped, because {because_of} failed")
        }
        Event::Interrupted => "interrupted: stopping the running stages".to_owned(),
        Event::RunFinished { critical_path, .. } => {
            let mut text = summary(event);
            if critical_path.len() > 1 {
                let seconds = critical_path.iter().map(|step| step.seconds).sum();
                let names: Vec<&str> = critical_path.iter().map(|s| s.stage.as_str()).collect();
                let (names, time) = (names.join(" > "), duration(seconds));
                text.push_str(&format!("\ncritical path {time}: {names}"));
            }
            text
        }
        other => return super::shared::lasting(other),
    })
}

/// The counts and times of a finished run.
fn summary(event: &Event) -> String {
    let Event::RunFinished {
        ran,
        reused,
        fetched,
        failed,
        skipped,
        seconds,
        saved_seconds,
        cut_off,
        ..
    } = event
    else {
        return String::new();
    };
    let mut parts = vec![format!("{ran} run"), format!("{reused} reused")];
    if *cut_off > 0 {
        parts[1].push_str(&format!(" ({cut_off} by early cutoff)"));
    }
    parts.extend((*fetched > 0).then(|| format!("{fetched} of them fetched")));
    parts.extend((*failed > 0).then(|| format!("{failed} failed")));
    parts.extend((*skipped > 0).then(|| format!("{skipped} not run")));
    let saved = if *saved_seconds >= 1.0 {
        format!(", {} saved", duration(*saved_seconds))
    } else {
        String::new()
    };
    format!("{} in {}{saved}", parts.join(", "), duration(*seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_shown_by_tenths() {
        let mut plain = Plain::new(false);
        plain.shown.insert("train".into(), (Instant::now(), 0));
        let at = |done| Event::StageProgress {
            stage: "train".into(),
            progress: Progress::Advance {
                done,
                total: 60,
                unit: "steps".into(),
                note: "loss 0.4".into(),
            },
        };
        let lines: Vec<String> = (0..=60).filter_map(|i| plain.line(&at(i))).collect();
        assert_eq!(lines.len(), 10);
        assert_eq!(lines[0], "train: 6/60 steps · loss 0.4");
    }
}
